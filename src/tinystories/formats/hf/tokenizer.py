"""Tokenizers of Hugging Face model folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinystories.checkpoint import read_json
from tinystories.data.build_tokenizer import load_gpt2, new_byte_level_bpe
from tinystories.data.tokenizer import Tokenizer, sanitize
from tinystories.errors import UserError
from tinystories.formats.tokenizer_conversion import set_end_token

GPT2_VOCAB_SIZE = 50257


def load_tokenizer(path: Path, tokenizer_path: Path | None, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Load `tokenizer_path`, else the folder's tokenizer, else GPT-2's if the vocabulary size is GPT-2's.

    END becomes the name of the BOS token (without one, the EOS token) in `settings`, the folder's config.json.
    """
    file = tokenizer_path or path / "tokenizer.json"
    end_id = next((settings[name] for name in ("bos_token_id", "eos_token_id") if settings.get(name) is not None), None)
    if isinstance(end_id, list) and end_id:
        end_id = end_id[0]
    text = (
        Tokenizer.load(file).json_text if tokenizer_path or file.is_file() else build_tokenizer_json(path, vocab_size)
    )
    if end_id is None and json.loads(text)["added_tokens"]:
        return Tokenizer(text, str(file))
    if type(end_id) is not int:
        raise UserError(
            f"{path}/config.json: bos_token_id and eos_token_id are both missing or invalid; one must be a token id"
        )
    return set_end_token(text, end_id, str(file))


def build_tokenizer_json(path: Path, vocab_size: int) -> str:
    """Return a tokenizer.json made of vocab.json and merges.txt, else GPT-2's own if the vocabulary size matches."""
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        try:
            lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path}/merges.txt is not UTF-8 text; download the model again") from None
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        try:
            text: str = new_byte_level_bpe(read_json(path / "vocab.json"), merges).to_str()  # type: ignore[arg-type]
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{path}: merges.txt and vocab.json are not a valid tokenizer: {sanitize(error)}") from None
        return text
    if vocab_size == GPT2_VOCAB_SIZE:
        return load_gpt2().json_text
    raise UserError(f"{path} has no tokenizer; pass one with --tokenizer FILE")
