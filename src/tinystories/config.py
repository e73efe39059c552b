"""Settings: frozen dataclasses, filled from defaults < TOML file < `--section.key value` flags.

Unknown names, wrong types and impossible values are `UserError`s that name the setting. Imports nothing heavy.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tinystories.errors import UserError

T = TypeVar("T")

PRESETS = ("nano", "small", "base", "seed-89m", "modern-89m")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a GPT. `classic` is the original program's architecture, `modern` is Qwen3's layout."""

    architecture: Literal["classic", "modern"] = "modern"
    vocab_size: int = 0  # V; 0: taken from the prepared data
    n_ctx: int = 256  # longest T
    n_layer: int = 6
    n_head: int = 4  # H
    n_kv_head: int = 0  # 0: as many as n_head; fewer is grouped-query attention (modern only)
    n_embd: int = 192  # C in shapes
    n_ff: int = 512  # F, width of the feed-forward
    tied: bool = True  # the head shares the embedding's weights
    qk_norm: bool = True  # RMSNorm on q and k per head (modern only)
    rope_base: float = 10000.0  # modern only
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_layer", "n_head", "n_embd", "n_ff"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        require(self.vocab_size >= 0, f"model.vocab_size={self.vocab_size} must not be negative")
        require(
            self.n_embd % self.n_head == 0,
            f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}",
        )
        require(
            self.n_kv_head >= 0 and self.n_head % self.kv_heads == 0,
            f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}",
        )
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be in [0, 1)")
        require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive")
        require(self.rope_base > 1, f"model.rope_base={self.rope_base} must be greater than 1")
        if self.architecture == "classic":
            require(
                self.kv_heads == self.n_head,
                f"model.n_kv_head={self.n_kv_head}: the classic architecture has no grouped heads;"
                " leave it 0 or set model.architecture=modern",
            )
            require(self.n_embd % 2 == 0, f"model.n_embd={self.n_embd} must be even for sinusoidal positions")
        else:
            require(
                self.head_dim % 2 == 0,
                f"model.n_embd/model.n_head={self.head_dim} must be even for rotary positions",
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def n_params(self) -> int:
        """Trainable parameters, a tied head counted once."""
        C, F, kv = self.n_embd, self.n_ff, self.kv_heads * self.head_dim
        attention = 2 * C * C + 2 * C * kv
        if self.architecture == "classic":
            norm, per_layer = 2 * C, attention + C + (2 * C * F + F + C)
        else:
            norm, per_layer = C, attention + 3 * C * F + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * C * (1 if self.tied else 2)
        return embeddings + self.n_layer * (per_layer + 2 * norm) + norm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where prepared data lies, and how to prepare it when it is not there yet."""

    dir: str = "data/tinystories"
    source: str = "tinystories"
    val: str = ""  # empty: the source's own validation split, else 0.5 % held out
    tokenizer: str = "bpe:4096"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW; weight decay applies to matrices only."""

    learning_rate: float = 3e-3  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optim.learning_rate={self.learning_rate} must be positive")
        require(0 <= self.beta1 < 1, f"optim.beta1={self.beta1} must be in [0, 1)")
        require(0 <= self.beta2 < 1, f"optim.beta2={self.beta2} must be in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        require(self.grad_clip >= 0, f"optim.grad_clip={self.grad_clip} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run, as fractions of its steps."""

    kind: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, then linear decay
    warmup: float = 0.05  # fraction of the steps spent rising to the peak
    decay: float = 0.5  # wsd only: fraction of the steps spent falling
    floor: float = 0.05  # final learning rate as a fraction of the peak

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, f"schedule.warmup={self.warmup} must be in [0, 1)")
        require(0 <= self.floor <= 1, f"schedule.floor={self.floor} must be in [0, 1]")
        require(0 <= self.decay <= 1, f"schedule.decay={self.decay} must be in [0, 1]")
        require(
            self.kind == "cosine" or self.warmup + self.decay <= 1,
            f"schedule.warmup={self.warmup} and schedule.decay={self.decay} must not exceed 1 together",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One clock: `step` counts optimizer steps. One row is one window of n_ctx tokens."""

    steps: int = 2000
    batch_size: int = 32  # rows per optimizer step
    micro_batch: int = 32  # rows per forward and backward pass; divides batch_size
    seed: int = 1
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on CUDA only
    log_every: int = 10
    eval_every: int = 250
    eval_stories: int = 200  # a fixed subset of the validation stories; all of them at the end
    checkpoint_every: int = 250
    keep_checkpoints: int = 2  # newest kept, besides the best
    sample_prompts: tuple[str, ...] = ("Once upon a time", "Lily and Tom went to the park.")
    sample_tokens: int = 120
    tensorboard: bool = False

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "micro_batch", "log_every", "eval_every", "eval_stories")
        for name in (*names, "checkpoint_every", "keep_checkpoints", "sample_tokens"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative")
        require(
            self.batch_size % self.micro_batch == 0,
            f"train.batch_size={self.batch_size} must be a multiple of train.micro_batch={self.micro_batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is drawn: penalty, then temperature, then top_k, top_p and min_p in this order."""

    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.05  # 0: off
    repetition_penalty: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, f"temperature={self.temperature} must be 0 or a positive number")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
        require(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty={self.repetition_penalty} must be a positive number",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a training run is made of; saved beside its result as `config.toml`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds (NaN never does)."""
    if not condition:
        raise UserError(message)


def preset_path(name: str) -> Path:
    """The TOML file of a preset: inside an installed package, or in `configs/` of a checkout."""
    installed = Path(__file__).parent / "configs" / f"{name}.toml"
    return installed if installed.exists() else Path(__file__).parents[2] / "configs" / f"{name}.toml"


def load_config(file: str | Path | None, overrides: Mapping[str, str] | None = None) -> Config:
    """Config from a TOML file or a preset's name, with `{"section.key": "text value"}` laid over it."""
    settings: dict[str, Any] = read_toml(file) if file is not None else {}
    for dotted, text in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        hints = get_type_hints(Config)
        if section not in hints or key not in get_type_hints(hints[section]):
            raise UserError(unknown_setting(dotted, setting_names()))
        value = parse_text(text, get_type_hints(hints[section])[key], dotted)
        settings.setdefault(section, {})
        if not isinstance(settings[section], dict):
            raise UserError(f"{file}: [{section}] must be a table of settings")
        settings[section][key] = value
    return build(Config, settings, str(file) if file is not None else "command line")


def read_toml(file: str | Path) -> dict[str, Any]:
    """Tables of a TOML file; a bare preset name means the preset."""
    path = preset_path(str(file)) if str(file) in PRESETS else Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors put a byte order mark first
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, PRESETS, n=1)
        hint = f"did you mean the preset {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"config {file} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested or long beyond reason
        raise UserError(f"config {file} cannot be read: {error}") from None


def build(kind: type[T], settings: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """A frozen dataclass from plain values; strict about names and types.

    `where` names the file in error messages, `prefix` the section ("train.").
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            sections = get_type_hints(Config)
            known = [*sections, *setting_names()] if kind in (Config, *sections.values()) else list(hints)
            raise UserError(f"{where}: {unknown_setting(prefix + key, known)}")
        values[key] = checked(value, hints[key], where, prefix + key)
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def checked(value: Any, hint: Any, where: str, name: str) -> Any:
    """`value` if it is of the annotated type (an int will do for a float, a list for a tuple)."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: [{name}] must be a table of settings")
        return build(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}: {name}={value!r} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: {name} must be a list of strings")
        return tuple(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {name} must be a number of at most 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name}={value!r} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}: {name}={value} must be finite")
    return value


def parse_text(text: str, hint: Any, name: str) -> Any:
    """A flag's text as a value of the annotated type."""
    if hint is str or get_origin(hint) is Literal:
        return text
    if hint is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name} {text!r}: expected true or false")
        return words[text.lower()]
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split("|") if part.strip())
    try:
        return hint(text.replace("_", "")) if hint is int else hint(text)
    except ValueError:
        raise UserError(f"--{name} {text!r}: expected a value of type {hint.__name__}") from None


def setting_names() -> list[str]:
    """Every `section.key` there is."""
    return [f"{section}.{key}" for section, kind in get_type_hints(Config).items() for key in get_type_hints(kind)]


def unknown_setting(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    shown = name if name.isprintable() else repr(name)
    return f"unknown setting {shown}" + (f"; did you mean {near[0]}?" if near else "; see tinystories train --help")


def replace_vocab(config: Config, vocab_size: int, where: str) -> Config:
    """The config with the vocabulary of its data; a size that was asked for and differs is an error."""
    asked = config.model.vocab_size
    if asked not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={asked} but the data in {where} has {vocab_size} ids; leave it 0 to follow the data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def to_toml(config: Config) -> str:
    """The resolved config as TOML text; `load_config` reads it back to an equal value."""
    import tomli_w  # comes with the [train] extra: only training writes TOML

    return tomli_w.dumps(dataclasses.asdict(config))
