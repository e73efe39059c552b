"""`tinystories prepare`: tokenize stories from any source to files that training memory-maps."""

import dataclasses
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data import build_tokenizer
from tinystories.data.dataset import FORMAT_VERSION, SPLITS, DatasetMeta, SplitMeta
from tinystories.data.dedup import Assignment, Role, SplitAssigner, hash_stories, is_held_out
from tinystories.data.encoder import PIECE_BYTES, EncodeFn, TokenIds, make_bulk_encoder, split_at_words
from tinystories.data.source.reader import DecodeErrors, ReadOptions, StoryBatch
from tinystories.data.source.resolve import Source, SourceNames, resolve_source
from tinystories.data.spec import PrepareSpec, disk_error_message, existing_output
from tinystories.data.staging import StagingDir
from tinystories.data.text_loss import TextLoss, describe_loss
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.files import require_name, sha256, write_atomic, write_errors
from tinystories.progress import ByteDisplay

log = logging.getLogger(__name__)

N_EXAMPLES = 200  # stories on which the fast encoder must agree with `tokenizers` before it is used


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    """Result of a call of `prepare`."""

    out: Path
    meta: DatasetMeta
    up_to_date: bool  # whether there was nothing to do
    seconds: float
    mb_per_s: float  # MB (10^6 bytes) of source text per second, end to end; 0 if up to date


def prepare(
    source: SourceNames,
    out: Path | str,
    *,
    val: SourceNames | None = None,
    tokenizer: str = "gpt2",
    text_field: str = "text",
    errors: DecodeErrors = "strict",
    keep_duplicates: bool = False,
    val_fraction: float | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Tokenize `source` into the folder `out` (format: see `dataset.open_split`).

    The validation set is `val`, else the source's own validation split, else a fraction `val_fraction` of the stories
    (default 0.5 %; 10 % for the small `sample`). No story is in both splits, even with `keep_duplicates`. A validation
    set that was not held out is kept unchanged.

    A second run with nothing changed does nothing. A run after an interruption resumes from the staging directory
    `OUT.draft`. `out` is created atomically; if it is a symbolic link, the folder that it points to is. Memory use is
    constant except for 16 bytes per story and a few times the longest story.
    Raises `UserError` for unusable input or output, and if the disk is full.
    """
    started_at = time.monotonic()
    out = Path(out)
    spec = PrepareSpec(
        source=resolve_source(source),
        val=resolve_source(val) if val is not None else None,
        tokenizer=tokenizer,
        options=ReadOptions(text_field, errors),
        keep_duplicates=keep_duplicates,
        val_fraction=val_fraction,
    )
    with write_errors(f"--out {out}"):  # a name that is too long, a folder that may not be read
        meta = existing_output(out, spec)
    if meta is not None:
        return PrepareReport(out=out, meta=meta, up_to_date=True, seconds=time.monotonic() - started_at, mb_per_s=0.0)
    require_name(out)
    # A link stays: what it points to is written, with the staging directory on the same disk.
    target = Path(os.path.realpath(out)) if out.is_symlink() else out
    staging_path = target.with_name(target.name + ".draft")
    try:
        with StagingDir(staging_path, spec.to_json_dict()) as staging:
            if meta := existing_output(out, spec):  # of another prepare that ended in the meantime
                return PrepareReport(
                    out=out, meta=meta, up_to_date=True, seconds=time.monotonic() - started_at, mb_per_s=0.0
                )
            bytes_before = staging.journal.read
            job = PrepareJob(spec, staging)
            job.read_all(progress)
            meta = job.finalize()
            staging.publish(target)
    except OSError as error:
        raise UserError(disk_error_message(error, staging_path, spec)) from None
    seconds = time.monotonic() - started_at
    rate = (staging.journal.read - bytes_before) / seconds / 1e6
    return PrepareReport(out=out, meta=meta, up_to_date=False, seconds=seconds, mb_per_s=rate)


class PrepareJob:
    """One run of `prepare`: reads, deduplicates, splits and encodes stories and appends them to the staging files."""

    def __init__(self, spec: PrepareSpec, staging: StagingDir) -> None:
        self.spec, self.staging = spec, staging
        self.stages = self._plan_stages()
        self.assigner = SplitAssigner(keep_duplicates=spec.keep_duplicates, val_fraction=spec.resolved_val_fraction)
        for split, hash_set in self.assigner.hash_sets.items():
            hash_set.add(np.frombuffer(staging.read_digests(split), "<u8").reshape(-1, 2))
        self.tokenizer = self._load_or_build_tokenizer()
        self.example = ""  # of text that the tokenizer cannot give back
        self.dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def _plan_stages(self) -> list[tuple[Source, Role]]:
        """Return the sources to read, in order, pinned to the commits recorded in the journal if there are any.

        Validation comes first: training stories that it contains are dropped.
        """
        pinned_revisions = iter(self.staging.journal.revisions)
        source = self.spec.source.pin_revision(next(pinned_revisions, ""))
        val = self.spec.val.pin_revision(next(pinned_revisions, "")) if self.spec.val else source
        self.staging.journal.revisions = [source.revision, val.revision]
        val_source = val.get_validation_split() or (val if self.spec.val else None)
        return [(val_source, "val"), (source, "train")] if val_source else [(source, "both")]

    def _load_or_build_tokenizer(self) -> Tokenizer:
        """Load the tokenizer from the staging directory, or build it and save it there."""
        path = self.staging.data_dir / "tokenizer.json"
        if path.exists():
            return Tokenizer.load(path)
        tokenizer = build_tokenizer.build_from_spec(self.spec.tokenizer, self._iter_train_stories)
        self.staging.write_tokenizer(tokenizer.json_text)
        return tokenizer

    def _iter_train_stories(self) -> Iterator[str]:
        """Yield the stories to train a tokenizer on, leaving out the held-out ones; long ones in pieces."""
        source, role = self.stages[-1]
        for batch in source.read_batches(self.spec.options):
            val_fraction = self.spec.resolved_val_fraction if role == "both" else 0.0
            is_val = is_held_out(hash_stories(batch.stories), val_fraction)
            for story in itertools.compress(batch.stories, ~is_val):
                yield from (piece.decode() for piece in split_at_words(story, PIECE_BYTES))

    def read_all(self, progress: bool) -> None:
        """Process the remaining stages. A thread encodes and writes a batch while the next is read and deduplicated."""
        journal = self.staging.journal
        total_bytes = sum(source.total_bytes for source, _ in self.stages)
        encode: EncodeFn | None = None
        with ByteDisplay(total_bytes, journal.read, quiet=not progress) as display, ThreadPoolExecutor(1) as writer:
            pending_write: Future[None] | None = None
            for stage, (source, role) in enumerate(self.stages[journal.stage :], journal.stage):
                position = journal.position if stage == journal.stage else None
                for batch in source.read_batches(self.spec.options, position):
                    assignment = self.assigner.assign(role, batch.stories)
                    encode = encode or make_bulk_encoder(self.tokenizer, batch.stories[:N_EXAMPLES])
                    if pending_write:
                        pending_write.result()
                    pending_write = writer.submit(self.write_batch, encode, stage, batch, assignment)
                    display.advance(batch.bytes_read)
            if pending_write:
                pending_write.result()

    def write_batch(self, encode: EncodeFn, stage: int, batch: StoryBatch, assignment: Assignment) -> None:
        """Encode and append a batch, then advance the journal past it."""
        journal = self.staging.journal
        for split, stories in assignment.stories.items():
            self._append_stories(split, stories, encode)
            self.staging.append(f"{split}.digests", assignment.digests[split].tobytes())
        journal.stage, journal.position = stage, batch.position
        journal.read += batch.bytes_read
        counts = Counter(journal.counts) + assignment.dropped + Counter(empty=batch.n_empty)
        journal.counts = dict(counts)
        self.staging.save()

    def _append_stories(self, split: str, stories: list[bytes], encode: EncodeFn) -> None:
        """Encode the stories and append them to the split's .bin and .idx (layout: `dataset.open_split`)."""
        # `ids` are the stories s1 s2 ... sN back to back; the .bin gets END s1 END s2 ... END sN, and `finalize` adds
        # the last END.
        ids, counts = encode(stories)
        if split == "val" and not self.tokenizer.is_lossless:
            self._measure_loss(stories, ids, counts)
        assert ids.size == 0 or int(ids.max()) < self.tokenizer.vocab_size
        # Exclusive prefix sums: where each story starts in `ids`, which is where np.insert puts its END.
        text_bytes = self.staging.journal.text_bytes
        story_starts = np.cumsum(counts) - counts
        byte_lengths = np.fromiter(map(len, stories), np.int64, len(stories))
        index = np.empty((len(stories), 2), "<u8")
        # Position of the END before story i in the whole .bin: the ids written earlier, the tokens of the i stories of
        # this batch before it, and their i ENDs.
        index[:, 0] = self._count_tokens(split) + story_starts + np.arange(len(stories))
        # UTF-8 bytes of all stories before story i: those written earlier, and an exclusive prefix sum again.
        index[:, 1] = text_bytes.setdefault(split, 0) + np.cumsum(byte_lengths) - byte_lengths
        tokens = np.insert(ids.astype(self.dtype, copy=False), story_starts, self.tokenizer.end_id)
        del ids  # of a long story, they may take more memory than the story itself
        self.staging.append(f"data/{split}.bin", tokens.view(np.uint8).data)
        self.staging.append(f"data/{split}.idx", index.tobytes())
        text_bytes[split] += int(byte_lengths.sum())

    def _measure_loss(self, stories: list[bytes], ids: TokenIds, counts: npt.NDArray[np.int64]) -> None:
        """Add to the journal how much of these stories the tokenizer cannot give back."""
        loss = TextLoss()
        loss.add(self.tokenizer, [story.decode() for story in stories], np.split(ids, np.cumsum(counts)[:-1]))
        self.example = self.example or loss.example
        journal = self.staging.journal
        totals = Counter(val_chars=loss.n_chars, val_chars_lost=loss.n_lost)
        journal.counts = dict(Counter(journal.counts) + totals)

    def _count_tokens(self, split: str) -> int:
        """Return the number of ids (including END) written to the split so far."""
        return self.staging.journal.sizes.get(f"data/{split}.bin", 0) // self.dtype.itemsize

    def finalize(self) -> DatasetMeta:
        """Append the final END and index row to both splits, and write and return meta.json."""
        splits = {}
        for split in SPLITS:
            n_stories = self.staging.journal.sizes.get(f"data/{split}.idx", 0) // 16  # an index row is two uint64
            n_bytes = self.staging.journal.text_bytes.get(split, 0)
            final_entry = np.array([self._count_tokens(split), n_bytes], "<u8")
            self.staging.append(f"data/{split}.idx", final_entry.tobytes())
            self.staging.append(f"data/{split}.bin", np.array([self.tokenizer.end_id], self.dtype).tobytes())
            digest = sha256(self.staging.data_dir / f"{split}.bin")
            splits[split] = SplitMeta(stories=n_stories, tokens=self._count_tokens(split), bytes=n_bytes, sha256=digest)
        if splits["train"].stories == 0:
            raise UserError(f"{self.spec.source.name}: no stories left to train on; pass a file that contains more")
        if splits["val"].stories == 0 and len(self.stages) == 2:
            raise UserError(f"{self.stages[0][0].name}: no stories to validate on; pass a file that contains some")
        if splits["val"].stories == 0:
            log.warning("no stories were held out for validation; pass --val SOURCE")
        counts: dict[str, Any] = self.staging.journal.counts  # Any: the type of keyword arguments
        loss = TextLoss(counts.get("val_chars", 0), counts.get("val_chars_lost", 0), self.example)
        if loss.share:
            log.warning(
                "bits per byte are %s%s",
                describe_loss(loss.share),
                f" ({loss.example})" if loss.example else "",
            )
        meta = DatasetMeta(
            format=FORMAT_VERSION,
            **self.spec.to_meta_fields(),
            revision=self.staging.journal.revisions[0],
            val_revision=self.staging.journal.revisions[1],
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            end_id=self.tokenizer.end_id,
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            splits=splits,
            **{reason: counts.get(reason, 0) for reason in ("duplicates", "also_in_val", "empty")},
            lost_text=loss.share,
        )
        values = dataclasses.asdict(meta)
        if not meta.lost_text:
            del values["lost_text"]  # earlier versions, which do not know it, can read all other data
        text = json.dumps(values, indent=1, ensure_ascii=False)
        # A file name that is not UTF-8 has lone surrogates, which become \udcXX: also their escapes in JSON.
        write_atomic(self.staging.data_dir / "meta.json", f"{text}\n".encode("utf-8", "backslashreplace"))
        return meta
