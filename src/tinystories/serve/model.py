"""What the server knows about its model: names, sizes, defaults, and its tokens as texts."""

import dataclasses
import functools
import re
import time
from typing import Any

from tinystories.checkpoint import BUNDLED_MODEL, ModelFiles
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model that a server answers with."""

    name: str
    tokenizer: Tokenizer
    sampling: SamplingConfig  # defaults
    n_ctx: int
    vocab_size: int
    fingerprint: str  # names weights, engine and precision
    meta: dict[str, Any]  # of /v1/models
    load_options: dict[str, str] = dataclasses.field(default_factory=dict)  # with which `tinystories.load` loads it
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @classmethod
    def describe(cls, files: ModelFiles, *, name: str, engine_name: str, precision: str) -> "ServedModel":
        """Return the description of a model directory; `precision` is what it computes in."""
        meta = {
            "n_params": files.config.n_params,
            "n_ctx": files.config.n_ctx,
            "n_vocab": files.config.vocab_size,
            "bits_per_byte": files.provenance.get("val_bits_per_byte"),
            "sha256": files.weights_sha256,
        }
        return cls(
            name=name,
            tokenizer=files.tokenizer(),
            sampling=files.sampling,
            n_ctx=files.config.n_ctx,
            vocab_size=files.config.vocab_size,
            fingerprint=f"fp_{files.weights_sha256[:12]}-{engine_name}-{precision}",
            meta=meta,
            # The name of the folder, not where it is: clients see this.
            load_options=({} if files.folder == BUNDLED_MODEL else {"model": files.folder.resolve().name})
            | {"engine": engine_name, "precision": precision},
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tinystories",
            "meta": self.meta,
        }

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; none for special tokens and for ids without a token."""
        table = self.tokenizer.token_bytes
        return table[token] if token < len(table) else b""

    def plain_text(self, ids: list[int]) -> str:
        """Return the text of ids without special tokens, as a story shows it."""
        return b"".join([self.token_bytes(token) for token in ids]).decode("utf-8", "replace")

    @functools.cached_property
    def special_texts(self) -> dict[int, str]:
        """The special tokens, as they are written in tokenizer.json."""
        special = {t["id"]: t["content"] for t in self.tokenizer.json_data["added_tokens"] if t["special"]}
        return {self.tokenizer.end_id: END} | special

    def token_name(self, token: int) -> str:
        r"""Return a text that stands for a token alone: part of a character is written bytes:\xe2\x80."""
        if token in self.special_texts:
            return self.special_texts[token]
        data = self.token_bytes(token)
        if not data:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self.special_texts.values()))

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Return the ids of a text; with `parse_special`, special tokens that are spelled out become their ids."""
        if not parse_special:
            return self.tokenizer.encode(text)
        ids: list[int] = []
        special_ids = {content: token for token, content in self.special_texts.items()}
        start = 0
        for match in self._special_pattern.finditer(text):
            ids += [*self.tokenizer.encode(text[start : match.start()]), special_ids[match.group()]]
            start = match.end()
        return ids + self.tokenizer.encode(text[start:])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens are spelled out, so that it can be encoded again."""
        parts: list[str] = []
        plain: list[int] = []
        for token in ids:
            if token in self.special_texts:
                parts += [self.tokenizer.decode(plain), self.special_texts[token]]
                plain = []
            elif token < self.tokenizer.vocab_size:
                plain.append(token)
        return "".join([*parts, self.tokenizer.decode(plain)])
