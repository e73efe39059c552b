"""Settings: frozen dataclasses whose fields have a description and a range. `config_file` fills them.

An out-of-range value raises a `UserError` that names the setting. Imports only the standard library.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from tinystories.errors import UserError, check_bool, check_integer, check_number

T = TypeVar("T")

CLASSIC_ONLY = ("learned_positions", "activation", "qkv_bias", "scaled_scores", "window")


class Range(NamedTuple):
    """The values that a setting may have; `words` complete an error message."""

    words: str
    contains: Callable[[Any], bool]  # False for NaN


POSITIVE = Range("must be positive", lambda x: x > 0)
MAX_CONTEXT = 1 << 20  # tokens; position tables of this length are built whenever a model is loaded
CONTEXT = Range(f"must be between 1 and {MAX_CONTEXT}", lambda x: 0 < x <= MAX_CONTEXT)
POSITIVE_OR_AUTO = Range("must be positive, or auto", lambda x: x == "auto" or x > 0)
NOT_NEGATIVE = Range("must not be negative", lambda x: x >= 0)
ABOVE_ONE = Range("must be greater than 1", lambda x: x > 1)
BELOW_ONE = Range("must be in [0, 1)", lambda x: 0 <= x < 1)
FRACTION = Range("must be in [0, 1]", lambda x: 0 <= x <= 1)
POSITIVE_FRACTION = Range("must be in (0, 1]", lambda x: 0 < x <= 1)
FINITE_POSITIVE = Range("must be a positive number", lambda x: 0 < x < math.inf)
FINITE_NOT_NEGATIVE = Range("must be 0 or a positive number", lambda x: 0 <= x < math.inf)


def field(default: T, help_text: str, allowed: Range | None = None) -> T:
    """Return a dataclass field with a description, which `tinystories train --help` prints, and a range."""
    result: T = dataclasses.field(default=default, metadata={"help": help_text, "range": allowed})
    return result


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds (a comparison with NaN never does)."""
    if not condition:
        raise UserError(message)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise `UserError` if a field of a dataclass is out of its range; `prefix` is its section ("train.")."""
    for spec in dataclasses.fields(settings):
        value, allowed = getattr(settings, spec.name), spec.metadata["range"]
        if allowed is not None:
            require(allowed.contains(value), f"{prefix}{spec.name}={value} {allowed.words}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture and size of a GPT.

    `classic` is the original program's architecture; other settings make it GPT-2 or GPT-Neo. `modern` is Qwen3, or
    Llama without `qk_norm`.
    """

    architecture: Literal["classic", "modern"] = field(
        "modern", "classic: sinusoidal positions, LayerNorm, ReLU; modern: RoPE, RMSNorm, SwiGLU (Qwen3's layout)"
    )
    vocab_size: int = field(0, "vocabulary size; 0: taken from the prepared data", NOT_NEGATIVE)
    n_ctx: int = field(256, "context length in tokens", CONTEXT)
    n_layer: int = field(6, "number of transformer blocks", POSITIVE)
    n_head: int = field(4, "attention heads per block", POSITIVE)
    n_kv_head: int = field(
        0, "key/value heads; 0: same as n_head; fewer: grouped-query attention (modern only)", NOT_NEGATIVE
    )
    n_embd: int = field(192, "width of the residual stream", POSITIVE)
    head_size: int = field(0, "dimension of a head; 0: n_embd / n_head (modern only)", NOT_NEGATIVE)
    n_ff: int = field(512, "hidden width of the MLP", POSITIVE)
    tied: bool = field(True, "tie the output head to the token embedding")
    qk_norm: bool = field(True, "RMSNorm on the queries and keys of each head (modern only)")
    rope_base: float = field(10000.0, "RoPE base frequency (modern only)", ABOVE_ONE)
    learned_positions: bool = field(False, "learned position embeddings instead of sinusoidal ones (classic only)")
    activation: Literal["relu", "gelu_tanh", "gelu_erf"] = field(
        "relu", "MLP activation: relu, gelu_tanh (GPT-2's approximation) or gelu_erf (exact); classic only"
    )
    qkv_bias: bool = field(False, "bias in the query, key and value projections (classic only)")
    scaled_scores: bool = field(True, "divide attention scores by the square root of the head dimension (classic only)")
    window: int = field(
        0, "sliding attention window of every second block, in tokens; 0: full attention (classic only)", NOT_NEGATIVE
    )
    norm_eps: float = field(1e-5, "epsilon added to the variance in LayerNorm and RMSNorm", POSITIVE)
    dropout: float = field(0.0, "dropout probability during training", BELOW_ONE)

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        require(
            self.head_size > 0 or self.n_embd % self.n_head == 0,
            f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}",
        )
        require(
            self.n_head % self.kv_heads == 0,
            f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}",
        )
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
        "auto", "Muon peak learning rate; auto: from the model size and batch size", POSITIVE_OR_AUTO
    )
    momentum: float = field(0.95, "Muon momentum", BELOW_ONE)
    learning_rate: float | Literal["auto"] = field(
        "auto", "AdamW peak learning rate; auto: from the model size and batch size", POSITIVE_OR_AUTO
    )
    beta1: float = field(0.9, "Adam beta1", BELOW_ONE)
    beta2: float = field(0.95, "Adam beta2", BELOW_ONE)
    eps: float = field(1e-8, "Adam epsilon", POSITIVE)
    weight_decay: float = field(0.1, "weight decay, applied to matrices only", NOT_NEGATIVE)
    grad_clip: float = field(1.0, "gradient clipping by global norm; 0: off", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_ranges(self, "optim.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate schedule; durations are fractions of the run's steps."""

    kind: Literal["cosine", "wsd"] = field("cosine", "cosine, or wsd: warmup, stable, then linear decay")
    warmup: float = field(0.05, "fraction of the steps for linear warmup to the peak", BELOW_ONE)
    decay: float = field(0.5, "fraction of the steps for the final decay (wsd only)", FRACTION)
    floor: float = field(0.05, "final learning rate, as a fraction of the peak", FRACTION)

    def __post_init__(self) -> None:
        check_ranges(self, "schedule.")
        require(
            self.kind == "cosine" or self.warmup + self.decay <= 1,
            f"schedule.warmup={self.warmup} and schedule.decay={self.decay} must add up to at most 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training run. Steps are optimizer steps; a row is a window of n_ctx tokens."""

    init: str = field("", "model directory to initialize the weights from; empty: random initialization")
    steps: int = field(2000, "number of optimizer steps", POSITIVE)
    batch_size: int = field(32, "rows of n_ctx tokens per optimizer step", POSITIVE)
    micro_batch: int | Literal["auto"] = field(
        32,
        "rows per forward and backward pass; divides batch_size (gradient accumulation); auto: as many as fit memory",
        POSITIVE_OR_AUTO,
    )
    seed: int = field(1, "random seed of weights, data order and dropout", NOT_NEGATIVE)
    device: str = field("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: Literal["auto", "fp32", "bf16"] = field(
        "auto", "auto: bf16 on CUDA devices that support it; on CPUs the faster kernels for fp32, measured"
    )
    teacher: tuple[str, ...] = field(
        (), "model directories to learn from as well (distillation), separated by |; their probabilities are averaged"
    )
    teacher_weight: float = field(1.0, "weight of the KL divergence to the teachers; cross-entropy has 1", NOT_NEGATIVE)
    teacher_temperature: float = field(
        1.0, "divides the logits of teachers and student in the KL divergence", FINITE_POSITIVE
    )
    compile: Literal["auto", "on", "off"] = field("auto", "torch.compile; auto: on CUDA only")
    log_every: int = field(10, "steps between log lines", POSITIVE)
    eval_every: int = field(250, "steps between evaluations, each of which also writes sample stories", POSITIVE)
    eval_stories: int = field(200, "validation stories per evaluation; the final one uses all", POSITIVE)
    checkpoint_every: int = field(250, "steps between checkpoints", POSITIVE)
    shard_optimizer: bool = field(False, "shard the optimizer state across processes (--train.shard_optimizer true)")
    keep_checkpoints: int = field(2, "number of latest checkpoints to keep, in addition to the best", POSITIVE)
    sample_prompts: tuple[str, ...] = field(
        ("Once upon a time", "Lily and Tom went to the park."), "prompts of the sample stories, separated by |"
    )
    sample_tokens: int = field(120, "maximum length of a sample story in tokens", POSITIVE)
    tensorboard: bool = field(False, "also write TensorBoard events (--train.tensorboard true)")

    def __post_init__(self) -> None:
        check_ranges(self, "train.")
        require(
            self.micro_batch == "auto" or self.batch_size % self.micro_batch == 0,
            f"train.batch_size={self.batch_size} must be a multiple of train.micro_batch={self.micro_batch}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is sampled: repetition penalty, temperature, top_k, top_p and min_p, applied in this order."""

    temperature: float = field(0.8, "0: greedy", FINITE_NOT_NEGATIVE)
    top_k: int = field(0, "0: off", NOT_NEGATIVE)
    top_p: float = field(1.0, "1: off", POSITIVE_FRACTION)
    min_p: float = field(0.05, "0: off", FRACTION)
    repetition_penalty: float = field(1.0, "1: off", FINITE_POSITIVE)
    repetition_window: int = field(0, "tokens that the penalty looks back (0: the whole story)", NOT_NEGATIVE)
    penalize_names: bool = field(True, "false: not on capitalized words, nor on tokens that continue a word")

    def __post_init__(self) -> None:
        check_integer("top_k", self.top_k)
        check_integer("repetition_window", self.repetition_window)
        check_bool("penalize_names", self.penalize_names)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check_number(name, getattr(self, name))
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a training run; saved with its checkpoints as `config.toml`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def replace_vocab(config: Config, vocab_size: int, where: str) -> Config:
    """Set the vocabulary size of the data. `UserError` if the config asks for a different one.

    With train.init the model may have more ids than its tokenizer: many models are padded to a round number.
    """
    requested = config.model.vocab_size
    if config.train.init and requested >= vocab_size:
        return config
    if requested not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={requested} but the data in {where} has {vocab_size} token ids;"
            " set it to 0 to follow the data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
