"""The request of `prepare`: its fingerprint, whether the output already matches it, and disk error messages."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tinystories.data import build_tokenizer
from tinystories.data.dataset import FORMAT_VERSION, DatasetMeta, read_meta
from tinystories.data.source.reader import ReadOptions
from tinystories.data.source.resolve import Source
from tinystories.data.staging import read_journal
from tinystories.errors import UserError
from tinystories.files import DISK_FULL_ERRNOS, describe_write_error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSpec:
    """The resolved arguments of a `prepare` call."""

    source: Source
    val: Source | None
    tokenizer: str
    options: ReadOptions
    keep_duplicates: bool
    val_fraction: float | None

    def to_json_dict(self) -> dict[str, Any]:
        """Return everything that determines the result, as JSON: equal for equal requests."""
        values = {
            "format": FORMAT_VERSION,
            "source": self.source.fingerprint(),
            "val": self.val.fingerprint() if self.val else self.resolved_val_fraction,
            "tokenizer": build_tokenizer.fingerprint_spec(self.tokenizer),
            "options": dataclasses.asdict(self.options),
            "keep_duplicates": self.keep_duplicates,
        }
        normalized: dict[str, Any] = json.loads(json.dumps(values))
        return normalized

    @property
    def resolved_val_fraction(self) -> float:
        """The fraction to hold out: `val_fraction`, or the default of the source."""
        return self.source.val_fraction if self.val_fraction is None else self.val_fraction

    def to_meta_fields(self) -> dict[str, Any]:
        """Return the fields of meta.json that are known before reading the source."""
        return {
            "source": self.source.name,
            "val_source": self.val.name if self.val else "",
            "text_field": self.options.text_field,
            "errors": self.options.errors,
            "keep_duplicates": self.keep_duplicates,
            "tokenizer": self.tokenizer,
            "fingerprint": hashlib.sha256(json.dumps(self.to_json_dict(), sort_keys=True).encode()).hexdigest(),
        }


def existing_output(out: Path, spec: PrepareSpec) -> DatasetMeta | None:
    """Return the metadata of `out` if it matches `spec`, None if `out` is absent or empty; else raise `UserError`."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    if not any(out.iterdir()):
        return None
    if not (out / "meta.json").exists():
        raise UserError(f"--out {out} is not prepared data and not empty; choose an empty or new folder")
    meta = read_meta(out)
    expected = spec.to_meta_fields()
    if meta.fingerprint != expected.pop("fingerprint"):
        differences = [
            f"{key}={getattr(meta, key)!r}" for key, value in expected.items() if getattr(meta, key) != value
        ]
        description = ", ".join(differences) or "different contents of the input files"
        raise UserError(f"--out {out} was prepared with {description}; choose another --out or remove it")
    return meta


def disk_error_message(error: OSError, staging_path: Path, spec: PrepareSpec) -> str:
    """Return the message for a failed write. For a full disk it estimates how much space is still needed."""
    if error.errno not in DISK_FULL_ERRNOS:
        return describe_write_error(error, staging_path)
    total_bytes = spec.source.total_bytes + (spec.val.total_bytes if spec.val else 0)
    journal = read_journal(staging_path / "journal.json")
    bytes_read = journal.read if journal else 0
    staged_bytes = sum(path.stat().st_size for path in staging_path.rglob("*") if path.is_file())
    # Extrapolate from what has been written; before that, assume 2 bytes per 3 or 4 bytes of text, plus the index.
    needed_bytes = staged_bytes / bytes_read * (total_bytes - bytes_read) if bytes_read else 0.7 * total_bytes
    needed_text = f"about {max(needed_bytes, 1e6) / 1e6:,.0f} MB more is needed; " if total_bytes else ""
    return (
        f"{staging_path}: the disk is full; {needed_text}"
        "free some space and run the same command again: it resumes where it stopped"
    )
