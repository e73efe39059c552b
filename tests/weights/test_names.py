"""Weights that do not fit a config are refused by name."""

from collections.abc import Callable

import pytest
import torch
from shapes import SHAPES

from tinystories.checkpoint import state_dict_to_save
from tinystories.config import ModelConfig
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.weights.names import check_weights, expected_shapes

Shapes = dict[str, tuple[int, ...]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_expected_shapes_are_those_of_the_model(tiny: Callable[..., ModelConfig], shape: dict[str, object]) -> None:
    config = tiny(**shape)
    with torch.device("meta"):
        weights = state_dict_to_save(GPT(config))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes == expected_shapes(config)
    check_weights(shapes, config, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes | {"more": (1,)}, r"^here: weight 'more' is unknown$"),
        (lambda shapes: {n: s for n, s in shapes.items() if n != "norm.weight"}, r"^here: .*'norm.weight' is missing$"),
        (lambda shapes: shapes | {"norm.weight": (25,)}, r"^here: .*norm.weight has shape \(25,\), expected \(24,\)$"),
    ],
    ids=["unknown", "missing", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tiny: Callable[..., ModelConfig], change: Callable[[Shapes], Shapes], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(change(expected_shapes(tiny())), tiny(), "here")
