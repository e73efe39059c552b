"""What `prepare` is asked for: whether it is done already, and what to say when the disk refuses it."""

import dataclasses
import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from tinystories.data import vocabulary
from tinystories.data.draft import read_json
from tinystories.data.prepared import FORMAT, Meta, read_meta
from tinystories.data.reader import ReadOptions
from tinystories.data.sources import Source
from tinystories.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for."""

    source: Source
    val: Source | None
    tokenizer: str
    options: ReadOptions
    keep_duplicates: bool
    val_fraction: float | None

    def as_json(self) -> dict[str, Any]:
        """All that decides the result, for telling whether two requests are the same."""
        values = {
            "format": FORMAT,
            "source": self.source.fingerprint(),
            "val": self.val.fingerprint() if self.val else self.held_out,
            "tokenizer": vocabulary.fingerprint(self.tokenizer),
            "options": dataclasses.asdict(self.options),
            "keep_duplicates": self.keep_duplicates,
        }
        as_read_back: dict[str, Any] = json.loads(json.dumps(values))
        return as_read_back

    @property
    def held_out(self) -> float:
        return self.source.held_out if self.val_fraction is None else self.val_fraction

    def described(self) -> dict[str, Any]:
        """The same for people: the part of meta.json that is known beforehand."""
        return {
            "source": self.source.name,
            "val_source": self.val.name if self.val else "",
            "text_field": self.options.text_field,
            "errors": self.options.errors,
            "keep_duplicates": self.keep_duplicates,
            "tokenizer": self.tokenizer,
            "fingerprint": hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest(),
        }


def finished(out: Path, request: Request) -> Meta | None:
    """The meta of `out` if it is what is asked for, None if nothing is there; anything else is an error."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not any(out.iterdir()):
        return None
    if not (out / "meta.json").exists():
        raise UserError(f"--out {out} holds something else; name an empty or new folder")
    meta = read_meta(out)
    described = request.described()
    if meta.fingerprint != described.pop("fingerprint"):
        other = [f"{key}={getattr(meta, key)!r}" for key, value in described.items() if getattr(meta, key) != value]
        what = ", ".join(other) or "other contents of its files"
        raise UserError(f"--out {out} was prepared with {what}; name another --out or remove it")
    return meta


def refused(error: OSError, draft: Path, request: Request) -> str:
    """What to say when the disk takes no more."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or draft} cannot be written: {error.strerror}"
    total = request.source.bytes_total + (request.val.bytes_total if request.val else 0)
    read = (read_json(draft / "journal.json") or {}).get("read", 0)
    size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    missing = size / read * (total - read) if read else 0.7 * total  # 2 bytes for 3 or 4 of text, and the index
    amount = f"about {max(missing, 1e6) / 1e6:,.0f} MB more are needed; " if total else ""
    return f"{draft}: the disk is full; {amount}free some space and run the same again: it goes on where it stopped"
