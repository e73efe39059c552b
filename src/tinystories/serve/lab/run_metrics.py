"""Read metrics.jsonl while a run writes it: whole lines only, damaged ones skipped, long ones thinned."""

import dataclasses
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16
MAX_METRICS_BYTES = 1 << 29
MAX_POINTS = 4000  # of each kind in one answer; of more, every second, fourth, ... is sent
CHECKED_BYTES = 64  # before the place where reading continues: whether they are still the same
NUMBERS = (
    "tokens",
    "seconds",
    "loss",
    "bits_per_byte",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "val_bits_per_byte",
    "val_nats_per_token",
)


class RunProblemError(Exception):
    """Something of a run cannot be shown. The message is for learners, without paths of this machine."""


@dataclasses.dataclass(kw_only=True)
class Update:
    """What is new in a metrics.jsonl."""

    restart: bool = False  # what was read before is void: the file was cut or replaced
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    after: int = 0  # bytes that have been read, where the next reading continues
    stride: int = 1  # of the points since the last update, one in this number is in `records`
    n_damaged: int = 0  # lines that are not records
    first_damaged: int | None = None  # the line number of the first of them, if reading began at the top


class Thinner:
    """Keeps at most `MAX_POINTS` of any number of records, evenly spaced, and the last one."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, Any]]] = []
        self.last: tuple[int, dict[str, Any]] | None = None
        self.n, self.stride = 0, 1

    def add(self, order: int, record: dict[str, Any]) -> None:
        if self.n % self.stride == 0:
            self.points.append((order, record))
            if len(self.points) > MAX_POINTS:
                self.points = self.points[::2]
                self.stride *= 2
        self.n += 1
        self.last = (order, record)

    def result(self) -> list[tuple[int, dict[str, Any]]]:
        """Return (order, record) of what is kept."""
        if self.last is None or self.points[-1][0] == self.last[0]:
            return self.points
        return [*self.points, self.last]


class MetricsReader:
    """Reads a growing metrics.jsonl from byte `after` on."""

    def __init__(self, locate: Callable[[], Path], after: int = 0) -> None:
        """`locate` returns the path; it raises `RunProblemError` if the file is not there."""
        self.locate, self.after = locate, after
        self.before: bytes | None = None  # the last bytes that were read; None: unknown
        self.stamp: tuple[int, int, int] | None = None  # size, modification time and inode at the last reading
        self.n_lines = 0
        self.is_from_top = after == 0

    def read(self) -> Update | None:
        """Return what is new; None if nothing is. Raises `RunProblemError` if the file cannot be read."""
        path = self.locate()
        try:
            status = path.stat()
            size, stamp = status.st_size, (status.st_size, status.st_mtime_ns, status.st_ino)
            if stamp == self.stamp:
                return None
            if size > MAX_METRICS_BYTES:
                raise RunProblemError(f"metrics.jsonl is larger than {MAX_METRICS_BYTES >> 20} MB, too large to draw")
            with path.open("rb") as file:
                update = self._read_from(file, size)
            self.stamp = stamp  # older than what was read, if at all: then the next call reads again
            return update
        except OSError as error:
            raise RunProblemError(f"metrics.jsonl cannot be read: {error.strerror or error}") from None

    def _read_from(self, file: Any, size: int) -> Update | None:
        update = Update()
        if not self._continues(file, size):
            self.after, self.n_lines, self.is_from_top = 0, 0, True
            update.restart = True
        file.seek(self.after)
        training, evaluations = Thinner(), Thinner()
        pending, is_too_long, order = b"", False, 0
        while data := file.read(CHUNK_BYTES):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self.n_lines += 1
                self.after += len(line) + 1
                record = None if is_too_long else parse_record(line)
                is_too_long = False
                if record is None:
                    self._count_damaged(update, line)
                    continue
                (evaluations if "evaluated" in record or "val_bits_per_byte" in record else training).add(order, record)
                order += 1
            if len(pending) > MAX_LINE_BYTES:
                is_too_long, self.after, pending = True, self.after + len(pending), b""
        is_new = self.before is None or order > 0 or update.restart or update.n_damaged > 0
        file.seek(max(0, self.after - CHECKED_BYTES))
        self.before = file.read(min(CHECKED_BYTES, self.after))
        update.records = [
            record for _, record in sorted([*training.result(), *evaluations.result()], key=operator.itemgetter(0))
        ]
        update.stride, update.after = max(training.stride, evaluations.stride), self.after
        return update if is_new else None

    def _continues(self, file: Any, size: int) -> bool:
        """Whether the file still begins with what was read before."""
        if self.after > size:
            return False
        file.seek(max(0, self.after - CHECKED_BYTES))
        before = file.read(min(CHECKED_BYTES, self.after))
        return before == self.before if self.before is not None else before[-1:] in (b"", b"\n")

    def _count_damaged(self, update: Update, line: bytes) -> None:
        if not line.strip():
            return
        if not update.n_damaged and self.is_from_top:
            update.first_damaged = self.n_lines
        update.n_damaged += 1


def read_part(path: Path, n_bytes: int, *, start: int = 0) -> bytes:
    """Return at most `n_bytes` of a file, from `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(n_bytes)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the step and the finite numbers of a line; None if it is not a record. What is infinite is null."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            value = json.loads(line)  # a loss that is not a number is written NaN
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict) or type(value.get("step")) is not int or not 0 <= value["step"] < 2**53:
        return None
    record: dict[str, Any] = {"step": value["step"]}
    for name in NUMBERS:
        if name in value:
            number = value[name]
            is_finite = type(number) in (int, float) and abs(number) < 1e300  # not true of NaN either
            record[name] = number if is_finite else None
    for name in ("evaluated", "final"):
        if value.get(name) is True:
            record[name] = True
    return record
