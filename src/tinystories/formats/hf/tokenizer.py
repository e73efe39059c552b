"""Tokenizers of Hugging Face model folders."""

from pathlib import Path

from tinystories.checkpoint import read_json
from tinystories.data.build_tokenizer import GPT2_VOCAB_SIZES, load_gpt2, new_byte_level_bpe
from tinystories.data.tokenizer import Tokenizer, check_not_sentencepiece, sanitize
from tinystories.errors import UserError
from tinystories.files import MAX_JSON_BYTES, read_limited
from tinystories.formats.end_token import adapt_tokenizer, read_candidates, read_tokenizer_text


def load_tokenizer(path: Path, tokenizer_path: Path | None, vocab_size: int) -> Tokenizer:
    """Load `tokenizer_path`, else the folder's tokenizer, else GPT-2's if the vocabulary size is GPT-2's.

    END becomes the name of the token that begins a text, or else of the one that ends it, according to the folder's
    files (see `adapt_tokenizer`).
    """
    file = tokenizer_path or path / "tokenizer.json"
    has_file = tokenizer_path is not None or file.is_file()
    text = read_tokenizer_text(file) if has_file else build_tokenizer_json(path, vocab_size)
    return adapt_tokenizer(text, read_candidates(path), vocab_size, str(file))


def build_tokenizer_json(path: Path, vocab_size: int) -> str:
    """Return a tokenizer.json made of vocab.json and merges.txt, else GPT-2's own if the vocabulary size matches."""
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        try:
            lines = read_limited(path / "merges.txt", MAX_JSON_BYTES).decode().splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path}/merges.txt is not UTF-8 text; download the model again") from None
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        try:
            text: str = new_byte_level_bpe(read_json(path / "vocab.json"), merges).to_str()  # type: ignore[arg-type]
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{path}: merges.txt and vocab.json are not a valid tokenizer: {sanitize(error)}") from None
        return text
    check_not_sentencepiece(path / "tokenizer.model")
    if vocab_size in GPT2_VOCAB_SIZES:
        return load_gpt2().json_text
    raise UserError(f"{path} has no tokenizer; pass one with --tokenizer FILE")
