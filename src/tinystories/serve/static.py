"""The files of the web pages: / (the storyteller), /lab, and what they load. They need no key, and hold no data."""

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
}


def build_page_routes() -> list[Route]:
    """Return a route for each file of `page/`, read once: /lab for lab.html, /page/NAME for what it loads."""
    files = {f"/page/{path.relative_to(PAGE).as_posix()}": path for path in sorted(PAGE.rglob("*")) if path.is_file()}
    files |= {url: PAGE / name for url, name in DOCUMENTS.items()}
    return [build_route(url, path) for url, path in files.items() if path.suffix in MEDIA_TYPES]


def build_route(url: str, path: Path) -> Route:
    """Return the route of one file."""
    data, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]
    # Chromium asks for the icon again whenever the URL changes.
    headers = HEADERS | {"Cache-Control": "max-age=3600"} if path.suffix == ".svg" else HEADERS

    async def answer(_request: Request) -> Response:
        return Response(data, headers=headers, media_type=media_type)

    return Route(url, answer, methods=["GET"])
