"""A local stand-in of the Hugging Face Hub: just what the real clients ask for to stream a dataset."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Files = Mapping[str, bytes]
Server = TypeVar("Server", bound=ThreadingHTTPServer)

REVISION = "0123456789abcdef0123456789abcdef01234567"
WHEN = "2024-01-01T00:00:00.000Z"


class Hub(ThreadingHTTPServer):
    """Serves datasets `{"owner/name": {"path": content}}`; `requests` lists what was asked."""

    daemon_threads = True

    def __init__(self, datasets: Mapping[str, Files]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.datasets = datasets
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        found = api or file
        if found is None or found[1] not in self.server.datasets:
            self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})
        elif (found[2 if file else 3] or "main") not in ("main", REVISION):
            self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RevisionNotFound"})
        elif file:
            self.send_file(self.server.datasets[file[1]].get(file[3]))
        else:
            assert api is not None
            self.send_api(self.server.datasets[api[1]], api[1], api[2] or "revision", api[4] or "", body)

    def send_api(self, files: Files, repo: str, what: str, folder: str, body: bytes) -> None:
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            answer: Any = {
                "id": repo,
                "sha": REVISION,
                "lastModified": WHEN,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        else:
            names: list[str] = list(files)
            if what == "tree":
                names = [name for name in files if not folder or name.startswith(f"{folder}/")]
            elif self.headers.get_content_type() == "application/json":
                names = json.loads(body)["paths"]
            else:
                names = urllib.parse.parse_qs(body.decode()).get("paths", [])
            answer = [entry(name, files[name]) for name in names if name in files]
            known = {e["path"] for e in answer}
            folders = {p for name in files for p in parents(name)} - known
            wanted = folders if what == "tree" else folders & set(names)
            answer += [{"type": "directory", "path": p, "oid": git_hash(p.encode()), "size": 0} for p in sorted(wanted)]
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes | None) -> None:
        if data is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send(206, data[first : last + 1], headers)
        else:
            self.send(200, data, headers)

    def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server, answering in a thread of its own while it lasts."""
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
