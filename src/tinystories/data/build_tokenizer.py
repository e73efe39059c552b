"""Build a tokenizer: GPT-2's published vocabulary, a BPE trained on the stories, or a tokenizer.json."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tinystories.data.encoder import split_at_words
from tinystories.data.source.timeout import call_with_timeout
from tinystories.data.tokenizer import END, Tokenizer, char_to_byte
from tinystories.errors import UserError
from tinystories.progress import LOG_INTERVAL_SECONDS

T = TypeVar("T")
log = logging.getLogger(__name__)

GPT2_VOCAB_SIZES = (50257, 50304)  # exact, and padded to a multiple of 64 as in nanoGPT
FETCH_TIMEOUT_SECONDS = 25.0  # for downloading GPT-2's vocabulary; tiktoken itself has no timeout
# Text that BPE merges are learned from; more changes the merges little and costs minutes.
MAX_TRAINING_BYTES = 200_000_000
# Longer stories are given to the trainer in pieces, which take 200 bytes of memory per byte.
TRAINING_PIECE_BYTES = 1 << 16
# Longer words are cut: a merge moves the rest of its word, so training takes time quadratic in the longest one. Only
# runs such as lines of dashes or encoded data are longer.
MAX_WORD_CHARS = 1000


def build_from_spec(spec: str, stories: Callable[[], Iterable[str]]) -> Tokenizer:
    """Return the tokenizer for `spec`: `gpt2`, `bpe:N`, or the path of a tokenizer.json or model directory.

    `stories()` is called only for `bpe:N`, which trains on the first 200 MB of the text it yields.
    """
    if spec == "gpt2":
        return load_gpt2()
    if spec.startswith("bpe:"):
        return train_bpe(parse_bpe_size(spec), stories())
    return Tokenizer.load(Path(spec))


def fingerprint_spec(spec: str) -> str:
    """Return a string that identifies the tokenizer without building it. Raises `UserError` for an invalid spec."""
    if spec.startswith("bpe:"):
        return f"bpe:{parse_bpe_size(spec)}"
    return spec if spec == "gpt2" else Tokenizer.load(Path(spec)).sha256


def parse_bpe_size(spec: str) -> int:
    """Return N of `bpe:N`. Raises `UserError` unless 257 <= N <= 1,000,000."""
    digits = spec.removeprefix("bpe:").replace("_", "")
    if not digits.isascii() or not digits.isdigit() or not 257 <= int(digits) <= 1_000_000:
        raise UserError(f"tokenizer {spec}: N of bpe:N must be between 257 (256 bytes and {END}) and 1000000")
    return int(digits)


def new_byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "Any":
    """Return a `tokenizers` byte-level BPE with GPT-2's pre-tokenizer; without `vocab` and `merges` it is untrained."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def load_gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer, converted from the ranks that tiktoken downloads (and checks by hash).

    Raises `UserError` if tiktoken is missing or cannot fetch the file within FETCH_TIMEOUT_SECONDS.
    """
    try:
        from tiktoken_ext import openai_public  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("tokenizer gpt2 needs tiktoken: pip install 'tinystories-gpt[train]'") from None
    try:
        ranks: dict[bytes, int] = call_with_timeout(FETCH_TIMEOUT_SECONDS, openai_public.gpt2)["mergeable_ranks"]
    except Exception as error:  # from tiktoken, requests, a proxy or the disk
        raise UserError(
            f"tokenizer gpt2: tiktoken could not fetch its vocabulary ({type(error).__name__}); set TIKTOKEN_CACHE_DIR"
            " to a folder that contains it, or use --tokenizer bpe:4096 or the path of a tokenizer.json"
        ) from None
    byte_to_char = {b: c for c, b in char_to_byte().items()}
    token_text = {token: "".join(byte_to_char[b] for b in token) for token in ranks}
    # tiktoken publishes ranks only. A token's rank is also the order of its merge: sorting by rank restores the list.
    merge_pairs = (last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(token_text[left], token_text[right]) for left, right in merge_pairs]
    backend = new_byte_level_bpe({token_text[token]: rank for token, rank in ranks.items()}, merges)
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(), "gpt2")


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge produces `token`: apply BPE to its bytes, up to the final merge."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def train_bpe(size: int, stories: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE with `size` ids, the last of which is END. Deterministic: same stories, same tokenizer.

    Logs a warning if the stories contain too few distinct pairs to reach `size`.
    """
    from tokenizers import pre_tokenizers, trainers

    backend = new_byte_level_bpe({}, [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    pieces = split_stories(take_bytes(stories, MAX_TRAINING_BYTES), backend.pre_tokenizer)
    backend.train_from_iterator(log_progress(pieces, size), trainer)
    backend.add_special_tokens([END])
    tokenizer = Tokenizer(backend.to_str(), f"bpe:{size}")
    if tokenizer.vocab_size < size:
        log.warning("the stories yield only %d ids of the %d requested", tokenizer.vocab_size, size)
    return tokenizer


def take_bytes(stories: Iterable[str], limit: int) -> Iterator[str]:
    """Yield stories until their total length reaches `limit` (counted in characters)."""
    n_chars = 0
    for story in stories:
        yield story
        n_chars += len(story)
        if n_chars >= limit:
            return


def split_stories(stories: Iterable[str], pre_tokenizer: Any) -> Iterator[str]:
    """Yield stories for the trainer: long ones in pieces, words of more than MAX_WORD_CHARS in parts.

    The pieces have the same words as the stories, except for those parts and where 64 KB contain no end of a word.
    """
    for story in stories:
        if len(story) <= TRAINING_PIECE_BYTES:
            texts: Iterable[str] = (story,)
        else:
            pieces = split_at_words(story.encode(), TRAINING_PIECE_BYTES, 2 * TRAINING_PIECE_BYTES)
            texts = (piece.decode() for piece in pieces)
        for text in texts:
            yield from split_long_words(text, pre_tokenizer) if may_have_long_word(text) else (text,)


def may_have_long_word(text: str) -> bool:
    """Whether a word of a text may be longer than MAX_WORD_CHARS: it would fill one of these windows."""
    width = MAX_WORD_CHARS // 2
    return any(len(text[start : start + width].split(None, 1)) < 2 for start in range(0, len(text) - width + 1, width))


def split_long_words(text: str, pre_tokenizer: Any) -> Iterator[str]:
    """Yield the text if all its words (of the pre-tokenizer) are short, otherwise each word, long ones in parts."""
    words = [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]
    if max(map(len, words)) <= MAX_WORD_CHARS:
        yield text
        return
    for word in words:
        for start in range(0, len(word), MAX_WORD_CHARS):
            yield word[start : start + MAX_WORD_CHARS]


def log_progress(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the texts; log every few seconds how much has been read, and at the end that the merges are computed."""
    n_chars, logged_at = 0, time.monotonic()
    for text in texts:
        yield text
        n_chars += len(text)
        if time.monotonic() >= logged_at + LOG_INTERVAL_SECONDS:
            logged_at = time.monotonic()
            log.info("bpe:%d: %.0f MB of text read (at most %.0f)", size, n_chars / 1e6, MAX_TRAINING_BYTES / 1e6)
    log.info("training bpe:%d on %.1f MB of text", size, n_chars / 1e6)
