"""Who may ask, and how much at once: request ids, hosts, origins, keys and bodies, as pure ASGI functions.

No BaseHTTPMiddleware: it would hide from a stream that its client has gone. Each guard raises `ApiError`; the outermost
layer, `RequestLog`, turns it into an answer.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinystories.errors import one_line
from tinystories.serve.answer import send_error
from tinystories.serve.errors import ApiError
from tinystories.serve.metrics import Metrics
from tinystories.serve.settings import ServerConfig, is_loopback

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADER_NAMES = re.compile(r"[A-Za-z0-9, _-]{0,1024}")
MAX_LOGGED_PATH = 100
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
Header = tuple[bytes, bytes]


class RequestLog:
    """Gives every request an id, answers errors of the layers inside, and logs a line without anything of the text."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known_paths: Collection[str]) -> None:
        self.app, self.metrics, self.known_paths = app, metrics, frozenset(known_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        state = scope.setdefault("state", {})
        wanted_id = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted_id if REQUEST_ID.fullmatch(wanted_id) else secrets.token_hex(8)
        added: list[Header] = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        state["request_id"], state["added_headers"] = request_id, added
        started_at, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ApiError as error:
            if not status:
                await send_error(send_with_headers, error)
        finally:
            path = scope["path"]
            label = path if path in self.known_paths else "other"
            self.metrics.requests.labels(label, str(status or 499)).inc()
            if log.isEnabledFor(logging.INFO):
                seconds = time.monotonic() - started_at
                shown = one_line(path[:MAX_LOGGED_PATH])
                log.info("%s %s %s %d %.3fs", request_id, scope["method"], shown, status or 499, seconds)


class HostGuard:
    """Refuses names in the Host header that are not this server's: a web page could have pointed its own name here."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self.names = {name.lower() for name in (*config.allow_hosts, config.host)}
        self.any_address = not is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "")
        name = split_host(host)
        if not (is_loopback(name) or name in self.names or (self.any_address and is_address(name))):
            raise ApiError(
                403, "the Host header is not allowed; start the server with --allow-host NAME", code="bad_host"
            )
        await self.app(scope, receive, send)


def split_host(header: str) -> str:
    """Return the name or address of a Host header, without port and brackets."""
    name = header.partition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
    return name.rstrip(".").lower()


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class OriginGuard:
    """Refuses web pages of other origins, except those of --allow-origin, whose preflight requests it answers."""

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app, self.allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            await self.app(scope, receive, send)
            return
        if "*" in self.allowed or origin in self.allowed:
            scope["state"]["added_headers"] += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"vary", b"Origin"),
            ]
            scope["state"]["added_headers"].append((b"access-control-expose-headers", b"X-Request-Id, Retry-After"))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await send({"type": "http.response.start", "status": 204, "headers": preflight_headers(headers)})
                await send({"type": "http.response.body", "body": b""})
                return
        elif not is_same_origin(origin, headers.get("host", "")):
            raise ApiError(
                403,
                "web pages of this origin may not use this server; start it with --allow-origin ORIGIN",
                code="bad_origin",
            )
        await self.app(scope, receive, send)


def preflight_headers(headers: Headers) -> list[Header]:
    """Return what a browser asks before it sends a request with a key or JSON."""
    requested = headers.get("access-control-request-headers", "")
    allowed = requested if HEADER_NAMES.fullmatch(requested) and requested else "Authorization, Content-Type"
    answer = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", b"600"),
    ]
    if headers.get("access-control-request-private-network") == "true":
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an origin is this server itself."""
    try:
        return urlsplit(origin).scheme in ("http", "https") and urlsplit(origin).netloc == host.lower() != ""
    except ValueError:
        return False


class KeyGuard:
    """Refuses everything but the open paths without a key."""

    def __init__(self, app: ASGIApp, keys: Collection[str], open_paths: Collection[str]) -> None:
        self.app, self.open_paths = app, frozenset(open_paths)
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = scope["client"][0] if scope.get("client") else ""
        scope["state"]["client"] = address
        if self.digests and scope["path"] not in self.open_paths:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
            matches = [hmac.compare_digest(digest, one) for one in self.digests]  # all of them: constant time
            if scheme.lower() != "bearer" or not any(matches):
                raise ApiError(
                    401,
                    "this server needs its API key: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            scope["state"]["client"] = f"{matches.index(True)} {address}"
        await self.app(scope, receive, send)


class BodyGuard:
    """Reads the body before anything else happens: JSON only, bounded in size and time."""

    def __init__(self, app: ASGIApp, config: ServerConfig, routes: Collection[BaseRoute]) -> None:
        self.app, self.max_bytes, self.timeout_s = app, config.max_body_bytes, config.receive_timeout_s
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in WITHOUT_BODY:
            await self.app(scope, receive, send)
            return
        if not any(route.matches(scope)[0] is Match.FULL for route in self.routes):
            scope["state"]["added_headers"].append((b"connection", b"close"))  # whatever the body is, nobody reads it
            await self.app(scope, receive, send)  # 404 or 405
            return
        headers = Headers(scope=scope)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, "send JSON, with the header Content-Type: application/json", headers={"Connection": "close"}
            )
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "compressed bodies are not supported", headers={"Connection": "close"})
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(receive, headers)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.timeout_s:g} seconds", headers={"Connection": "close"}
            ) from None
        if body is None:
            return  # the client has gone
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive, headers: Headers) -> bytes | None:
        """Return the body; None if the client disconnects before its end."""
        length = headers.get("content-length", "0")
        parts: list[bytes] = []
        n_bytes, more = int(length) if length.isdecimal() and len(length) < 19 else 0, True
        if n_bytes > self.max_bytes:
            raise self._too_large()
        n_bytes = 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            n_bytes += len(parts[-1])
            if n_bytes > self.max_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_bytes:,} bytes", headers={"Connection": "close"})
