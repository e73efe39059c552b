"""Stories and tokenizers shared by the data tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinystories.data.build_tokenizer import load_gpt2, train_bpe
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe(400, iter_stories("sample"))


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Iterator[Tokenizer]:
    """GPT-2's tokenizer; while in use, tiktoken finds its cached vocabulary too."""
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            if not (SHARED / "gpt2").is_dir():
                pytest.skip("needs ../shared/gpt2 or TIKTOKEN_CACHE_DIR")
            patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "gpt2"))
        yield load_gpt2()


@pytest.fixture(scope="session")
def real_train() -> Path:
    path = SHARED / "data" / "train.txt"
    if not path.exists():
        pytest.skip("needs ../shared/data/train.txt")
    return path


@pytest.fixture
def many() -> list[str]:
    """300 distinct stories, some with multi-byte characters."""
    return [
        f"Once there was {'a café' if n % 7 == 0 else 'a cat'} number {n}.\nIt said {'hi ' * (n % 5)}."
        for n in range(300)
    ]
