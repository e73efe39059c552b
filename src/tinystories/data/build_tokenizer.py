"""Where tokenizers come from: GPT-2's published table, one trained on the stories, or a file."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tinystories.data.timeout import call_with_timeout
from tinystories.data.tokenizer import END, Tokenizer, char_to_byte
from tinystories.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

FETCH_TIMEOUT_SECONDS = 25.0  # for GPT-2's table; tiktoken itself would wait for ever
MAX_TRAINING_BYTES = 200_000_000  # of text are enough to learn merges from; more changes little and costs minutes


def build_from_spec(spec: str, stories: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer named by `gpt2`, `bpe:N` or the path of a tokenizer.json.

    `stories()` yields the text that `bpe:N` learns from (its first 200 MB); it is called only then.
    """
    if spec == "gpt2":
        return load_gpt2()
    if spec.startswith("bpe:"):
        return train_bpe(parse_bpe_size(spec), stories())
    return Tokenizer.load(Path(spec))


def fingerprint_spec(spec: str) -> str:
    """What identifies the tokenizer of that name before it is built; `UserError` when the name is none."""
    if spec.startswith("bpe:"):
        return f"bpe:{parse_bpe_size(spec)}"
    return spec if spec == "gpt2" else Tokenizer.load(Path(spec)).sha256


def parse_bpe_size(spec: str) -> int:
    """N of `bpe:N`."""
    digits = spec.removeprefix("bpe:").replace("_", "")
    if not digits.isascii() or not digits.isdigit() or not 257 <= int(digits) <= 1_000_000:
        raise UserError(f"tokenizer {spec}: N of bpe:N must be between 257 (256 bytes and {END}) and 1000000")
    return int(digits)


def new_byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "Any":
    """An untrained or ready byte-level BPE with GPT-2's split into words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def load_gpt2() -> Tokenizer:
    """GPT-2's tokenizer from tiktoken's own table, whose hashes tiktoken checks."""
    try:
        from tiktoken_ext import openai_public  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("tokenizer gpt2 needs tiktoken: pip install 'tinystories-gpt[train]'") from None
    try:
        ranks: dict[bytes, int] = call_with_timeout(FETCH_TIMEOUT_SECONDS, openai_public.gpt2)["mergeable_ranks"]
    except Exception as error:  # of tiktoken, requests, a proxy or the disk
        raise UserError(
            f"tokenizer gpt2: tiktoken could not fetch its table ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a"
            " folder that has it, or use --tokenizer bpe:4096 or the path of a tokenizer.json"
        ) from None
    byte_to_char = {b: c for c, b in char_to_byte().items()}
    token_text = {token: "".join(byte_to_char[b] for b in token) for token in ranks}
    merge_pairs = (last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(token_text[left], token_text[right]) for left, right in merge_pairs]
    backend = new_byte_level_bpe({token_text[token]: rank for token, rank in ranks.items()}, merges)
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(), "gpt2")


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes this one: what BPE leaves of it before its own, last merge."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def train_bpe(size: int, stories: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of `size` ids with END the last; the same stories give the same tokenizer."""
    from tokenizers import pre_tokenizers, trainers

    backend = new_byte_level_bpe({}, [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(take_bytes(stories, MAX_TRAINING_BYTES), trainer)
    backend.add_special_tokens([END])
    tokenizer = Tokenizer(backend.to_str(), f"bpe:{size}")
    if tokenizer.vocab_size < size:
        log.warning("the stories yield only %d ids of the %d asked for", tokenizer.vocab_size, size)
    return tokenizer


def take_bytes(stories: Iterable[str], limit: int) -> Iterator[str]:
    """The first stories, until `limit` bytes (counted in characters) are reached."""
    n_chars = 0
    for story in stories:
        yield story
        n_chars += len(story)
        if n_chars >= limit:
            return
