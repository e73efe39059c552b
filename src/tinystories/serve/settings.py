"""`ServerConfig`: where the server listens, whom it answers, and how much it takes on."""

import dataclasses
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tinystories.errors import UserError, check_integer, quoted
from tinystories.files import os_errors, read_limited

KEY_VARIABLE = "TINYSTORIES_API_KEY"
MIN_KEY_CHARS = 8
MAX_KEY_FILE_BYTES = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the server. Raises `UserError` for values out of range, and for an open door without --no-key."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    n_queued: int | None = None  # sequences that may wait for a slot; None: 4 for each slot
    keys: tuple[str, ...] = ()  # any of these opens; none: no key is needed
    no_key: bool = False  # answer without a key on a host that others can reach
    allow_origins: tuple[str, ...] = ()  # web pages of these origins may use the server; "*": all
    allow_hosts: tuple[str, ...] = ()  # names in the Host header, beside this machine's own
    timeout_s: float = 120.0  # of a request, waiting included
    model_name: str | None = None  # in /v1/models; None: the directory's name

    runs_folder: Path | None = None  # of training runs that the lab shows
    compare_model: Path | None = None  # a model directory that the lab compares with the served one

    # What users need not set.
    drain_s: float = 10.0  # a shutdown lets running requests finish for this long
    pace_s: float = 0.02  # text of a running story is sent at most this often; its first and its last text at once
    ping_s: float = 15.0  # a stream without text gets a comment this often
    send_timeout_s: float = 30.0  # a client that takes in nothing for this long is dropped
    receive_timeout_s: float = 10.0  # to send the header, and the body, of a request
    max_body_bytes: int = 1 << 20
    max_connections: int = 1000
    poll_s: float = 0.5  # how often the lab looks for new lines of runs

    def __post_init__(self) -> None:
        check_integer("port", self.port)
        if not 0 <= self.port <= 65535:
            raise UserError(f"the port must be from 0 to 65535, not {self.port}")
        if self.n_queued is not None and self.n_queued < 0:
            raise UserError(f"the queue must have 0 or more places, not {self.n_queued}")
        if not 0 < self.timeout_s <= 86_400:
            raise UserError(f"the timeout must be more than 0 and at most 86400 seconds, not {self.timeout_s:g}")
        if self.keys and self.no_key:
            raise UserError(
                f"--no-key contradicts the API key (--api-key-file or {KEY_VARIABLE}); leave one of them out"
            )
        for key in self.keys:
            check_key(key)
        for origin in self.allow_origins:
            check_origin(origin)
        if not (self.keys or self.no_key or is_loopback(self.host)):
            raise UserError(
                f"--host {self.host} can be reached from other machines: set a key with --api-key-file FILE or"
                f" {KEY_VARIABLE}, or allow everybody with --no-key"
            )
        if self.runs_folder is not None:
            check_runs_folder(self.runs_folder)


def check_runs_folder(folder: Path) -> None:
    """Raise `UserError` unless a path is a folder, and not a run itself."""
    with os_errors(f"--runs {folder}"):
        if not folder.is_dir():
            raise UserError(
                f"--runs {folder}: there is no such folder; name the one that holds your runs, such as runs"
            )
        if (folder / "metrics.jsonl").exists():
            parent = folder.resolve().parent
            raise UserError(f"--runs {folder} is a run itself; name the folder that holds it: --runs {parent}")


def check_key(key: str) -> None:
    """Raise `UserError` unless a key is long enough and can be sent in a header. The message does not show it."""
    if len(key) < MIN_KEY_CHARS or not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"an API key must have at least {MIN_KEY_CHARS} ASCII characters and no spaces")


def check_origin(origin: str) -> None:
    """Raise `UserError` unless an origin is written as browsers send it."""
    if origin in ("*", "null"):
        return
    try:
        parts = urlsplit(origin)
        is_valid = parts.scheme and parts.netloc and origin == f"{parts.scheme}://{parts.netloc}".lower()
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(f"--allow-origin {quoted(origin)} is not an origin; write https://example.org or '*'")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the keys of a file, one a line, or the one of the environment; none if there is neither.

    `UserError` if the file cannot be read or has no key.
    """
    if file is None:
        return (environment[KEY_VARIABLE],) if environment.get(KEY_VARIABLE) else ()
    with os_errors(f"--api-key-file {file}"):
        try:
            lines = read_limited(file, MAX_KEY_FILE_BYTES).decode().splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--api-key-file {file} is not text; write one key a line") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UserError(f"--api-key-file {file} has no key; write one a line")
    return keys
