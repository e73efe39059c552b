"""Settings: frozen dataclasses, filled from defaults < TOML file < `--section.key value` flags.

Unknown names, wrong types and impossible values are `UserError`s that name the setting. Imports nothing heavy.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tinystories.errors import MAX_QUOTED_CHARS, UserError, quoted

T = TypeVar("T")

UNION_TYPES = (Union, UnionType)  # `int | Literal["auto"]` is the one or the other by the version of Python
PRESETS = ("nano", "small", "storyteller", "base", "seed-89m", "modern-89m")
CLASSIC_ONLY = ("learned_positions", "activation", "qkv_bias", "scaled_scores", "window")


def field(default: T, help_text: str) -> T:
    """A field with the sentence that `tinystories train --help` prints for it."""
    result: T = dataclasses.field(default=default, metadata={"help": help_text})
    return result


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a GPT. `classic` is the original program's architecture, by its settings also GPT-2's and GPT-Neo's.

    `modern` is Qwen3's layout, or Llama's.
    """

    architecture: Literal["classic", "modern"] = field(
        "modern", "classic: sinusoidal positions, LayerNorm, ReLU; modern: RoPE, RMSNorm, SwiGLU (Qwen3's layout)"
    )
    vocab_size: int = field(0, "number of token ids; 0: taken from the prepared data")
    n_ctx: int = field(256, "tokens the model sees at once")
    n_layer: int = field(6, "blocks")
    n_head: int = field(4, "attention heads of a block")
    n_kv_head: int = field(
        0, "heads of keys and values; 0: as many as n_head; fewer is grouped-query attention (modern)"
    )
    n_embd: int = field(192, "width of the residual stream")
    head_size: int = field(0, "width of a head; 0: n_embd / n_head (modern)")
    n_ff: int = field(512, "width of the feed-forward")
    tied: bool = field(True, "the head shares the embedding's weights")
    qk_norm: bool = field(True, "RMSNorm on queries and keys of each head (modern)")
    rope_base: float = field(10000.0, "base of the rotary positions' wavelengths (modern)")
    learned_positions: bool = field(False, "positions are weights, not sinusoids (classic)")
    activation: Literal["relu", "gelu_tanh", "gelu_erf"] = field(
        "relu", "of the feed-forward: ReLU, or GELU by tanh as in GPT-2, or by erf, which is exact (classic)"
    )
    qkv_bias: bool = field(False, "queries, keys and values have biases (classic)")
    scaled_scores: bool = field(True, "attention scores are divided by the root of the head's width (classic)")
    window: int = field(0, "tokens that every second block sees, the token itself included; 0: all (classic)")
    norm_eps: float = field(1e-5, "added to the variance in norms")
    dropout: float = field(0.0, "fraction of activations dropped while training")

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_layer", "n_head", "n_embd", "n_ff"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        for name in ("vocab_size", "head_size", "window"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        require(
            self.head_size > 0 or self.n_embd % self.n_head == 0,
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
            require(
                self.head_dim * self.n_head == self.n_embd,
                f"model.head_size={self.head_size}: the heads of the classic architecture are n_embd / n_head wide;"
                " leave it 0 or set model.architecture=modern",
            )
            require(
                self.learned_positions or self.n_embd % 2 == 0,
                f"model.n_embd={self.n_embd} must be even for sinusoidal positions",
            )
        else:
            for spec in dataclasses.fields(self):
                value = getattr(self, spec.name)
                require(
                    spec.name not in CLASSIC_ONLY or value == spec.default,
                    f"model.{spec.name}={value} needs model.architecture=classic",
                )
            require(
                self.head_dim % 2 == 0,
                f"{'model.head_size' if self.head_size else 'model.n_embd/model.n_head'}={self.head_dim}"
                " must be even for rotary positions",
            )

    @property
    def head_dim(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    def layer_window(self, layer: int) -> int:
        """Tokens that a block sees, the token itself included; 0: all."""
        return self.window if layer % 2 else 0

    @property
    def n_params(self) -> int:
        """Trainable parameters, a tied head counted once."""
        C, F, q, kv = self.n_embd, self.n_ff, self.n_head * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * C * q + 2 * C * kv
        if self.architecture == "classic":
            norm, per_layer = 2 * C, attention + C + (2 * C * F + F + C) + (3 * C if self.qkv_bias else 0)
        else:
            norm, per_layer = C, attention + 3 * C * F + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * C * (1 if self.tied else 2) + (self.n_ctx * C if self.learned_positions else 0)
        return embeddings + self.n_layer * (per_layer + 2 * norm) + norm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where prepared data lies, and how to prepare it when it is not there yet."""

    dir: str = field("data/tinystories", "folder made by `tinystories prepare`; --data sets it")
    source: str = field("tinystories", "what to prepare when the folder is not there yet")
    val: str = field("", "validation source; empty: the source's own validation split, else 0.5 % held out")
    tokenizer: str = field("bpe:4096", "gpt2, bpe:N, or a tokenizer.json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Muon and AdamW; weight decay applies to matrices only."""

    kind: Literal["muon", "adamw"] = field(
        "muon", "muon: for the matrices of the blocks, with AdamW for the rest; adamw: for all"
    )
    muon_rate: float | Literal["auto"] = field(
        "auto", "peak of Muon's learning rate; auto: from the size of the model and of the batch"
    )
    momentum: float = field(0.95, "decay of Muon's mean of gradients")
    learning_rate: float | Literal["auto"] = field("auto", "peak of AdamW's learning rate; auto: likewise")
    beta1: float = field(0.9, "decay of the mean of gradients")
    beta2: float = field(0.95, "decay of the mean of their squares")
    eps: float = field(1e-8, "added to the root of that mean")
    weight_decay: float = field(0.1, "pull of matrices towards zero; norms and biases have none")
    grad_clip: float = field(1.0, "largest norm of all gradients together; 0: no clipping")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_rate"):
            rate = getattr(self, name)
            require(rate == "auto" or rate > 0, f"optim.{name}={rate} must be positive, or auto")
        require(0 <= self.momentum < 1, f"optim.momentum={self.momentum} must be in [0, 1)")
        require(0 <= self.beta1 < 1, f"optim.beta1={self.beta1} must be in [0, 1)")
        require(0 <= self.beta2 < 1, f"optim.beta2={self.beta2} must be in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        require(self.grad_clip >= 0, f"optim.grad_clip={self.grad_clip} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run, as fractions of its steps."""

    kind: Literal["cosine", "wsd"] = field("cosine", "cosine, or wsd: warm-up, stable, then linear decay")
    warmup: float = field(0.05, "fraction of the steps spent rising to the peak")
    decay: float = field(0.5, "fraction of the steps spent falling (wsd)")
    floor: float = field(0.05, "final learning rate as a fraction of the peak")

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

    init: str = field("", "model directory whose weights training begins with; empty: random ones")
    steps: int = field(2000, "optimizer steps of the whole run")
    batch_size: int = field(32, "rows of n_ctx tokens in an optimizer step")
    micro_batch: int | Literal["auto"] = field(
        32, "rows in one forward and backward pass; divides batch_size; auto: as many as the memory holds"
    )
    seed: int = field(1, "of weights, order of stories and dropout")
    device: str = field("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: Literal["auto", "fp32", "bf16"] = field(
        "auto", "auto: bf16 on CUDA devices that have it, fp32 elsewhere"
    )
    compile: Literal["auto", "on", "off"] = field("auto", "torch.compile; auto: on CUDA only")
    log_every: int = field(10, "steps between lines of the log")
    eval_every: int = field(250, "steps between evaluations, each with sample stories")
    eval_stories: int = field(200, "validation stories of these evaluations; the last one takes all")
    checkpoint_every: int = field(250, "steps between checkpoints")
    shard_optimizer: bool = field(
        False, "each of several processes keeps only its share of the optimizer's state (--train.shard_optimizer true)"
    )
    keep_checkpoints: int = field(2, "newest checkpoints kept, besides the best one")
    sample_prompts: tuple[str, ...] = field(
        ("Once upon a time", "Lily and Tom went to the park."), "openings of the sample stories"
    )
    sample_tokens: int = field(120, "longest sample story")
    tensorboard: bool = field(False, "write TensorBoard events too (--train.tensorboard true)")

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "log_every", "eval_every", "eval_stories")
        for name in (*names, "checkpoint_every", "keep_checkpoints", "sample_tokens"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(self.seed >= 0, f"train.seed={self.seed} must not be negative")
        require(
            self.micro_batch == "auto" or self.micro_batch > 0,
            f"train.micro_batch={self.micro_batch} must be positive, or auto",
        )
        require(
            self.micro_batch == "auto" or self.batch_size % self.micro_batch == 0,
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
    values = {name: parse_text(text, setting_type(name), name) for name, text in (overrides or {}).items()}
    where = str(file) if file is not None else "command line"
    return build_dataclass(Config, merge_overrides(settings, values, where), where)


def setting_type(dotted: str) -> Any:
    """The annotated type of `section.key`; `UserError` where there is no such setting."""
    section, _, key = dotted.partition(".")
    hints = get_type_hints(Config)
    if section not in hints or key not in get_type_hints(hints[section]):
        raise UserError(unknown_setting_message(dotted, setting_names()))
    return get_type_hints(hints[section])[key]


def merge_overrides(settings: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Tables of settings with `{"section.key": value}` laid over them; `where` names the file of the tables."""
    result = dict(settings)
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        table = result.get(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{where}: [{section}] must be a table of settings")
        result[section] = table | {key: value}
    return result


def read_toml(file: str | Path) -> dict[str, Any]:
    """Tables of a TOML file; a bare preset name means the preset."""
    path = preset_path(str(file)) if str(file) in PRESETS else Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors put a byte order mark first
    except FileNotFoundError:
        matches = difflib.get_close_matches(path.stem, PRESETS, n=1)
        hint = f"did you mean the preset {matches[0]}?" if matches else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"config {file} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested or long beyond reason
        raise UserError(f"config {file} cannot be read: {error}") from None


def build_dataclass(cls: type[T], settings: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """A frozen dataclass from plain values; strict about names and types.

    `where` names the file in error messages, `prefix` the section ("train.").
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            sections = get_type_hints(Config)
            known = [*sections, *setting_names()] if cls in (Config, *sections.values()) else list(hints)
            raise UserError(f"{where}: {unknown_setting_message(prefix + key, known)}")
        values[key] = validate(value, hints[key], where, prefix + key)
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def validate(value: Any, hint: Any, where: str, name: str) -> Any:
    """`value` if it is of the annotated type (an int will do for a float, a list for a tuple)."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: [{name}] must be a table of settings")
        return build_dataclass(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}: {name}={quoted(value)} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in UNION_TYPES:  # a number or a word
        number, word = get_args(hint)
        return validate(value, word if isinstance(value, str) else number, where, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: {name} must be a list of strings")
        return tuple(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {name} must be a number of at most 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name}={quoted(value)} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}: {name}={value} must be finite")
    return value


def parse_text(text: str, hint: Any, name: str) -> Any:
    """A flag's text as a value of the annotated type."""
    if hint is str or get_origin(hint) is Literal:
        return text
    if get_origin(hint) in UNION_TYPES:
        number, word = get_args(hint)
        if text in get_args(word):
            return text
        try:
            return parse_text(text, number, name)
        except UserError:
            raise UserError(f"--{name} {text!r}: expected a number or {' or '.join(get_args(word))}") from None
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


def unknown_setting_message(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name[:MAX_QUOTED_CHARS], list(known), n=1, cutoff=0.5)
    display_name = name if name.isprintable() and len(name) <= MAX_QUOTED_CHARS else quoted(name)
    return f"unknown setting {display_name}" + (
        f"; did you mean {matches[0]}?" if matches else "; see tinystories train --help"
    )


def replace_vocab(config: Config, vocab_size: int, where: str) -> Config:
    """The config with the vocabulary of its data; a size that was asked for and differs is an error."""
    requested = config.model.vocab_size
    if requested not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={requested} but the data in {where} has {vocab_size} ids; leave it 0 to follow the data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def to_toml(config: Config) -> str:
    """The resolved config as TOML text; `load_config` reads it back to an equal value."""
    import tomli_w  # comes with the [train] extra: only training writes TOML

    return tomli_w.dumps(dataclasses.asdict(config))
