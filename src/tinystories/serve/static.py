"""The files of the web pages: / (the storyteller), /lab, and what they load. They need no key, and hold no data."""

import functools
import gzip
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE = Path(__file__).parent / "page"
DOCUMENTS = {"/": "index.html", "/lab": "lab.html"}
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Nothing of another origin, no inline script or style, no frames. The page may make pictures itself, to save them.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none';"
    " object-src 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Vary": "Accept-Encoding",
}


class Representation:
    """The bytes of a file as they are sent in one encoding, with the tag by which a browser's cache knows them."""

    def __init__(self, data: bytes, encoding: str | None) -> None:
        self.data = data
        self.headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}
        if encoding is not None:
            self.headers["Content-Encoding"] = encoding


class StaticFile:
    """A file of the pages, read once."""

    def __init__(self, path: Path) -> None:
        self.media_type = MEDIA_TYPES[path.suffix]
        # Chromium asks for the icon again whenever the URL changes.
        self.headers = HEADERS | ({"Cache-Control": "max-age=3600"} if path.suffix == ".svg" else {})
        self.plain = Representation(path.read_bytes(), None)

    @functools.cached_property
    def compressed(self) -> Representation:
        """The file compressed by gzip, when a browser first asks for it; the plain one if that is not larger."""
        data = gzip.compress(self.plain.data, 9, mtime=0)
        return Representation(data, "gzip") if len(data) < len(self.plain.data) else self.plain

    async def answer(self, request: Request) -> Response:
        """GET the file: compressed for clients that say so, and nothing where they have it already."""
        accepted = ",".join(request.headers.getlist("accept-encoding"))
        chosen = self.compressed if accepts_gzip(accepted) else self.plain
        headers = self.headers | chosen.headers
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if chosen.headers["ETag"] in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(chosen.data, headers=headers, media_type=self.media_type)


def build_page_routes() -> list[Route]:
    """Return a route for each file of `page/`: /lab for lab.html, /page/NAME for what it loads."""
    files = {f"/page/{path.relative_to(PAGE).as_posix()}": path for path in sorted(PAGE.rglob("*")) if path.is_file()}
    files |= {url: PAGE / name for url, name in DOCUMENTS.items()}
    return [
        Route(url, StaticFile(path).answer, methods=["GET"])
        for url, path in files.items()
        if path.suffix in MEDIA_TYPES
    ]


def accepts_gzip(accepted: str) -> bool:
    """Return whether an Accept-Encoding allows gzip: by name, or else by `*`, with a weight above 0."""
    weights: dict[str, float] = {}
    for part in accepted.lower().split(","):
        name, *parameters = (item.strip() for item in part.split(";"))
        weight = next((item.removeprefix("q=") for item in parameters if item.startswith("q=")), "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
    return weights.get("gzip", weights.get("*", 0.0)) > 0
