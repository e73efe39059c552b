"""GPT-2's tokenizer from a file that another program has already downloaded. Nothing is downloaded here."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tinystories.data.build_tokenizer import new_byte_level_bpe
from tinystories.data.tokenizer import END, Tokenizer, char_to_byte
from tinystories.errors import UserError
from tinystories.files import read_limited

# Under this name tiktoken caches https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe.
CACHED_MERGES = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
MAX_FILE_BYTES = 16_000_000


def load_cached_gpt2(environment: Mapping[str, str] = os.environ) -> Tokenizer | None:
    """Return GPT-2's tokenizer if tiktoken or Hugging Face's cache has its file; None if neither has."""
    for folder in tiktoken_folders(environment):
        try:
            data = read_limited(folder / CACHED_MERGES, MAX_FILE_BYTES)
        except (OSError, UserError):
            continue
        if hashlib.sha256(data).hexdigest() == MERGES_SHA256:
            return build_gpt2(data.decode())
    for path in hub_files(environment):
        try:
            return Tokenizer.load(path)
        except UserError:
            continue
    return None


def tiktoken_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return where tiktoken looks for the files that it has downloaded."""
    names = (environment.get("TIKTOKEN_CACHE_DIR"), environment.get("DATA_GYM_CACHE_DIR"))
    return [*(Path(name) for name in names if name), Path(tempfile.gettempdir(), "data-gym-cache")]


def hub_files(environment: Mapping[str, str]) -> list[Path]:
    """Return the copies of GPT-2's tokenizer.json in the cache of huggingface_hub."""
    home = environment.get("HF_HOME") or Path(
        environment.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    hub = Path(environment.get("HF_HUB_CACHE") or Path(home, "hub"))
    names = ("models--openai-community--gpt2", "models--gpt2")
    return [path for name in names for path in sorted((hub / name / "snapshots").glob("*/tokenizer.json"))]


def build_gpt2(merges_text: str) -> Tokenizer:
    """Return the tokenizer of a vocab.bpe: a byte has the id of its place, then come the merges in their order."""
    merges = [(left, right) for left, right in map(str.split, merges_text.split("\n")[1:-1])]
    tokens = [*char_to_byte(), *(left + right for left, right in merges)]
    backend = new_byte_level_bpe({token: i for i, token in enumerate(tokens)}, merges)
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(), "gpt2")
