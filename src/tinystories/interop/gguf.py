"""`modern` as a GGUF file, which llama.cpp and Ollama read, and models of llama.cpp as ours.

With QK-norm it is architecture `qwen3`, without it `llama`, whose rotations pair neighbours: the rows of its queries
and keys stand in that order in the file.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig, SamplingConfig, build
from tinystories.data.tokenizer import END
from tinystories.engine.cpu.plan import EMBEDDING, HEAD
from tinystories.engine.cpu.weights import expected_shapes
from tinystories.errors import UserError
from tinystories.interop import gguf_vocabulary
from tinystories.interop.gguf_file import GgufFile, package
from tinystories.interop.llama2c import halved, interleaved
from tinystories.interop.portable import Portable

Array = npt.NDArray[Any]

TOP = {EMBEDDING: "token_embd.weight", "norm.weight": "output_norm.weight", HEAD: "output.weight"}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PRECISIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
LARGEST_F16 = 65504.0
# Of an architecture's settings, those that are ours, and the values by which others change nothing.
SETTINGS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
)
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.type": "none"}
HINT = (
    'next: llama-completion -m {out} -no-cnv -p "Once upon a time"\n'
    'or, in its folder: ollama create stories -f {out.stem}.Modelfile; ollama run stories "Once upon a time"'
)
MOST_CONTEXT = 1 << 20  # tokens; a cache is made for all of them
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write(model: Portable, path: Path, precision: str) -> None:
    """The file with its tokenizer, and a Modelfile for Ollama beside it.

    In q8_0 and q4_0 the tensors are of the types that llama.cpp's own quantiser chooses (see `kind_of`).
    """

    def describe(writer: Any) -> None:
        writer.add_name(str(model.provenance.get("name") or path.stem))
        for key, add in (("license", writer.add_license), ("description", writer.add_description)):
            if isinstance(text := model.provenance.get(key), str):
                add(text)
        for ours, theirs in SAMPLING.items():
            getattr(writer, f"add_sampling_{theirs}")(getattr(model.sampling, ours))
        writer.add_sampling_penalty_repeat(model.sampling.repetition_penalty)
        writer.add_sampling_penalty_last_n(-1)
        gguf_vocabulary.add_to(writer, model.tokenizer, model.config.vocab_size)

    write_gguf(model.config, model.weights, path, precision, describe)
    path.with_suffix(".Modelfile").write_text(modelfile(model, path.with_suffix("").name, path.name), encoding="utf-8")


def logits(path: Path, ids: list[int]) -> Array:
    """(T, V) logits of our own engine with the file's weights, out of the precision they are stored in."""
    return read(path, None).logits(ids)


def read(path: Path, tokenizer: Path | None) -> Portable:
    """A model of llama.cpp's architectures qwen3 and llama, in any precision that the `gguf` package reads."""
    file = GgufFile(path)
    architecture = file.get("general.architecture", str)
    if architecture not in ("qwen3", "llama"):
        raise UserError(f"{path} is of architecture {architecture!r:.40}; only qwen3 and llama can be read")
    try:
        config = config_of(file, architecture)
        model = Portable(
            config=config,
            weights=weights_of(file, config),
            tokenizer=gguf_vocabulary.read(file, tokenizer),
            sampling=sampling_of(file),
            provenance={"imported_from": path.name, "format": f"GGUF {architecture}"}
            | {key: file.values[f"general.{key}"] for key in ("name", "license") if f"general.{key}" in file.values},
        )
        model.check()
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    return model


def why_not(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot run a model; None if it can."""
    if config.architecture == "classic":
        return "has no model like classic: its gpt2 has learned positions and GELU, ours sinusoids and ReLU"
    return None


def write_gguf(
    config: ModelConfig,
    weights: Mapping[str, Array],
    path: Path,
    precision: str = "f32",
    describe: Callable[[Any], None] = lambda writer: writer.add_tokenizer_model("no_vocab"),
) -> None:
    """The model; `describe(writer)` adds what is known of it besides (without: it is given ids and gives ids)."""
    if reason := why_not(config):
        raise UserError(f"llama.cpp {reason}; use --format hf or onnx")
    gguf = package()
    writer = gguf.GGUFWriter(path, "qwen3" if config.qk_norm else "llama")
    describe(writer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_file_type(gguf.LlamaFileType[PRECISIONS[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, theirs in names_of(config):
        weight = np.ascontiguousarray(weights[name], np.float32)
        kind = gguf.GGMLQuantizationType[kind_of(config, name, precision)]
        if kind.name != "F32" and np.abs(weight).max() > LARGEST_F16:
            raise UserError(f"weight {name} is too large for {precision}; use --precision f32")
        if is_rotated(config, name):
            weight = interleaved(weight, config.head_dim)
        writer.add_tensor(theirs, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def kind_of(config: ModelConfig, name: str, precision: str) -> str:
    """Type of a tensor, as llama.cpp's quantiser chooses it.

    Vectors stay in f32. Rows that are no whole blocks of 32 stay in f16. In q4_0 the head (tied: the embedding) has 8
    bits; llama.cpp gives it 6 where rows are whole blocks of 256, which the `gguf` package cannot write.
    """
    shape = expected_shapes(config)[name]
    if precision == "f32" or len(shape) == 1:
        return "F32"
    if precision == "f16" or shape[1] % 32:
        return "F16"
    if name == (EMBEDDING if config.tied else HEAD):
        return "Q8_0"
    return precision.upper()


def names_of(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(Our name, llama.cpp's) of each weight."""
    for name in expected_shapes(config):
        if name in TOP:
            yield name, TOP[name]
        else:
            _, layer, rest = name.split(".", 2)
            yield name, f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def is_rotated(config: ModelConfig, name: str) -> bool:
    """Whether the rows of a weight stand in another order in the file."""
    return not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight"))


def config_of(file: GgufFile, architecture: str) -> ModelConfig:
    """`UserError` where a setting is missing, impossible, or one that our architectures do not have."""

    def whole(key: str, default: int | None = None) -> int:
        return file.get(f"{architecture}.{key}", int, default)

    for name in file.values:
        key = name.removeprefix(f"{architecture}.")
        neutral = key in NEUTRAL and file.get(name, type(NEUTRAL[key])) == NEUTRAL[key]
        if key != name and key not in SETTINGS and not neutral:
            raise UserError(f"{name} is set, which our architectures do not have")
    n_head, n_embd, n_layer, n_ctx = (
        whole(key) for key in ("attention.head_count", "embedding_length", "block_count", "context_length")
    )
    n_kv_head = whole("attention.head_count_kv", n_head)
    if TOP[EMBEDDING] not in file.tensors or n_layer > len(file.tensors) or n_ctx > MOST_CONTEXT:
        raise UserError(f"{n_layer:,} blocks, a context of {n_ctx:,} and {len(file.tensors):,} tensors cannot be")
    sizes = {
        "architecture": "modern",
        "vocab_size": file.tensors[TOP[EMBEDDING]].shape[0],
        "n_ctx": n_ctx,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": 0 if n_kv_head == n_head else n_kv_head,
        "n_embd": n_embd,
        "n_ff": whole("feed_forward_length"),
        "tied": TOP[HEAD] not in file.tensors,
        "qk_norm": architecture == "qwen3",
        "rope_base": file.get(f"{architecture}.rope.freq_base", float, 10000.0),
        "norm_eps": file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
    }
    config = build(ModelConfig, sizes, str(file.path))
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if whole(key, config.head_dim) != config.head_dim:
            raise UserError(f"{architecture}.{key}={whole(key)}, but only embedding / heads = {config.head_dim} fits")
    return config


def weights_of(file: GgufFile, config: ModelConfig) -> dict[str, Array]:
    """By our names, fp32."""
    names, shapes = dict(names_of(config)), expected_shapes(config)
    if unknown := file.tensors.keys() - names.values():
        raise UserError(f"tensor {min(unknown)!r} has no place in our architectures")
    weights = {}
    for name, theirs in names.items():
        if theirs not in file.tensors:
            raise UserError(f"tensor {theirs!r} is missing; convert the model again")
        if file.tensors[theirs].shape != shapes[name]:
            raise UserError(f"tensor {theirs!r} is {file.tensors[theirs].shape}, not {shapes[name]}")
        weight = file.weight(theirs)
        weights[name] = halved(weight, config.head_dim) if is_rotated(config, name) else weight
    return weights


def sampling_of(file: GgufFile) -> SamplingConfig:
    """The file's own settings, where it has some; ours for the rest."""
    names = SAMPLING | {"repetition_penalty": "penalty_repeat"}
    found = {ours: file.values.get(f"general.sampling.{theirs}") for ours, theirs in names.items()}
    return build(SamplingConfig, {name: value for name, value in found.items() if value is not None}, str(file.path))


def modelfile(model: Portable, name: str, file: str) -> str:
    """What Ollama must know besides (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx)."""
    sampling = model.sampling
    settings = {
        "num_ctx": model.config.n_ctx,
        **{key: getattr(sampling, key) for key in SAMPLING},
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1,  # all of the story, as ours
        "stop": f'"{END}"',
    }
    lines = (f"PARAMETER {key} {value}" for key, value in settings.items())
    head = f'# ollama create {name} -f {name}.Modelfile\nFROM ./{file}\nTEMPLATE "{{{{ .Prompt }}}}"\n'
    return head + "\n".join(lines) + "\n"
