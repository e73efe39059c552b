"""Encode text to ids and decode ids to text with a `tokenizer.json`. Imports neither torch, tiktoken nor datasets."""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinystories.errors import UserError, one_line
from tinystories.files import read_limited

END = "<|endoftext|>"  # precedes every story and follows the last one
# How many times longer a normalizer, pre-tokenizer or decoder may make a text. Real tokenizers: 2 times.
MAX_EXPANSION = 1000
MAX_FILE_BYTES = 256_000_000  # size of a tokenizer.json
MAX_MESSAGE_LENGTH = 300  # characters
# How a SentencePiece .model (Protocol Buffers) starts: a piece, whose text is a control token such as <unk> or <pad>.
SENTENCEPIECE_START = re.compile(rb"\n.\n.<\w+>", re.DOTALL)


class Tokenizer:
    """A Hugging Face `tokenizer.json`, from `load` or `build_tokenizer`. `END` is always one of its special tokens.

    Encoding never produces a special token: `END` spelled out in a story is encoded as ordinary text.
    """

    def __init__(self, json_text: str, where: str = "tokenizer.json") -> None:
        """Parse `json_text`; `where` names it in errors.

        The text is kept verbatim, so `save` writes it unchanged (unless END had to be added). `json_data` is the parsed
        text. Raises `UserError` if it is not a usable tokenizer.
        """
        import tokenizers

        try:
            json_data = json.loads(json_text)
            expansions = {
                name: max_expansion(json_data.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")
            }
            # Checked before any text is encoded.
            if too_large := [name for name, times in expansions.items() if not times <= MAX_EXPANSION]:
                raise UserError(
                    f"{where}: its {too_large[0]} can make text more than {MAX_EXPANSION:,} times longer;"
                    " use another tokenizer"
                )
            self._backend = tokenizers.Tokenizer.from_str(json_text)
            for name in ("normalizer", "pre_tokenizer", "decoder"):  # optional in a file
                json_data.setdefault(name, None)
            json_data.setdefault("added_tokens", [])
        except UserError:
            raise
        except BaseException as error:  # the Rust library raises bare Exception; malformed JSON can cause others
            if not isinstance(error, Exception) and not is_rust_panic(error):
                raise
            raise UserError(f"{where} is not a Hugging Face tokenizer: {sanitize(error)}") from None
        special_tokens = (str(token) for token in self._backend.get_added_tokens_decoder().values() if token.special)
        if END not in special_tokens:
            self._backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
            json_text = self._backend.to_str()
            json_data = json.loads(json_text)
        self.where = where
        self.json_text = json_text
        self.json_data: dict[str, Any] = json_data
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.end_id: int = vocab[END]
        if self.end_id in self.encode(f"a {END} b"):
            raise UserError(f"{where}: its model encodes the text {END} as the special token; use another tokenizer")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Load a tokenizer.json, or the one in a directory. Raises `UserError` if it is missing or invalid."""
        file = find_tokenizer_file(Path(path))
        return cls(read_tokenizer_json(file), str(file))

    def save(self, path: Path | str) -> None:
        """Write to a file, or to `tokenizer.json` in an existing directory."""
        path = Path(path)
        (path / "tokenizer.json" if path.is_dir() else path).write_text(self.json_text, encoding="utf-8", newline="\n")

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the JSON with sorted keys and no spaces; identifies the tokenizer."""
        canonical = json.dumps(self.json_data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def is_stop_token(self, token: int) -> bool:
        """Whether this id ends a story: END, any other special token, or an id outside the vocabulary.

        Imported models may have several special tokens, and vocabularies padded to a round number.
        """
        return token >= self.vocab_size or token in self.special_ids

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(token["id"] for token in self.json_data["added_tokens"] if token["special"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without adding END or other special tokens."""
        with rust_panics(self.where):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; uses all cores."""
        with rust_panics(self.where):
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids. Special tokens are skipped; invalid UTF-8 becomes U+FFFD."""
        if self.is_lossless:
            return b"".join([self.token_bytes[i] for i in ids]).decode("utf-8", "replace")
        with rust_panics(self.where):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def is_lossless(self) -> bool:
        """Whether decode(encode(text)) == text for every text, as with byte-level BPE without a normalizer."""
        json_data, model = self.json_data, self.json_data["model"]
        alphabet = set(char_to_byte())
        stripping = [t for t in json_data["added_tokens"] if not t["special"] and (t.get("lstrip") or t.get("rstrip"))]
        return (
            model.get("type", "BPE") in ("BPE", "Unigram")  # the others have no token for an unknown word
            and not (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix") or stripping)
            and (json_data["decoder"] or {}).get("type") == "ByteLevel"
            and json_data["normalizer"] is None
            and (json_data["pre_tokenizer"] or {}).get("type") == "ByteLevel"
            and not json_data["pre_tokenizer"]["add_prefix_space"]
            and alphabet <= set(self._backend.get_vocab(with_added_tokens=False))
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of each id, a list of length `vocab_size`; empty for special tokens and unused ids.

        Exact for byte-level BPE. The output of other decoders can depend on the position of a token in the text (they
        drop a leading space, or fuse bytes); for these, the entry is what the token adds after another word.
        """
        added = {t["id"]: t for t in self.json_data["added_tokens"]}
        decoder = json.dumps(self.json_data["decoder"])
        table = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                table[i] = b"" if added[i]["special"] else token.encode()
            elif '"ByteLevel"' in decoder:
                table[i] = bytes([char_to_byte()[c] for c in token if c in char_to_byte()])
            else:
                table[i] = self._decode_token_bytes(token, i, decoder)
        return table

    @functools.cached_property
    def name_ids(self) -> frozenset[int]:
        """Ids that begin a word with a capital letter or, without a space before them, continue a word.

        Names are made of them. Scripts without capital letters have none.
        """
        ids = []
        for i, data in enumerate(self.token_bytes):
            text = data.decode(errors="ignore")
            first = text.removeprefix(" ")[:1]
            if first.isupper() or (first.islower() and not text.startswith(" ")):
                ids.append(i)
        return frozenset(ids)

    def _decode_token_bytes(self, token: str, i: int, decoder: str) -> bytes:
        """Return the bytes of a token that is not byte-level: `decoder` is the JSON of the decoder."""
        if '"ByteFallback"' in decoder and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in decoder:  # the sentencepiece space
            return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        # Any other decoder: decode the token twice, and take what the second one adds.
        single, doubled = self._backend.decode([i]), self._backend.decode([i, i])
        return doubled[len(single) :].encode() if doubled.startswith(single) else single.encode()


def find_tokenizer_file(path: Path) -> Path:
    """Return the path of the tokenizer.json in a directory, and any other path as it is."""
    return path / "tokenizer.json" if path.is_dir() else path


def read_tokenizer_json(path: Path) -> str:
    """Return the text of a tokenizer.json, or of the one in a directory, unchanged.

    `UserError` if it is missing or cannot be read; whether it is a tokenizer is not checked.
    """
    file = find_tokenizer_file(path)
    try:
        data = read_limited(file, MAX_FILE_BYTES)
        check_not_sentencepiece(file, data)
        return data.decode()
    except FileNotFoundError:
        check_not_sentencepiece(file.with_name("tokenizer.model"))
        raise UserError(f"tokenizer {file} does not exist; pass a tokenizer.json, gpt2 or bpe:4096") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {file} cannot be read: {sanitize(error)}") from None


def check_not_sentencepiece(file: Path, data: bytes = b"") -> None:
    """Raise `UserError`, with what to do, if a file that exists is SentencePiece's own, by its name or contents."""
    if file.is_file() and (file.suffix == ".model" or SENTENCEPIECE_START.match(data)):
        folder = str(file.parent)
        raise UserError(
            f"{file} is SentencePiece's own format, which is not supported; make a tokenizer.json with transformers:"
            f" AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
        )


def max_expansion(part: Any) -> float:
    """Return an upper bound on how many times longer a normalizer, pre-tokenizer or decoder (JSON) makes a text."""
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    children = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if isinstance(children, list):
        return math.prod(max_expansion(child) for child in children)  # a Sequence applies them one after the other
    if kind == "Replace":
        content, pattern = str(part.get("content", "")), part.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(1.0, len(content) / len(literal))
        return 1.0 + len(content)  # a regex may match the empty string between any two characters
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend", "")))
    # Precompiled is an opaque table that may contain anything; 32 is an assumed bound.
    return {"ByteLevel": 2.0, "Precompiled": 32.0}.get(str(kind), 1.0)


@functools.cache
def char_to_byte() -> dict[str, int]:
    """Return the inverse of GPT-2's byte-to-character table (`bytes_to_unicode` in openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in printable}
    unprintable = [b for b in range(256) if b not in set(printable)]
    table.update({chr(256 + n): b for n, b in enumerate(unprintable)})
    return table


def is_rust_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a Rust library, which is a bug of it that a hostile file can reach."""
    return type(error).__name__ == "PanicException"  # pyo3 has no importable name for it; not a subclass of Exception


@contextlib.contextmanager
def rust_panics(where: str) -> Iterator[None]:
    """Raise `UserError` for a panic of the tokenizers library inside the block; `where` names the tokenizer's file."""
    try:
        yield
    except BaseException as error:
        if not is_rust_panic(error):
            raise
        raise UserError(f"{where} is not a valid tokenizer: {sanitize(error)}; use another tokenizer") from None


def sanitize(error: object) -> str:
    """Return a foreign error message, which may quote file contents, as one short line without control characters."""
    text = one_line(error)
    return text if len(text) <= MAX_MESSAGE_LENGTH else text[: MAX_MESSAGE_LENGTH - 3] + "..."
