"""Settings: frozen dataclasses, filled from defaults < TOML file < `--section.key value` flags.

Unknown names, wrong types and out-of-range values raise a `UserError` that names the setting. Imports only the
standard library.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tinystories.errors import MAX_QUOTED_CHARS, UserError, check_integer, check_number, quoted

T = TypeVar("T")

UNION_TYPES = (Union, UnionType)  # which of the two `int | Literal["auto"]` is depends on the Python version
PRESETS = ("nano", "small", "storyteller", "base", "seed-89m", "modern-89m")
CLASSIC_ONLY = ("learned_positions", "activation", "qkv_bias", "scaled_scores", "window")


def field(default: T, help_text: str) -> T:
    """Return a dataclass field whose description `tinystories train --help` prints."""
    result: T = dataclasses.field(default=default, metadata={"help": help_text})
    return result


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture and size of a GPT.

    `classic` is the original program's architecture; other settings make it GPT-2 or GPT-Neo. `modern` is Qwen3, or
    Llama without `qk_norm`.
    """

    architecture: Literal["classic", "modern"] = field(
        "modern", "classic: sinusoidal positions, LayerNorm, ReLU; modern: RoPE, RMSNorm, SwiGLU (Qwen3's layout)"
    )
    vocab_size: int = field(0, "vocabulary size; 0: taken from the prepared data")
    n_ctx: int = field(256, "context length in tokens")
    n_layer: int = field(6, "number of transformer blocks")
    n_head: int = field(4, "attention heads per block")
    n_kv_head: int = field(0, "key/value heads; 0: same as n_head; fewer: grouped-query attention (modern only)")
    n_embd: int = field(192, "width of the residual stream")
    head_size: int = field(0, "dimension of a head; 0: n_embd / n_head (modern only)")
    n_ff: int = field(512, "hidden width of the MLP")
    tied: bool = field(True, "tie the output head to the token embedding")
    qk_norm: bool = field(True, "RMSNorm on the queries and keys of each head (modern only)")
    rope_base: float = field(10000.0, "RoPE base frequency (modern only)")
    learned_positions: bool = field(False, "learned position embeddings instead of sinusoidal ones (classic only)")
    activation: Literal["relu", "gelu_tanh", "gelu_erf"] = field(
        "relu", "MLP activation: relu, gelu_tanh (GPT-2's approximation) or gelu_erf (exact); classic only"
    )
    qkv_bias: bool = field(False, "bias in the query, key and value projections (classic only)")
    scaled_scores: bool = field(True, "divide attention scores by the square root of the head dimension (classic only)")
    window: int = field(
        0, "sliding attention window of every second block, in tokens; 0: full attention (classic only)"
    )
    norm_eps: float = field(1e-5, "epsilon added to the variance in LayerNorm and RMSNorm")
    dropout: float = field(0.0, "dropout probability during training")

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
                f"model.n_kv_head={self.n_kv_head}: the classic architecture does not support grouped-query attention;"
                " leave it 0 or set model.architecture=modern",
            )
            require(
                self.head_dim * self.n_head == self.n_embd,
                f"model.head_size={self.head_size}: the classic architecture requires n_embd / n_head;"
                " leave it 0 or set model.architecture=modern",
            )
            require(
                self.learned_positions or self.n_embd % 2 == 0,
                f"model.n_embd={self.n_embd} must be even for sinusoidal position embeddings",
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
                " must be even for RoPE",
            )

    @property
    def head_dim(self) -> int:
        """Dimension of an attention head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_head or self.n_head

    def layer_window(self, layer: int) -> int:
        """Return the attention window of a block in tokens, the current token included; 0: full attention."""
        return self.window if layer % 2 else 0

    @property
    def n_params(self) -> int:
        """Number of trainable parameters; a tied head is counted once."""
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
    """Where the prepared data is stored, and how to prepare it if it does not exist."""

    dir: str = field("data/tinystories", "folder made by `tinystories prepare`; --data sets it")
    source: str = field("tinystories", "source to prepare if the folder does not exist")
    val: str = field("", "validation source; empty: the source's own validation split, or 0.5 % held out")
    tokenizer: str = field("bpe:4096", "gpt2, bpe:N (trained with N token ids) or a tokenizer.json file")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer settings. Weight decay applies to matrices only."""

    kind: Literal["muon", "adamw"] = field(
        "muon", "muon: Muon for the matrices of the blocks and AdamW for all other weights; adamw: AdamW for all"
    )
    muon_rate: float | Literal["auto"] = field(
        "auto", "Muon peak learning rate; auto: from the model size and batch size"
    )
    momentum: float = field(0.95, "Muon momentum")
    learning_rate: float | Literal["auto"] = field(
        "auto", "AdamW peak learning rate; auto: from the model size and batch size"
    )
    beta1: float = field(0.9, "Adam beta1")
    beta2: float = field(0.95, "Adam beta2")
    eps: float = field(1e-8, "Adam epsilon")
    weight_decay: float = field(0.1, "weight decay, applied to matrices only")
    grad_clip: float = field(1.0, "gradient clipping by global norm; 0: off")

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
    """Learning rate schedule; durations are fractions of the run's steps."""

    kind: Literal["cosine", "wsd"] = field("cosine", "cosine, or wsd: warmup, stable, then linear decay")
    warmup: float = field(0.05, "fraction of the steps for linear warmup to the peak")
    decay: float = field(0.5, "fraction of the steps for the final decay (wsd only)")
    floor: float = field(0.05, "final learning rate, as a fraction of the peak")

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, f"schedule.warmup={self.warmup} must be in [0, 1)")
        require(0 <= self.floor <= 1, f"schedule.floor={self.floor} must be in [0, 1]")
        require(0 <= self.decay <= 1, f"schedule.decay={self.decay} must be in [0, 1]")
        require(
            self.kind == "cosine" or self.warmup + self.decay <= 1,
            f"schedule.warmup={self.warmup} and schedule.decay={self.decay} must add up to at most 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training run. Steps are optimizer steps; a row is a window of n_ctx tokens."""

    init: str = field("", "model directory to initialize the weights from; empty: random initialization")
    steps: int = field(2000, "number of optimizer steps")
    batch_size: int = field(32, "rows of n_ctx tokens per optimizer step")
    micro_batch: int | Literal["auto"] = field(
        32,
        "rows per forward and backward pass; divides batch_size (gradient accumulation); auto: as many as fit memory",
    )
    seed: int = field(1, "random seed of weights, data order and dropout")
    device: str = field("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: Literal["auto", "fp32", "bf16"] = field(
        "auto", "auto: bf16 on CUDA devices that support it, fp32 elsewhere"
    )
    compile: Literal["auto", "on", "off"] = field("auto", "torch.compile; auto: on CUDA only")
    log_every: int = field(10, "steps between log lines")
    eval_every: int = field(250, "steps between evaluations, each of which also writes sample stories")
    eval_stories: int = field(200, "validation stories per evaluation; the final one uses all")
    checkpoint_every: int = field(250, "steps between checkpoints")
    shard_optimizer: bool = field(False, "shard the optimizer state across processes (--train.shard_optimizer true)")
    keep_checkpoints: int = field(2, "number of latest checkpoints to keep, in addition to the best")
    sample_prompts: tuple[str, ...] = field(
        ("Once upon a time", "Lily and Tom went to the park."), "prompts of the sample stories, separated by |"
    )
    sample_tokens: int = field(120, "maximum length of a sample story in tokens")
    tensorboard: bool = field(False, "also write TensorBoard events (--train.tensorboard true)")

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
    """How the next token is sampled: repetition penalty, temperature, top_k, top_p and min_p, applied in this order."""

    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.05  # 0: off
    repetition_penalty: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check_number(name, getattr(self, name))
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
    """All settings of a training run; saved with its checkpoints as `config.toml`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds (a comparison with NaN never does)."""
    if not condition:
        raise UserError(message)


def preset_path(name: str) -> Path:
    """Return the TOML file of a preset: inside an installed package, or in `configs/` of a checkout."""
    installed = Path(__file__).parent / "configs" / f"{name}.toml"
    return installed if installed.exists() else Path(__file__).parents[2] / "configs" / f"{name}.toml"


def load_config(file: str | Path | None, overrides: Mapping[str, str] | None = None) -> Config:
    """Load a TOML file or a preset, and apply overrides of the form `{"section.key": "value as text"}`."""
    settings: dict[str, Any] = read_toml(file) if file is not None else {}
    values = {name: parse_text(text, setting_type(name), name) for name, text in (overrides or {}).items()}
    where = str(file) if file is not None else "command line"
    return build_dataclass(Config, merge_overrides(settings, values, where), where)


def setting_type(dotted: str) -> Any:
    """Return the annotated type of the setting `section.key`. `UserError` if it does not exist."""
    section, _, key = dotted.partition(".")
    hints = get_type_hints(Config)
    if section not in hints or key not in get_type_hints(hints[section]):
        raise UserError(unknown_setting_message(dotted, setting_names()))
    return get_type_hints(hints[section])[key]


def merge_overrides(settings: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return TOML tables with `{"section.key": value}` applied; `where` names their file in error messages."""
    result = dict(settings)
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        table = result.get(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{where}: [{section}] must be a table of settings")
        result[section] = table | {key: value}
    return result


def read_toml(file: str | Path) -> dict[str, Any]:
    """Read a TOML file, or a preset by its name, as nested tables."""
    path = preset_path(str(file)) if str(file) in PRESETS else Path(file)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors put a byte order mark first
    except FileNotFoundError:
        matches = difflib.get_close_matches(path.stem, PRESETS, n=1)
        hint = f"did you mean the preset {matches[0]}?" if matches else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"config {file} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, too deeply nested
        raise UserError(f"config {file} cannot be read: {error}") from None


def build_dataclass(cls: type[T], settings: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Build a frozen dataclass from plain values. `UserError` for an unknown name or a value of the wrong type.

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
    """Return `value` converted to the annotated type (int to float, list to tuple). `UserError` if it does not fit."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: [{name}] must be a table of settings")
        return build_dataclass(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}: {name}={quoted(value)} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in UNION_TYPES:  # a number or a keyword such as "auto"
        number, word = get_args(hint)
        return validate(value, word if isinstance(value, str) else number, where, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: {name} must be a list of strings")
        return tuple(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {name} must be a 64-bit integer")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name}={quoted(value)} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}: {name}={value} must be finite")
    return value


def parse_text(text: str, hint: Any, name: str) -> Any:
    """Parse the text of a flag as a value of the annotated type; lists are separated by `|`."""
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
    """Return the names of all settings as `section.key`."""
    return [f"{section}.{key}" for section, kind in get_type_hints(Config).items() for key in get_type_hints(kind)]


def unknown_setting_message(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name[:MAX_QUOTED_CHARS], list(known), n=1, cutoff=0.5)
    display_name = name if name.isprintable() and len(name) <= MAX_QUOTED_CHARS else quoted(name)
    return f"unknown setting {display_name}" + (
        f"; did you mean {matches[0]}?" if matches else "; see tinystories train --help"
    )


def replace_vocab(config: Config, vocab_size: int, where: str) -> Config:
    """Set the vocabulary size of the data. `UserError` if the config asks for a different one."""
    requested = config.model.vocab_size
    if requested not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={requested} but the data in {where} has {vocab_size} token ids;"
            " set it to 0 to follow the data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def to_toml(config: Config) -> str:
    """Return the config as TOML text, which `load_config` reads back to an equal value."""
    import tomli_w  # part of the [train] extra: only training writes TOML

    return tomli_w.dumps(dataclasses.asdict(config))
