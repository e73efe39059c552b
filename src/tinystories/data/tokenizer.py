"""Text <-> ids by a `tokenizer.json`. Needs neither torch, tiktoken nor datasets; generating imports this."""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinystories.errors import UserError, read_limited

END = "<|endoftext|>"  # stands before every story and after the last
MAX_EXPANSION = 1000  # times that a text may become longer before it is split, or after its pieces are joined; real: 2
MAX_FILE_BYTES = 256_000_000  # bytes of a file
MAX_MESSAGE_LENGTH = 300  # characters


class Tokenizer:
    """A `tokenizer.json`, made by `load` or by `vocabulary.build`; `END` is always one of its special tokens.

    Text never yields a special token: `END` written in a story is encoded as ordinary text.
    """

    def __init__(self, json_text: str, where: str = "tokenizer.json") -> None:
        """`text` is the JSON; `where` names it in errors. It is kept word for word, so `save` copies it unchanged.

        `parts` is the same, parsed.
        """
        import tokenizers

        try:
            json_data = json.loads(json_text)
            expansions = {
                name: max_expansion(json_data.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")
            }
            if too_large := [
                name for name, times in expansions.items() if not times <= MAX_EXPANSION
            ]:  # before a text is read
                raise UserError(f"{where}: its {too_large[0]} makes texts over {MAX_EXPANSION:,} times longer")
            self._backend = tokenizers.Tokenizer.from_str(json_text)
        except UserError:
            raise
        except Exception as error:  # the Rust library raises bare Exception; odd JSON may lead to any
            raise UserError(f"{where} is not a Hugging Face tokenizer: {sanitize(error)}") from None
        special_tokens = (str(token) for token in self._backend.get_added_tokens_decoder().values() if token.special)
        if END not in special_tokens:
            self._backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
            json_text = self._backend.to_str()
            json_data = json.loads(json_text)
        self.json_text = json_text
        self.json_data: dict[str, Any] = json_data
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.end_id: int = vocab[END]
        if self.end_id in self.encode(f"a {END} b"):
            raise UserError(f"{where}: its model turns the text {END} into the special token; use another tokenizer")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """From a file, or from a directory that holds `tokenizer.json`."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = read_limited(file, MAX_FILE_BYTES).decode()
        except FileNotFoundError:
            raise UserError(f"tokenizer {file} does not exist; give a tokenizer.json, gpt2 or bpe:4096") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokenizer {file} cannot be read: {sanitize(error)}") from None
        return cls(text, str(file))

    def save(self, path: Path | str) -> None:
        """To a file, or into an existing directory as `tokenizer.json`."""
        path = Path(path)
        (path / "tokenizer.json" if path.is_dir() else path).write_text(self.json_text, encoding="utf-8", newline="\n")

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer: the hash of its JSON with sorted keys and no spaces."""
        canonical = json.dumps(self.json_data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def is_stop_token(self, token: int) -> bool:
        """Whether a story is over with this id: END, another special token, or an id that the tokenizer does not have.

        Other programs' models have several such tokens, and vocabularies that are filled up to a round number.
        """
        return token >= self.vocab_size or token in self.special_ids

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(token["id"] for token in self.json_data["added_tokens"] if token["special"])

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens leave no trace, bytes that are not UTF-8 become U+FFFD."""
        if self.is_lossless:
            return b"".join([self.token_bytes[i] for i in ids]).decode("utf-8", "replace")
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def is_lossless(self) -> bool:
        """Whether decoding the ids of any text gives back that text, byte for byte (byte-level BPE)."""
        json_data = self.json_data
        alphabet = set(char_to_byte())
        return (
            (json_data["decoder"] or {}).get("type") == "ByteLevel"
            and json_data["normalizer"] is None
            and (json_data["pre_tokenizer"] or {}).get("type") == "ByteLevel"
            and not json_data["pre_tokenizer"]["add_prefix_space"]
            and alphabet <= set(self._backend.get_vocab(with_added_tokens=False))
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Table id -> bytes, of length `vocab_size`; special tokens and unused ids are empty.

        Exact for byte-level BPE. Other decoders may treat a token differently by its place in the text (a leading
        space dropped, bytes fused); there the entry is what the token adds after another word.
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

    def _decode_token_bytes(self, token: str, i: int, decoder: str) -> bytes:
        if '"ByteFallback"' in decoder and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in decoder:  # the sentencepiece space
            return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        single, doubled = self._backend.decode([i]), self._backend.decode([i, i])
        return doubled[len(single) :].encode() if doubled.startswith(single) else single.encode()


def max_expansion(part: Any) -> float:
    """How many times longer a part of a tokenizer makes a text, at most: each of a Sequence works on the last's."""
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    children = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if isinstance(children, list):
        return math.prod(max_expansion(one) for one in children)
    if kind == "Replace":
        content, pattern = str(part.get("content", "")), part.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(1.0, len(content) / len(literal))
        return 1.0 + len(content)  # may be put between any two characters
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend", "")))
    return {"ByteLevel": 2.0, "Precompiled": 32.0}.get(str(kind), 1.0)  # Precompiled: a table, which may hold anything


@functools.cache
def char_to_byte() -> dict[str, int]:
    """Inverse of GPT-2's printable alphabet for the 256 bytes (`bytes_to_unicode` in openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in printable}
    unprintable = [b for b in range(256) if b not in set(printable)]
    table.update({chr(256 + n): b for n, b in enumerate(unprintable)})
    return table


def sanitize(error: object) -> str:
    """Another program's message, which may hold anything of a file: short, in one line, escaped."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MAX_MESSAGE_LENGTH else text[: MAX_MESSAGE_LENGTH - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
