"""Settings: valid ones survive a round trip, invalid ones raise a one-line error that names the setting."""

import dataclasses
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinystories.config import (
    ABOVE_ONE,
    BELOW_ONE,
    FINITE_NOT_NEGATIVE,
    FINITE_POSITIVE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    POSITIVE_OR_AUTO,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Range,
    SamplingConfig,
    ScheduleConfig,
    TrainConfig,
    replace_vocab,
)
from tinystories.config_file import PRESETS, build_dataclass, load_config, preset_path, setting_names, to_toml
from tinystories.errors import UserError

quick = settings(deadline=None, max_examples=60)


def refusal(file: Path | str | None, overrides: dict[str, str] | None = None) -> str:
    """Return the message of the `UserError` that loading must raise."""
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


# Valid settings


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_name_every_setting(preset: str) -> None:
    """Every value is visible in the file: a preset does not rely on defaults."""
    config = load_config(preset)
    written = tomllib.loads(preset_path(preset).read_text(encoding="utf-8"))
    assert {f"{section}.{key}" for section, table in written.items() for key in table} == set(setting_names())
    assert load_config(preset_path(preset)) == config


def test_no_file_and_no_flags_give_the_defaults() -> None:
    assert load_config(None) == Config()


def test_file_overrides_defaults_and_flags_override_the_file(toml: Path) -> None:
    toml.write_text("[train]\nsteps = 7\nseed = 3\n[optim]\nlearning_rate = 1\n", encoding="utf-8")
    config = load_config(toml, {"train.steps": "9", "model.tied": "false"})
    assert config.train == TrainConfig(steps=9, seed=3)
    assert config.model == ModelConfig(tied=False)
    assert isinstance(config.optim.learning_rate, float), "an integer is accepted for a float"
    assert config.optim.learning_rate == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.steps", "1_000", 1000),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("train.tensorboard", "TRUE", True),
        ("train.tensorboard", "no", False),
        ("train.precision", "bf16", "bf16"),
        ("data.source", "hf:some/thing", "hf:some/thing"),
        ("train.sample_prompts", "Once | The cat|", ("Once", "The cat")),
    ],
)
def test_flags_are_read_as_the_settings_type(name: str, text: str, value: object) -> None:
    section, key = name.split(".")
    parsed = getattr(getattr(load_config(None, {name: text}), section), key)
    assert parsed == value
    assert type(parsed) is type(value)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
configs = st.builds(
    Config,
    model=st.builds(ModelConfig, n_layer=st.integers(1, 99), tied=st.booleans(), dropout=st.floats(0, 0.99)),
    data=st.builds(DataConfig, dir=words, source=words, val=words, tokenizer=words),
    optim=st.builds(OptimConfig, learning_rate=st.floats(1e-300, 1e300), grad_clip=st.floats(0, 10)),
    schedule=st.builds(ScheduleConfig, kind=st.sampled_from(["cosine", "wsd"]), warmup=st.floats(0, 0.5)),
    train=st.builds(TrainConfig, seed=st.integers(0, 2**63 - 1), sample_prompts=st.lists(words).map(tuple)),
)


@quick
@given(configs)
@example(Config(data=DataConfig(dir='a "b" \\ \r\n\t\x00 é 🐈 \u2028')))
def test_saved_config_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


def test_byte_order_mark_is_accepted(toml: Path) -> None:
    toml.write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 5\r\n")
    assert load_config(toml).train.steps == 5


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_heads_follow_from_the_sizes() -> None:
    config = ModelConfig(n_embd=96, n_head=8, n_kv_head=2)
    assert (config.head_dim, config.kv_heads) == (12, 2)
    assert ModelConfig(n_head=8).kv_heads == 8
    assert ModelConfig(n_embd=96, n_head=8, head_size=64).head_dim == 64


def test_the_vocabulary_comes_from_the_data() -> None:
    assert replace_vocab(Config(), 300, "data").model.vocab_size == 300
    explicit = Config(model=ModelConfig(vocab_size=300))
    assert replace_vocab(explicit, 300, "data") == explicit
    with pytest.raises(UserError, match=r"model\.vocab_size=300 but the data in some/place has 301"):
        replace_vocab(explicit, 301, "some/place")


def test_reading_settings_needs_no_package_of_the_training_extra() -> None:
    """A base install reads configs without tomli_w and without torch."""
    code = (
        "import sys; sys.modules |= {'tomli_w': None, 'torch': None, 'numpy': None}\n"
        "from tinystories.config_file import load_config; print(load_config('nano').train.steps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout) > 0


# Invalid settings


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.stpes", "train.steps"),
        ("train.step", "train.steps"),
        ("optim.lr_rate", "optim.learning_rate"),
        ("model.n_layers", "model.n_layer"),
        ("steps", "train.steps"),
        ("trian.steps", "train.steps"),
    ],
)
def test_unknown_setting_suggests_the_nearest(name: str, hint: str) -> None:
    assert refusal(None, {name: "3"}) == f"unknown setting {name}; did you mean {hint}?"


def test_an_unknown_setting_in_a_file_names_the_file(toml: Path) -> None:
    toml.write_text("[train]\nstpes = 3\n", encoding="utf-8")
    assert refusal(toml) == f"{toml}: unknown setting train.stpes; did you mean train.steps?"
    toml.write_text("[trains]\nsteps = 3\n", encoding="utf-8")
    assert refusal(toml) == f"{toml}: unknown setting trains; did you mean train?"
    toml.write_text("zzzzzzzz = 3\n", encoding="utf-8")
    assert refusal(toml) == f"{toml}: unknown setting zzzzzzzz; see tinystories train --help"


def test_section_is_not_a_setting() -> None:
    assert "unknown setting train;" in refusal(None, {"train": "3"})
    assert "unknown setting train.;" in refusal(None, {"train.": "3"})
    assert "unknown setting train.steps.x;" in refusal(None, {"train.steps.x": "3"})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('train.steps = "3"', "train.steps='3' must be of type int"),
        ("train.steps = 3.0", "train.steps=3.0 must be of type int"),
        ("train.steps = true", "train.steps=True must be of type int"),
        ("train.tensorboard = 1", "train.tensorboard=1 must be of type bool"),
        ('model.dropout = "a lot"', "model.dropout='a lot' must be of type float"),
        ("model.dropout = true", "model.dropout=True must be of type float"),
        ("data.dir = 3", "data.dir=3 must be of type str"),
        ("data.dir = 2026-01-01", "data.dir=datetime.date(2026, 1, 1) must be of type str"),
        ('model.architecture = "GPT"', "model.architecture='GPT' must be one of classic, modern"),
        ("train.precision = ['fp32']", "train.precision=['fp32'] must be one of auto, fp32, bf16"),
        ("train.sample_prompts = 'Once'", "train.sample_prompts must be a list of strings"),
        ("train.sample_prompts = [1]", "train.sample_prompts must be a list of strings"),
        ("train = 3", "[train] must be a table of settings"),
        ("train.steps.deep = 3", "train.steps={'deep': 3} must be of type int"),
        (f"train.seed = {2**63}", "train.seed must be a 64-bit integer"),
        (f"optim.learning_rate = {10**400}", "optim.learning_rate must be a 64-bit integer"),
        ("optim.learning_rate = inf", "optim.learning_rate=inf must be finite"),
        ("optim.grad_clip = inf", "optim.grad_clip=inf must be finite"),
        ("model.norm_eps = nan", "model.norm_eps=nan must be finite"),
    ],
)
def test_wrong_type_names_the_setting(toml: Path, line: str, complaint: str) -> None:
    toml.write_text(line, encoding="utf-8")
    assert refusal(toml) == f"{toml}: {complaint}"


def test_flag_for_a_section_that_is_not_a_table(toml: Path) -> None:
    toml.write_text("train = 3", encoding="utf-8")
    assert refusal(toml, {"train.steps": "3"}) == f"{toml}: [train] must be a table of settings"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("train.steps", "many", "--train.steps 'many': expected a value of type int"),
        ("train.steps", "3.5", "--train.steps '3.5': expected a value of type int"),
        ("train.steps", "", "--train.steps '': expected a value of type int"),
        ("train.steps", "9" * 5000, "expected a value of type int"),
        ("train.steps", "9" * 30, "train.steps must be a 64-bit integer"),
        ("model.dropout", "a\nlot", "--model.dropout 'a\\nlot': expected a value of type float"),
        ("model.dropout", "nan", "model.dropout=nan must be finite"),
        ("model.tied", "maybe", "--model.tied 'maybe': expected true or false"),
        ("train.compile", "perhaps", "train.compile='perhaps' must be one of auto, on, off"),
    ],
)
def test_unreadable_flag_is_named(name: str, text: str, complaint: str) -> None:
    assert complaint in refusal(None, {name: text})


def test_missing_file_suggests_presets(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nan.toml").endswith("does not exist; did you mean the preset nano?")
    assert refusal("seed-89").endswith("does not exist; did you mean the preset seed-89m?")
    assert refusal(tmp_path / "x.toml").endswith(f"does not exist; presets: {', '.join(PRESETS)}")


@pytest.mark.parametrize(
    "content",
    [
        b"[train",
        b"steps = ",
        b"[train]\nsteps = 1\nsteps = 2",
        b"\xff\xfe[",
        b"a = " + b"9" * 5000,
        b"a = " + b"[" * 9999,
    ],
    ids=["cut", "no value", "twice", "not utf-8", "endless number", "endless nesting"],
)
def test_invalid_toml_names_the_file(toml: Path, content: bytes) -> None:
    toml.write_bytes(content)
    assert refusal(toml).startswith(f"config {toml} cannot be read: ")


def test_paths_that_are_not_files_are_named(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / ("x" * 5000))
    assert "cannot be read" in refusal("a\0b")


@pytest.mark.parametrize(
    ("kind", "values", "complaint"),
    [
        (ModelConfig, {"n_embd": 10, "n_head": 3}, "model.n_embd=10 must be a multiple of model.n_head=3"),
        (ModelConfig, {"n_head": 4, "n_kv_head": 8}, "model.n_head=4 must be a multiple of model.n_kv_head=8"),
        (ModelConfig, {"architecture": "classic", "n_kv_head": 2}, "model.n_kv_head=2"),
        (ModelConfig, {"architecture": "classic", "n_embd": 15, "n_head": 5}, "model.n_embd=15 must be even"),
        (ModelConfig, {"architecture": "classic", "head_size": 10}, "model.head_size=10"),
        (ModelConfig, {"n_embd": 12, "n_head": 4}, "model.n_embd/model.n_head=3 must be even"),
        (ScheduleConfig, {"kind": "wsd", "warmup": 0.6, "decay": 0.5}, "schedule.warmup=0.6 and schedule.decay=0.5"),
        (TrainConfig, {"batch_size": 6, "micro_batch": 4}, "must be a multiple of train.micro_batch=4"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(kind: type, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**values)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learned_positions", True),
        ("activation", "gelu_erf"),
        ("qkv_bias", True),
        ("scaled_scores", False),
        ("window", 8),
    ],
)
def test_a_classic_setting_is_refused_in_a_modern_model(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.{name}=.* needs model\.architecture=classic"):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (POSITIVE, 1, 0),
        (POSITIVE_OR_AUTO, "auto", 0),
        (NOT_NEGATIVE, 0, -1),
        (ABOVE_ONE, 1.1, 1),
        (BELOW_ONE, 0, 1),
        (FRACTION, 1, 1.1),
        (POSITIVE_FRACTION, 1, 0),
        (FINITE_POSITIVE, 1e300, math.inf),
        (FINITE_NOT_NEGATIVE, 0, math.inf),
    ],
    ids=lambda value: getattr(value, "words", str(value)),
)
def test_a_range_holds_the_numbers_that_its_words_promise(allowed: Range, inside: Any, outside: Any) -> None:
    assert allowed.contains(inside)
    assert not allowed.contains(outside)


NUMBERS = [
    (kind, field)
    for kind in (ModelConfig, OptimConfig, ScheduleConfig, TrainConfig, SamplingConfig)
    for field in dataclasses.fields(kind)
    if int in (field.type, *get_args(field.type)) or float in (field.type, *get_args(field.type))
]


@quick
@given(st.sampled_from(NUMBERS), st.integers(max_value=-1) | st.floats(max_value=-1e-300) | st.just(math.nan))
def test_numbers_below_zero_and_nan_are_refused_everywhere(number: tuple[Any, Any], value: float) -> None:
    kind, field = number
    with pytest.raises(UserError) as caught:
        kind(**{field.name: value})
    reason = field.metadata["range"].words
    if kind is SamplingConfig and field.type is int and isinstance(value, float):  # Python callers set these
        reason = "must be an integer, not float"
    assert str(caught.value).endswith(f"{field.name}={value} {reason}")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelConfig, {"dropout": 0.0, "n_kv_head": 1}),
        (ModelConfig, {"architecture": "classic", "n_head": 4, "n_kv_head": 4}),
        (ModelConfig, {"architecture": "classic", "n_embd": 12, "n_head": 4}),
        (ModelConfig, {"architecture": "classic", "n_embd": 15, "n_head": 5, "learned_positions": True}),
        (ModelConfig, {"n_embd": 22, "n_head": 4, "head_size": 6}),
        (ScheduleConfig, {"warmup": 0.6}),
        (ScheduleConfig, {"kind": "wsd", "warmup": 0.9, "decay": 0.1}),
        (OptimConfig, {"grad_clip": 0.0, "weight_decay": 0.0, "beta1": 0.0}),
        (SamplingConfig, {"temperature": 0.0, "top_p": 1.0, "min_p": 1.0}),
    ],
    ids=str,
)
def test_boundary_values_are_allowed(kind: type, values: dict[str, Any]) -> None:
    assert all(getattr(kind(**values), name) == value for name, value in values.items())


scalars: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
names = st.sampled_from([name.split(".")[1] for name in setting_names()]) | st.text(max_size=8)
sections = st.sampled_from(["model", "data", "optim", "schedule", "train"]) | st.text(max_size=8)


def complaint_of(act: Callable[[], Config]) -> str:
    """Return the message a user would read, or "" if there is a config. Any other exception is a failure."""
    try:
        config = act()
    except UserError as error:
        return str(error)
    assert isinstance(config, Config)
    return ""


@settings(deadline=None, max_examples=120)
@given(st.dictionaries(sections, anything | st.dictionaries(names, anything, max_size=4), max_size=3))
def test_any_tables_make_a_config_or_a_user_error(tables: dict[str, Any]) -> None:
    assert complaint_of(lambda: build_dataclass(Config, tables, "some file")).isprintable(), (
        "one line without control characters"
    )


@settings(deadline=None, max_examples=120)
@given(st.dictionaries(st.sampled_from(setting_names()) | st.text(max_size=12), scalars.map(str), max_size=3))
def test_any_flags_make_a_config_or_a_user_error(overrides: dict[str, str]) -> None:
    assert complaint_of(lambda: load_config(None, overrides)).isprintable()


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[train]\nsteps = 0x" + b"f" * 4000)
def test_any_bytes_make_a_config_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("bytes") / "any.toml"
    file.write_bytes(content)
    assert complaint_of(lambda: load_config(file)).isprintable()
