"""Listen, answer, and end in good order: the process of `tinystories serve`."""

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from tinystories.engine.protocol import Engine
from tinystories.errors import UserError
from tinystories.serve.app import build_app
from tinystories.serve.connection import TimedProtocol
from tinystories.serve.errors import ApiError, shutting_down
from tinystories.serve.lab.endpoints import LabEndpoints
from tinystories.serve.model import ServedModel
from tinystories.serve.service import Service
from tinystories.serve.settings import ServerConfig
from tinystories.serve.static import build_page_routes

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0  # after the last answer, for clients to take it in


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown: a first signal drains, a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.exit_code = 0
        self.draining: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.service.start()
        await super().startup(sockets)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        self.exit_code = 128 + sig
        if self.loop is None:
            self.should_exit = True
            return
        if self.draining is not None:
            self.end_at_once(shutting_down())
            return
        self.draining = self.loop.create_task(self.drain())

    async def drain(self) -> None:
        """Let requests in progress finish, then end."""
        if self.service.inboxes:
            log.info("finishing %d requests; press Ctrl-C again to end at once", len(self.service.inboxes))
        await self.service.drain()
        self.should_exit = True

    def die(self) -> None:
        """End the process because the engine has failed; callable from any thread."""
        self.exit_code = 1
        if self.loop is not None and not self.loop.is_closed():
            error = ApiError(500, "the engine has failed; the server ends", code="engine_failed")
            self.loop.call_soon_threadsafe(self.end_at_once, error)

    def end_at_once(self, error: ApiError) -> None:
        """End requests in progress with an error, then the server, without waiting for clients."""
        self.service.end_all(error)
        self.force_exit = self.should_exit = True


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket bound to the host and port of the configuration. `UserError` if that is not possible."""
    host = config.host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"cannot listen on --host {config.host}: {error.strerror}") from None
    try:
        if hasattr(socket, "SO_REUSEPORT"):  # not on Windows, where the next option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another with --port (0: any)"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: Engine,
    model: ServedModel,
    config: ServerConfig,
    listener: socket.socket,
    on_ready: Callable[[str], None] = lambda _: None,
) -> int:
    """Serve until a signal; return the exit code: 130 or 143 after a signal, 1 if the engine has failed.

    `on_ready` is called with the URL once connections are accepted.
    """
    service = Service(engine, model, config)
    server = build_server(service)

    async def run() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if server.started:
            on_ready(url_of(listener))
        await serving

    asyncio.run(run())
    service.close()
    return server.exit_code


def build_server(service: Service) -> Server:
    """Return a uvicorn server for a service, with its pages; it ends if the service's engine fails."""
    page_routes = build_page_routes()
    app = build_app(
        service,
        extra_routes=[*page_routes, *LabEndpoints(service).routes()],
        open_paths=[route.path for route in page_routes],
    )
    server = Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=service.config.max_connections,
            timeout_graceful_shutdown=int(FLUSH_SECONDS),
        ),
        service,
    )
    service.scheduler.on_death = server.die
    return server


def install_log_levels(level: int) -> None:
    """Log requests and errors from `level` on; uvicorn only says what goes wrong."""
    logging.getLogger("tinystories.serve").setLevel(level)
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))
