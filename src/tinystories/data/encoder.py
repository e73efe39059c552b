"""Encode many stories at once: with gigatoken if it is known to produce the same ids, otherwise with `tokenizers`."""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import END, Tokenizer, sanitize

log = logging.getLogger(__name__)

# The concatenated ids of all stories, and the number of ids of each.
TokenIds = npt.NDArray[np.uint32] | npt.NDArray[np.uint16]
EncodedBatch = tuple[TokenIds, npt.NDArray[np.int64]]
EncodeFn = Callable[[Sequence[bytes]], EncodedBatch]

STORIES_PER_CALL = 1024  # stories per call of `tokenizers`, whose results take 100 bytes per token
PIECE_BYTES = 1 << 20  # longer stories are encoded in pieces: `tokenizers` takes 140 bytes of memory per byte of a text
EXAMPLE_BYTES = 1 << 16  # of a long story on which both libraries are compared

# After a word and before white space. No token of GPT-2's pre-tokenizer continues from a character that is not white
# space to one that is, and none depends on what precedes it: text cut here is encoded as in one piece. The negative
# lookbehinds are the non-ASCII white space in UTF-8.
WORD_END = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)"
    rb"(?<!\xe3\x80\x80)(?=[ \n])"
)

# Stories with characters outside these blocks are encoded by `tokenizers`. gigatoken splits words by Unicode 17,
# tiktoken and `tokenizers` by Unicode 16, so they disagree on letters and digits that are new in 17. Within these
# blocks all three agree on every character.
UNICODE_17 = re.compile(
    "[^\0-\u052f\u2000-\u2bff\u3000-\u9fff\uac00-\ud7a3\ufe00-\ufe0f\uff00-\uffef\U0001f000-\U0001faff]"
)

# Texts on which both libraries must agree before gigatoken is used: special tokens, white space, Unicode, long runs.
PROBES = (
    f"a {END} b{END}",
    "don't  I'LL 'tis   \n\n \t x\r\ny\x00z \x1c\x85\xa0\u2028\u3000 end \n",
    "naïve café Ⅷ ½ ² ١٢٣ 你好，世界 \U0001f600\u200d\U0001f525 e\u0301 \ufffd\ufeff\U0010ffff",
    "zz" * 40 + " " * 30 + "\n" * 9 + "0123456789" * 3 + "!?" * 20,
)


def make_bulk_encoder(tokenizer: Tokenizer, examples: Sequence[bytes]) -> EncodeFn:
    """Return a function that encodes UTF-8 stories on all cores to (concatenated ids, number of ids per story).

    This is the only place that chooses the fast library: only for byte-level BPE with GPT-2's pre-tokenizer, and only
    if gigatoken and `tokenizers` produce identical ids for PROBES and `examples`.
    """
    fast = make_gigatoken_encoder(tokenizer)
    max_id = tokenizer.vocab_size - 1
    if isinstance(fast, str):
        log.info("tokenizing with `tokenizers`, which is slower: %s", fast)
        exact = make_tokenizers_encoder(tokenizer)
        return (lambda stories: encode_in_pieces(stories, exact, max_id)) if has_gpt2_words(tokenizer) else exact
    exact = make_tokenizers_encoder(tokenizer)
    starts = [next(split_at_words(text, EXAMPLE_BYTES, 2 * EXAMPLE_BYTES), b"") for text in examples]
    texts = [text for text in (*(probe.encode() for probe in PROBES), *starts) if is_unambiguous(text)]
    (ids, counts), (exact_ids, exact_counts) = fast(texts), exact(texts)
    if not (np.array_equal(ids, exact_ids) and np.array_equal(counts, exact_counts)):
        log.warning(
            "tokenizing with `tokenizers`, which is slower: gigatoken produces different ids for this tokenizer"
        )
        return lambda stories: encode_in_pieces(stories, exact, max_id)
    log.info("tokenizing with gigatoken")
    return lambda stories: encode_in_pieces(stories, lambda pieces: encode_mixed(pieces, fast, exact), max_id)


def encode_in_pieces(stories: Sequence[bytes], encode: EncodeFn, max_id: int) -> EncodedBatch:
    """Encode with `encode`, long stories in pieces; the result is the same if the tokenizer `has_gpt2_words`.

    `max_id` is the largest id of the tokenizer: with long stories, ids that fit into two bytes are returned as uint16.
    """
    if max(map(len, stories), default=0) <= PIECE_BYTES:
        return encode(stories)
    # A byte-level token is at least one byte long; the rest of the array is never written and takes no memory.
    max_ids = sum(map(len, stories))
    ids: TokenIds = np.empty(max_ids, np.uint16) if max_id < 1 << 16 else np.empty(max_ids, np.uint32)
    counts: list[int] = []
    n_ids = 0

    def append(part: Sequence[bytes]) -> None:
        nonlocal n_ids
        part_ids, part_counts = encode(part)
        assert part_ids.size == 0 or int(part_ids.max()) <= max_id
        ids[n_ids : n_ids + part_ids.size] = part_ids
        n_ids += part_ids.size
        counts.extend(part_counts.tolist())

    for is_long, group in itertools.groupby(stories, lambda story: len(story) > PIECE_BYTES):
        if not is_long:
            append(list(group))
            continue
        for story in group:
            n_before, first = n_ids, len(counts)
            for piece in split_at_words(story, PIECE_BYTES):
                append([piece])
            counts[first:] = [n_ids - n_before]
    return ids[:n_ids], np.array(counts, np.int64)


def split_at_words(text: bytes, size: int, max_size: int | None = None) -> Iterator[bytes]:
    """Yield the pieces of a UTF-8 text: each ends with the first word that reaches `size` bytes.

    If that word does not end within `max_size` bytes, the piece is cut there, after a character.
    """
    start = 0
    while len(text) - start > size:
        limit = len(text) if max_size is None else min(start + max_size, len(text))
        match = WORD_END.search(text, start + size, limit)
        end = match.start() if match else limit
        while end < len(text) and text[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def has_gpt2_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is byte-level with GPT-2's pre-tokenizer, so that texts may be cut at any `WORD_END`."""
    json_data = tokenizer.json_data
    return (
        tokenizer.is_lossless
        and json_data["pre_tokenizer"].get("use_regex", True)
        and all(token["special"] for token in json_data["added_tokens"])
    )


def is_unambiguous(story: bytes) -> bool:
    """Whether all Unicode versions in use split this UTF-8 story into the same words."""
    return story.isascii() or UNICODE_17.search(story.decode()) is None


def encode_mixed(stories: Sequence[bytes], fast: EncodeFn, exact: EncodeFn) -> EncodedBatch:
    """Encode unambiguous stories with `fast` and the others with `exact`; results are in the order of `stories`."""
    unambiguous = np.fromiter(map(is_unambiguous, stories), bool, len(stories))
    if unambiguous.all():
        return fast(stories)
    counts = np.empty(len(stories), np.int64)
    encoded = [
        fast(list(itertools.compress(stories, unambiguous))),
        exact(list(itertools.compress(stories, ~unambiguous))),
    ]
    counts[unambiguous], counts[~unambiguous] = encoded[0][1], encoded[1][1]
    ids = np.empty(counts.sum(), np.uint32)
    from_fast = np.repeat(unambiguous, counts)
    ids[from_fast], ids[~from_fast] = encoded[0][0], encoded[1][0]
    return ids, counts


def make_tokenizers_encoder(tokenizer: Tokenizer) -> EncodeFn:
    """Return an encoder based on `tokenizers`: the reference."""

    def encode(stories: Sequence[bytes]) -> EncodedBatch:
        ids = [np.empty(0, np.uint32)]
        counts: list[int] = []
        for start in range(0, len(stories), STORIES_PER_CALL):
            rows = tokenizer.encode_batch([story.decode() for story in stories[start : start + STORIES_PER_CALL]])
            counts.extend(map(len, rows))
            ids.extend(np.array(row, np.uint32) for row in rows)
        return np.concatenate(ids), np.array(counts, np.int64)

    return encode


def make_gigatoken_encoder(tokenizer: Tokenizer) -> EncodeFn | str:
    """Return an encoder based on gigatoken, or the reason (a string) why it cannot be used for this tokenizer."""
    json_data = tokenizer.json_data
    model = json_data["model"]
    is_plain_bpe = model.get("type") == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    if not all(token["special"] for token in json_data["added_tokens"]):
        return "the tokenizer has added tokens that match ordinary text"
    if not (is_plain_bpe and has_gpt2_words(tokenizer)):
        return "gigatoken is verified only for byte-level BPE with GPT-2's pre-tokenizer"
    try:
        import awkward  # type: ignore[import-untyped]
        import gigatoken
    except ImportError:
        return "gigatoken is not installed (pip install 'tinystories-gpt[train]')"
    # Without special tokens, so that one spelled out in a story is encoded as text. The ids of the model do not change.
    try:
        backend = gigatoken.Tokenizer.from_json(json.dumps({**json_data, "added_tokens": [], "post_processor": None}))
    except (RuntimeError, ValueError) as error:  # for instance, a vocabulary without some of the 256 bytes
        return f"gigatoken cannot read this tokenizer ({sanitize(error)})"

    def encode(stories: Sequence[bytes]) -> EncodedBatch:
        if not stories:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        rows = backend.encode_batch(list(stories))
        return np.asarray(awkward.flatten(rows)), np.asarray(awkward.num(rows))

    return encode
