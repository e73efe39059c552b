"""What the tests of several formats share: models as formats see them, and a tokenizer of pieces."""

from collections.abc import Callable
from typing import Any

from tinystories.checkpoint import state_dict_to_save
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.tokenizer_conversion import BYTE_PIECES, build_sentencepiece_bpe
from tinystories.model import GPT

Build = Callable[..., ModelBundle]
GPT2: dict[str, object] = {"architecture": "classic", "learned_positions": True, "activation": "gelu_tanh"}


def bundle_of(model: GPT, tokenizer: Tokenizer, **more: Any) -> ModelBundle:
    """The weights of a model with a tokenizer."""
    weights = {name: weight.numpy(force=True) for name, weight in state_dict_to_save(model).items()}
    return ModelBundle(config=model.config, weights=weights, tokenizer=tokenizer, **more)


def sentencepiece_tokenizer(*, add_prefix_space: bool = True) -> Tokenizer:
    """A few words and the characters of the bundled stories as pieces, with END as id 1."""
    letters = sorted({letter for story in iter_stories("sample") for letter in story if letter.isascii()})
    words = [" t", "he", " the", "an", "and", " a", " and"]
    names = [*("<unk>", "<s>", "</s>"), *BYTE_PIECES, *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(names) - 259)]
    return build_sentencepiece_bpe([name.encode() for name in names], scores, 1, add_prefix_space=add_prefix_space)
