"""`tinystories prepare`: stories of any source to token files that training maps into memory."""

import dataclasses
import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tinystories.data import vocabulary
from tinystories.data.draft import Draft, write_json, write_whole
from tinystories.data.duplicates import Role, Sorted, Sorter, digests_of, held_out
from tinystories.data.encoder import Encode, bulk_encoder
from tinystories.data.meter import meter
from tinystories.data.prepared import FORMAT, SPLITS, Meta, SplitMeta
from tinystories.data.reader import Batch, Errors, ReadOptions
from tinystories.data.request import Request, finished, refused
from tinystories.data.sources import Names, Source, resolve
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError

log = logging.getLogger(__name__)

EXAMPLES = 200  # stories on which a fast encoder must agree before it is trusted


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    """What a call of `prepare` did."""

    out: Path
    meta: Meta
    up_to_date: bool  # there was nothing to do
    seconds: float
    mb_per_s: float  # 10^6 bytes of source read per second, all work included; 0 when up to date


def prepare(
    source: Names,
    out: Path | str,
    *,
    val: Names | None = None,
    tokenizer: str = "gpt2",
    text_field: str = "text",
    errors: Errors = "strict",
    keep_duplicates: bool = False,
    val_fraction: float | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Tokenise `source` into the folder `out` (format: `prepared.open_split`).

    Validation is `val`, else the source's own validation split, else `val_fraction` of the stories (0.5 %; of the small
    `sample` 10 %). No story stands in both splits, whatever `keep_duplicates` says; a validation set is kept as it is.

    A second run with nothing changed does nothing; a run after an interrupted one goes on from its draft, the folder
    `OUT.draft`. `out` appears whole or not at all. Memory is constant but for 16 bytes per story.
    """
    began = time.monotonic()
    out = Path(out)
    request = Request(
        source=resolve(source),
        val=resolve(val) if val is not None else None,
        tokenizer=tokenizer,
        options=ReadOptions(text_field, errors),
        keep_duplicates=keep_duplicates,
        val_fraction=val_fraction,
    )
    if meta := finished(out, request):
        return PrepareReport(out=out, meta=meta, up_to_date=True, seconds=time.monotonic() - began, mb_per_s=0.0)
    draft_folder = out.with_name(out.name + ".draft")
    try:
        with Draft(draft_folder, request.as_json()) as draft:
            before = draft.journal.read
            run = Run(request, draft)
            run.read_all(progress)
            meta = run.finish()
            draft.publish(out)
    except OSError as error:
        raise UserError(refused(error, draft_folder, request)) from None
    seconds = time.monotonic() - began
    rate = (draft.journal.read - before) / seconds / 1e6
    return PrepareReport(out=out, meta=meta, up_to_date=False, seconds=seconds, mb_per_s=rate)


class Run:
    """One preparation: reads the sources, sorts, encodes and appends to the draft."""

    def __init__(self, request: Request, draft: Draft) -> None:
        self.request, self.draft = request, draft
        self.stages = self._stages()
        self.sorter = Sorter(keep_duplicates=request.keep_duplicates, val_fraction=request.held_out)
        for split, seen in self.sorter.seen.items():
            seen.add(np.frombuffer(draft.digests(split), "<u8").reshape(-1, 2))
        self.tokenizer = self._tokenizer()
        self.dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    def _stages(self) -> list[tuple[Source, Role]]:
        """The sources to read, in order, each at the commit that the draft began with."""
        known = iter(self.draft.journal.revisions)
        source = self.request.source.pinned(next(known, ""))
        val = self.request.val.pinned(next(known, "")) if self.request.val else source
        self.draft.journal.revisions = [source.revision, val.revision]
        own = val.validation() or (val if self.request.val else None)
        return [(own, "val"), (source, "train")] if own else [(source, "both")]

    def _tokenizer(self) -> Tokenizer:
        """The draft's; built now if it has none yet."""
        file = self.draft.data / "tokenizer.json"
        if file.exists():
            return Tokenizer.load(file)
        tokenizer = vocabulary.build(self.request.tokenizer, self._train_stories)
        write_whole(file, tokenizer.text)
        return tokenizer

    def _train_stories(self) -> Iterator[str]:
        source, role = self.stages[-1]
        for batch in source.batches(self.request.options):
            val = held_out(digests_of(batch.stories), self.request.held_out if role == "both" else 0.0)
            yield from (story.decode() for story in itertools.compress(batch.stories, ~val))

    def read_all(self, progress: bool) -> None:
        """Read the stages to their ends; a batch is encoded and written while the next one is read and sorted."""
        journal = self.draft.journal
        total = sum(source.bytes_total for source, _ in self.stages)
        encode: Encode | None = None
        with meter(total, journal.read, show=progress) as shown, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for stage, (source, role) in enumerate(self.stages[journal.stage :], journal.stage):
                for batch in source.batches(self.request.options, journal.position if stage == journal.stage else None):
                    chosen = self.sorter.sort(role, batch.stories)
                    encode = encode or bulk_encoder(self.tokenizer, batch.stories[:EXAMPLES])
                    if written:
                        written.result()
                    written = writer.submit(self.write, encode, stage, batch, chosen)
                    shown.advance(batch.read)
            if written:
                written.result()

    def write(self, encode: Encode, stage: int, batch: Batch, chosen: Sorted) -> None:
        """Encode and append a batch, then move the journal behind it."""
        journal = self.draft.journal
        for split, stories in chosen.stories.items():
            self._append(split, stories, encode)
            self.draft.append(f"{split}.digests", chosen.digests[split].tobytes())
        journal.stage, journal.position = stage, batch.position
        journal.read += batch.read
        counts = Counter(journal.counts) + chosen.dropped + Counter(empty=batch.empty)
        journal.counts = dict(counts)
        self.draft.save()

    def _append(self, split: str, stories: list[bytes], encode: Encode) -> None:
        ids, counts = encode(stories)
        assert ids.size == 0 or int(ids.max()) < self.tokenizer.vocab_size
        ends = np.cumsum(counts) - counts  # where each story begins in ids: an END goes before it
        lengths = np.fromiter(map(len, stories), np.int64, len(stories))
        index = np.empty((len(stories), 2), "<u8")
        index[:, 0] = self._size(split) + ends + np.arange(len(stories))
        index[:, 1] = self.draft.journal.text_bytes.get(split, 0) + np.cumsum(lengths) - lengths
        self.draft.append(f"data/{split}.bin", np.insert(ids.astype(self.dtype), ends, self.tokenizer.end_id).tobytes())
        self.draft.append(f"data/{split}.idx", index.tobytes())
        self.draft.journal.text_bytes[split] = self.draft.journal.text_bytes.get(split, 0) + int(lengths.sum())

    def _size(self, split: str) -> int:
        """Ids written so far."""
        return self.draft.journal.sizes.get(f"data/{split}.bin", 0) // self.dtype.itemsize

    def finish(self) -> Meta:
        """Close both splits with their last END and describe them in meta.json."""
        splits = {}
        for split in SPLITS:
            rows = self.draft.journal.sizes.get(f"data/{split}.idx", 0) // 16
            size = self.draft.journal.text_bytes.get(split, 0)
            last = np.array([self._size(split), size], "<u8")
            self.draft.append(f"data/{split}.idx", last.tobytes())
            self.draft.append(f"data/{split}.bin", np.array([self.tokenizer.end_id], self.dtype).tobytes())
            with (self.draft.data / f"{split}.bin").open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            splits[split] = SplitMeta(stories=rows, tokens=self._size(split), bytes=size, sha256=sha256)
        if splits["train"].stories == 0:
            raise UserError(f"{self.request.source.name}: no story to train on is left of it; give a file with stories")
        if splits["val"].stories == 0 and len(self.stages) == 2:
            raise UserError(f"{self.stages[0][0].name}: no story to validate on; give a file with stories")
        if splits["val"].stories == 0:
            log.warning("no story was held out for validation; give one by --val")
        counts = self.draft.journal.counts
        meta = Meta(
            format=FORMAT,
            **self.request.described(),
            revision=self.draft.journal.revisions[0],
            val_revision=self.draft.journal.revisions[1],
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            end_id=self.tokenizer.end_id,
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            splits=splits,
            duplicates=counts.get("duplicates", 0),
            also_in_val=counts.get("also_in_val", 0),
            empty=counts.get("empty", 0),
        )
        write_json(self.draft.data / "meta.json", dataclasses.asdict(meta))
        return meta
