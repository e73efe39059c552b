"""A local stand-in of the Hugging Face Hub for models: what the real client asks for to read them and to push one."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from typing import Any

import hub_server
from hub_server import WHEN, Files, git_hash

TOKEN = "hf_right"


@dataclasses.dataclass
class Repository:
    """`commits`: files by revision; "main" is the latest. `served`: other bytes than those that are listed."""

    files: dataclasses.InitVar[Files]
    private: bool = False
    gated: bool = False
    served: dict[str, bytes] = dataclasses.field(default_factory=dict)
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self, files: Files) -> None:
        self.commit(files)

    def commit(self, files: Files) -> str:
        names = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        self.tags["main"] = hashlib.sha1(repr((len(self.commits), names)).encode()).hexdigest()
        self.commits[self.tags["main"]] = dict(files)
        return self.tags["main"]

    def commit_of(self, revision: str) -> str | None:
        revision = self.tags.get(revision, revision)
        return revision if revision in self.commits else None


class ModelHub(ThreadingHTTPServer):
    """`cuts`: the bytes after which the answer with a file breaks off, once each; after `stalls` it never goes on."""

    daemon_threads = True

    def __init__(self, models: Mapping[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = dict(models)
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.stalls: dict[str, int] = {}
        self.stalled = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(hub_server.Handler):
    server: ModelHub  # type: ignore[assignment]

    def do_PUT(self) -> None:
        self.answer()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        body = self.body()
        asked = f" {bytes_asked}" if (bytes_asked := self.headers.get("Range")) else ""
        self.server.requests.append(f"{self.command} {path}{asked}")
        if self.command in ("POST", "PUT"):
            self.write(path, body)
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        found = api or file
        repo = self.server.models.get(found[1]) if found else None
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or repo is None or (repo.private and not allowed):
            self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        commit = repo.commit_of((found[2] if file else found[3]) or "main")
        if commit is None:
            self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RevisionNotFound"})
        elif file and repo.gated and not allowed:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif file:
            self.send_model_file(repo, commit, file[3])
        elif found[2] == "tree":
            self.send_json(
                [{"type": "file", "path": name, **about(name, d)} for name, d in repo.commits[commit].items()]
            )
        else:
            self.send_info(found[1], repo, commit)

    def send_info(self, name: str, repo: Repository, commit: str) -> None:
        siblings = []
        for path, data in repo.commits[commit].items():
            facts = about(path, data)
            lfs = {"lfs": {"sha256": facts["lfs"]["oid"], **facts["lfs"]}} if "lfs" in facts else {}
            siblings.append({"rfilename": path, "size": len(data), "blobId": facts["oid"], **lfs})
        facts = {"lastModified": WHEN, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        private = {"private": repo.private, "gated": "manual" if repo.gated else False}
        self.send_json({"id": name, "sha": commit, "siblings": siblings, **private, **facts})

    def send_model_file(self, repo: Repository, commit: str, name: str) -> None:
        listed = repo.commits[commit].get(name)
        if listed is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        facts = about(name, listed)
        etag = facts["lfs"]["oid"] if "lfs" in facts else facts["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data = listed if self.command == "HEAD" else repo.served.get(name, listed)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.server.cuts.pop(name, None) if self.command == "GET" else None
        stall = self.server.stalls.pop(name, None) if self.command == "GET" else None
        if cut is None and stall is None:
            self.send(206 if wanted else 200, data[first:], headers)
            return
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: cut or stall])
        self.wfile.flush()
        if stall:
            self.server.stalled.set()
            threading.Event().wait(60)
        self.close_connection = True

    def write(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.send_json({})
        elif stored := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == stored[1]
            self.server.uploads[stored[1]] = body
            self.send(200, b"", {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif batch := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [self.upload(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            self.send_json({"transfer": "basic", "objects": objects} if batch[1] in self.server.models else {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repo = self.server.models[found[1]]
            if found[2] == "preupload":
                files = [
                    {"path": f["path"], "shouldIgnore": False, **mode(f["path"])} for f in json.loads(body)["files"]
                ]
                self.send_json({"files": files})
            else:
                commit = self.commit(repo, [json.loads(line) for line in body.splitlines()])
                address = f"{self.server.endpoint}/{found[1]}/commit/{commit}"
                self.send_json({"commitUrl": address, "commitOid": commit, "success": True})
        else:
            self.send(404, b"{}", {})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            self.send(403, b'{"error": "no rights"}', {"X-Error-Message": "You may not create here"})
        elif name in self.server.models:
            self.send(409, json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode(), {})
        else:
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.server.models[name] = Repository({".gitattributes": b""}, private=private)
            self.send_json({"url": f"{self.server.endpoint}/{name}"})

    def upload(self, oid: str, size: int) -> dict[str, Any]:
        there = (
            {} if oid in self.server.uploads else {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{oid}"}}}
        )
        return {"oid": oid, "size": size, **there}

    def commit(self, repo: Repository, lines: list[dict[str, Any]]) -> str:
        files = dict(repo.commits[repo.tags["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.server.uploads[value["oid"]]
        return repo.commit(files)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def mode(name: str) -> dict[str, str]:
    return {"uploadMode": "lfs" if is_large(name) else "regular"}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def about(name: str, data: bytes) -> dict[str, Any]:
    """Size and hashes as the Hub lists them; of a large file those of its pointer and of its content."""
    if not is_large(name):
        return {"size": len(data), "oid": git_hash(data)}
    content = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{content}\nsize {len(data)}\n".encode()
    lfs = {"oid": content, "size": len(data), "pointerSize": len(pointer)}
    return {"size": len(data), "oid": git_hash(pointer), "lfs": lfs}
