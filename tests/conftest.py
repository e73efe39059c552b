"""What all tests share: tiny shapes, and the bundled stories as prepared data."""

from pathlib import Path

import pytest

from tinystories.data.prepare import prepare


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled stories prepared with a vocabulary of 400; some are held out."""
    out = tmp_path_factory.mktemp("data") / "sample"
    prepare("sample", out, tokenizer="bpe:400", val_fraction=0.05, progress=False)
    return out
