"""Ranges and lists of settings are parsed by the type of the setting; errors name the setting."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution

from tinystories.config_file import load_config
from tinystories.errors import UserError
from tinystories.sweep.search_space import Distribution, SearchSpace, list_values, parse_search_space

quick = settings(deadline=None, max_examples=60)


def space(**texts: str) -> SearchSpace:
    """A space over an empty config; `optim__learning_rate` stands for `optim.learning_rate`."""
    return parse_search_space({}, "mine.toml", {name.replace("__", "."): text for name, text in texts.items()})


def distribution(name: str, text: str) -> Distribution:
    (found,) = parse_search_space({}, "mine.toml", {name: text}).distributions.values()
    return found


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("optim.learning_rate", "1e-3:1e-1:log", (1e-3, 1e-1, None, True)),
        ("schedule.warmup", "0:0.2", (0.0, 0.2, None, False)),
        ("schedule.warmup", "0:0.25:0.1", (0.0, 0.2, 0.1, False)),
        ("train.steps", "1_000:2_000", (1000, 2000, 1, False)),
        ("model.n_embd", "64:250:32", (64, 224, 32, False)),
        ("train.batch_size", "1 : 512 : log", (1, 512, 1, True)),
        ("train.micro_batch", "2:8", (2, 8, 1, False)),  # int | Literal["auto"]
    ],
)
def test_ranges(name: str, text: str, expected: tuple[Any, ...]) -> None:
    found = distribution(name, text)
    assert isinstance(found, FloatDistribution | IntDistribution)
    values = (found.low, found.high, found.step, found.log)
    assert values == expected
    assert [type(value) for value in values] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("train.batch_size", "8, 16,32", (8, 16, 32)),
        ("optim.kind", "muon,adamw", ("muon", "adamw")),
        ("model.tied", "true,false", (True, False)),
        ("train.micro_batch", "auto,4", ("auto", 4)),
        ("data.dir", "choose:data/a,hf:b/c", ("data/a", "hf:b/c")),
        ("train.sample_prompts", "choose:Once|One day,The cat", (("Once", "One day"), ("The cat",))),
        ("optim.learning_rate", "choose:1e-3,2e-3", (1e-3, 2e-3)),
    ],
)
def test_lists(name: str, text: str, values: tuple[Any, ...]) -> None:
    found = parse_search_space({}, "mine.toml", {name: text})
    stored = list_values(name, found.distributions[name])
    assert [found.decode({name: choice}) for choice in stored] == [{name: value} for value in values]


def test_single_values_and_free_text_are_fixed() -> None:
    found = space(
        train__steps="500",
        train__device="cuda:1",
        train__sample_prompts="Once, a cat: it|B",
        train__micro_batch="auto",
        optim__learning_rate="1e-3,2e-3",
    )
    assert list(found.texts) == ["optim.learning_rate"]
    config = found.find_valid_config()
    assert config.train.device == "cuda:1"
    assert config.train.sample_prompts == ("Once, a cat: it", "B")
    assert config == load_config(
        None,
        {
            "train.steps": "500",
            "train.device": "cuda:1",
            "train.sample_prompts": "Once, a cat: it|B",
            "train.micro_batch": "auto",
            "optim.learning_rate": "1e-3",
        },
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.learning_rat", "1e-3:1e-2", "did you mean optim.learning_rate"),
        ("nonsense", "1:2", "unknown setting nonsense"),
        ("optim.learning_rate", "1e-1:1e-3:log", "empty; write 0.001:0.1"),
        ("optim.learning_rate", "1e-3:1e-3", "single value; fix it"),
        ("optim.learning_rate", "0:1e-3:log", "must start above 0"),
        ("optim.learning_rate", "-1:1:log", "must start above 0"),
        ("optim.learning_rate", "1e-3:", "expected a value of type float"),
        ("optim.learning_rate", ":", "expected a value of type float"),
        ("optim.learning_rate", "1:2:3:4", "a range is LOW:HIGH"),
        ("optim.learning_rate", "1:nan", "must be finite"),
        ("optim.learning_rate", "1:inf:log", "must be finite"),
        ("optim.learning_rate", "-1e308:1e308", "too wide"),
        ("optim.learning_rate", "0:1:1e-300", "too wide"),
        ("optim.learning_rate", "0:1:0", "step must be above 0"),
        ("optim.learning_rate", "0:1:-0.1", "step must be above 0"),
        ("optim.learning_rate", "0:1:2", "step must be above 0 and at most 1"),
        ("train.batch_size", "1.5:8", "expected a value of type int"),
        ("train.batch_size", "8:16:logs", "expected a value of type int"),
        ("train.batch_size", "8,,16", "empty value in the list"),
        ("train.batch_size", "8,", "empty value in the list"),
        ("train.batch_size", ",", "empty value in the list"),
        ("train.batch_size", "8,16,8", "8 is listed twice"),
        ("train.batch_size", "8,many", "expected a value of type int"),
        ("train.batch_size", f"1:{2**64}", "64-bit"),
        ("optim.kind", "muon,sgd", "must be one of muon, adamw"),
        ("optim.kind", "muon:adamw", "only numbers can have ranges"),
        ("model.tied", "true:false", "only numbers can have ranges"),
        ("data.dir", "choose:one", "single value; list several"),
        ("train.micro_batch", "auto:8", "expected a value of type int"),
        ("train.steps", "many", "expected a value of type int"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_search_space({}, "mine.toml", {name: text})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@quick
@given(st.integers(-1000, 1000), st.integers(1, 500), st.integers(1, 500))
def test_a_range_of_ints_is_pythons(low: int, width: int, step: int) -> None:
    """`train.seed` takes any int here: only the config refuses negative ones."""
    if step > width:
        return
    found = distribution("train.seed", f"{low}:{low + width}:{step}")
    assert list_values("train.seed", found) == list(range(low, low + width + 1, step))


@quick
@given(st.decimals(-10, 10, places=3), st.integers(1, 60), st.decimals("0.001", 3, places=3))
def test_a_range_with_steps_holds_what_was_written(low: Any, steps: int, step: Any) -> None:
    """0.1 + 2 * 0.1 is 0.3 and not 0.30000000000000004."""
    found = distribution("optim.weight_decay", f"{low}:{low + steps * step}:{step}")
    assert list_values("optim.weight_decay", found) == [float(low + i * step) for i in range(steps + 1)]


@quick
@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for name in ("optim.learning_rate", "train.micro_batch", "optim.kind", "model.tied", "train.sample_prompts"):
        try:
            parse_search_space({}, "mine.toml", {name: text})
        except UserError as error:
            message = str(error)
        else:
            continue
        assert name in message
        assert len(message.splitlines()) == 1


def test_nothing_to_search() -> None:
    with pytest.raises(UserError, match="nothing to search"):
        space(train__steps="500").find_valid_config()


def test_a_fixed_setting_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match=r"no combination .* mine.toml: train.steps=-5 must be positive"):
        space(train__steps="-5", optim__learning_rate="1e-3,1e-2").find_valid_config()
    with pytest.raises(UserError, match=r"model.n_embd=100 must be a multiple of model.n_head=3"):
        space(model__n_embd="100", model__n_head="3,6").find_valid_config()
    with pytest.raises(UserError, match=r"unknown setting train.stpes; did you mean train.steps"):
        parse_search_space({"train": {"stpes": 3}}, "mine.toml", {"optim.kind": "muon,adamw"}).find_valid_config()


def test_a_fixed_setting_that_fits_somewhere_is_not() -> None:
    assert space(model__n_head="5", model__n_embd="48,100,110").find_valid_config().model.n_embd == 100
    inside = space(model__n_head="16", model__n_embd="33:70").find_valid_config()  # at neither end
    assert inside.model.n_embd == 64


def test_a_grid_has_every_combination_once() -> None:
    found = space(train__batch_size="32,64", model__n_layer="1:3", schedule__warmup="0:0.2:0.1").grid()
    assert len(found) == 18
    assert len({tuple(combination.values()) for combination in found}) == 18
    assert found[1] == {"train.batch_size": "32", "model.n_layer": 1, "schedule.warmup": 0.1}
    for text in ("1e-3:1e-1", "1e-3:1e-1:log"):
        with pytest.raises(UserError, match="a grid needs a list"):
            space(optim__learning_rate=text).grid()
    with pytest.raises(UserError, match="more than 100,000 values"):
        space(train__steps="1:1_000_000").grid()
    with pytest.raises(UserError, match="more than 100,000 combinations"):
        space(train__steps="1:1_000", train__eval_every="1:1_000", train__log_every="1:1_000").grid()
