"""Mapping between our config and weights and those of Hugging Face transformers, both ways, in NumPy.

GPT-2 and GPT-Neo map to `classic`, Llama and Qwen3 to `modern`. What the other side cannot represent exactly is
refused.
"""

import dataclasses
import itertools
import re
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from tinystories.config import MAX_CONTEXT, ModelConfig
from tinystories.config_file import build_dataclass, validate
from tinystories.errors import UserError, quoted
from tinystories.formats.bundle import MAX_LAYERS, Array
from tinystories.position_tables import build_sinusoid_table
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING, check_weights, expected_shapes

if TYPE_CHECKING:
    from torch import Tensor


# For each `model_type`: config.json keys that correspond to one of our settings, and its name.
GPT_SETTINGS = {"vocab_size": "vocab_size", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"}
LLAMA_SETTINGS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_ctx",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "kv_heads",
    "hidden_size": "n_embd",
    "head_dim": "head_dim",
    "intermediate_size": "n_ff",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
SETTINGS_BY_TYPE = {
    "gpt2": GPT_SETTINGS
    | {"n_positions": "n_ctx", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_ff"},
    "gpt_neo": GPT_SETTINGS
    | {"max_position_embeddings": "n_ctx", "num_layers": "n_layer", "num_heads": "n_head"}
    | {"hidden_size": "n_embd", "intermediate_size": "n_ff"},
    "llama": LLAMA_SETTINGS,
    "qwen3": LLAMA_SETTINGS,
}
# Computed properties of ModelConfig, and the field that sets each.
PROPERTY_FIELDS = {"kv_heads": "n_kv_head", "head_dim": "head_size"}
# transformers' defaults for keys that config.json omits.
GPT_DEFAULTS = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "activation_function": "gelu_new"}
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT_DEFAULTS,
    "gpt_neo": GPT_DEFAULTS,
    "llama": LLAMA_DEFAULTS,
    "qwen3": LLAMA_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
}
# Keys that must have one of these values; a missing key means the first.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_sliding_window": (False,),
}
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu_erf", "gelu_pytorch_tanh": "gelu_tanh"}

# Module names of GPT-2 and GPT-Neo; Llama and Qwen3 use the same names as we do.
NAME_PREFIX = {"gpt2": "transformer.", "gpt_neo": "transformer.", "llama": "model.", "qwen3": "model."}
TOP_NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
GPT_LAYER_NAMES = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
LAYER_NAMES = {
    "gpt2": GPT_LAYER_NAMES
    | {f"self_attn.{name}_proj": "attn.c_attn" for name in "qkv"}
    | {"self_attn.o_proj": "attn.c_proj"},
    "gpt_neo": GPT_LAYER_NAMES
    | {f"self_attn.{name}_proj": f"attn.attention.{name}_proj" for name in "qkv"}
    | {"self_attn.o_proj": "attn.attention.out_proj"},
}
# Causal masks and RoPE frequencies, which older checkpoints contain; they are not weights.
BUFFER_NAMES = re.compile(r"\.attn\.(attention\.)?(masked_)?bias$|rotary_emb\.inv_freq$")


def from_transformers(
    settings: Mapping[str, Any],
    weights: Mapping[str, Array],
    where: str = "the model",
    other_types: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[ModelConfig, dict[str, Array]]:
    """Convert a transformers config.json and its weights to our config and fp32 weights.

    `weights`: floating-point NumPy arrays (NumPy has no bf16, so convert that first). `other_types`: types of tensors
    that are not floating-point, by name; one of them may be a mask but not a weight. A position table that equals our
    sinusoids and qkv biases that are all zero are dropped. `UserError`, naming `where`, if a weight is missing, unknown
    or misshapen, or if something cannot be represented exactly. Messages have our names of the weights.
    """
    config = read_config(settings)
    model_type = settings["model_type"]
    name_map = build_name_map(model_type, config)
    if not any(name.startswith(NAME_PREFIX[model_type]) for name in weights):  # a bare model, saved without its LM head
        name_map = {name.removeprefix(NAME_PREFIX[model_type]): ours for name, ours in name_map.items()}
    name_map.setdefault(LM_HEAD, [LM_HEAD])  # some files have it beside the embedding that it is tied to
    for name, type_name in other_types.items():
        if name in name_map:
            raise UserError(
                f"{where}: weight {quoted(name)} is of type {type_name}, which is not supported; convert it to fp32,"
                " fp16 or bf16"
            )
    ours: dict[str, Array] = {}
    for name, array in weights.items():
        if BUFFER_NAMES.search(name):
            continue
        if name not in name_map:
            raise UserError(f"{where}: weight {quoted(name)} is unknown")
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{where}: weight {quoted(name)} is {array.dtype}, not floating-point")
        parts, array = name_map[name], array.T if is_transposed(model_type, name) else array
        pieces = [array] if len(parts) == 1 else np.array_split(np.atleast_1d(array), len(parts))
        with np.errstate(over="ignore"):  # `ModelBundle.check` rejects infinities
            ours |= {part: np.ascontiguousarray(x, np.float32) for part, x in zip(parts, pieces, strict=True)}
    if config.tied and LM_HEAD in ours and not np.array_equal(ours.pop(LM_HEAD), ours.get(EMBEDDING, ())):
        raise UserError(f"{where}: {LM_HEAD} differs from the embedding, but config.json has tie_word_embeddings=true")
    check_weights({name: weight.shape for name, weight in ours.items()}, config, where)
    return drop_explicit_tables(config, ours)


def to_hf_config_and_weights(
    config: ModelConfig, weights: Mapping[str, Array]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Convert our config and weights to a transformers config.json and weights; the inverse of `from_transformers`.

    `weights`: by our names in `model.safetensors`. A tied LM head is omitted. `UserError` if transformers has no
    architecture that represents the model.
    """
    settings = build_hf_config(config)
    model_type = settings["model_type"]
    if config.architecture == "classic":
        config, weights = add_explicit_tables(config, weights, model_type)
    hf_weights = {}
    for name, names in build_name_map(model_type, config).items():
        array = np.concatenate([weights[part] for part in names]) if len(names) > 1 else weights[names[0]]
        hf_weights[name] = np.ascontiguousarray(array.T if is_transposed(model_type, name) else array)
    return settings, hf_weights


def to_transformers(config: ModelConfig, weights: "Mapping[str, Tensor]") -> Any:
    """Build the model as a transformers class in eval mode; logits equal ours up to rounding.

    `classic` becomes GPT2LMHeadModel or GPTNeoForCausalLM, `modern` Qwen3ForCausalLM or LlamaForCausalLM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, hf_weights = to_hf_config_and_weights(
        config, {name: weight.cpu().numpy() for name, weight in weights.items()}
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    tensors = {name: torch.from_numpy(array) for name, array in hf_weights.items()}
    if config.tied:
        tensors[LM_HEAD] = tensors[hf_name(settings["model_type"], EMBEDDING)]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def read_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Convert a transformers config.json to ours; `UserError` if it is invalid or unsupported.

    The result has learned positions and, for GPT-2, qkv biases, since the file has those weights;
    `drop_explicit_tables` simplifies it afterwards.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in SETTINGS_BY_TYPE:
        raise UserError(f"config.json: model_type={quoted(model_type)} is not one of {', '.join(SETTINGS_BY_TYPE)}")
    for name, allowed in REQUIRED_VALUES.items():
        if (value := settings.get(name, allowed[0])) not in allowed:
            raise UserError(f"config.json: {name}={quoted(value)} is not supported, only {allowed[0]!r}")
    hf_settings, field_types = DEFAULTS[model_type] | dict(settings), get_type_hints(ModelConfig)
    values: dict[str, Any] = {"architecture": "classic" if model_type in LAYER_NAMES else "modern"}
    for name, attribute in SETTINGS_BY_TYPE[model_type].items():
        field, value = PROPERTY_FIELDS.get(attribute, attribute), hf_settings.get(name)
        if value is None and attribute in PROPERTY_FIELDS:
            value = 0  # our default: n_kv_head = n_head, head_size = n_embd / n_head
        elif value is None and attribute == "n_ff" and model_type in LAYER_NAMES:
            value = 4 * values["n_embd"]
        elif value is None:
            raise UserError(f"config.json: {name} is missing")
        values[field] = validate(value, field_types[field], "config.json", name)
    if values["n_layer"] > MAX_LAYERS or values["n_ctx"] > MAX_CONTEXT:  # checked before anything is allocated
        raise UserError(f"config.json: implausible sizes: n_layer={values['n_layer']:,}, n_ctx={values['n_ctx']:,}")
    if model_type in LAYER_NAMES:
        values |= parse_classic(model_type, hf_settings, values["n_layer"])
    else:
        values |= parse_modern(model_type, hf_settings, values)
    config = build_dataclass(ModelConfig, values, "config.json", "model.")
    if config.vocab_size == 0:
        raise UserError("config.json: vocab_size=0 must be positive")
    return config


def parse_classic(model_type: str, hf_settings: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Return the settings that only GPT-2 and GPT-Neo have: activation, attention windows, score scaling."""
    values: dict[str, Any] = {"learned_positions": True, "qkv_bias": model_type == "gpt2"}
    name = hf_settings["activation_function"]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(f"config.json: activation_function={quoted(name)} is not one of {', '.join(ACTIVATIONS)}")
    values["activation"] = ACTIVATIONS[name]
    if model_type == "gpt2":
        return values | {"scaled_scores": hf_settings.get("scale_attn_weights", True)}
    # A list of [pattern, repeats], e.g. [[["global", "local"], 12]]. Repeats are capped: the file may claim billions.
    types = hf_settings.get("attention_types") or [[["global", "local"], 12]]
    try:
        layer_types = (which for group, times in types for _ in range(min(times, n_layer + 1)) for which in group)
        layers = list(itertools.islice(layer_types, n_layer + 1))
    except (TypeError, ValueError):
        layers = []
    if hf_settings.get("attention_layers", layers) != layers or len(layers) != n_layer:
        raise UserError(f"config.json: attention_types={quoted(types)} do not describe {n_layer} layers")
    window = 0
    if layers == ["local" if i % 2 else "global" for i in range(n_layer)] and n_layer > 1:
        window = validate(hf_settings.get("window_size", 256), int, "config.json", "window_size")
        if window < 1:
            raise UserError(f"config.json: window_size={window} must be positive")
    elif layers != ["global"] * n_layer:
        raise UserError(
            f"config.json: attention_types={quoted(types)} are not supported, only alternating global and local"
        )
    return values | {"scaled_scores": False, "window": window}


def parse_modern(model_type: str, hf_settings: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that only Llama and Qwen3 have: RoPE, QK-norm, head sizes."""
    rope = hf_settings.get("rope_scaling") or hf_settings.get("rope_parameters") or {}
    is_default_rope = isinstance(rope, Mapping) and rope.keys() <= {"rope_type", "type", "rope_theta"}
    if not is_default_rope or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json: rope_parameters={quoted(rope)} are not supported, only rope_theta")
    if hf_settings.get("partial_rotary_factor") not in (None, 1):
        raise UserError("config.json: partial_rotary_factor is not supported")
    layers = hf_settings.get("layer_types")
    if layers is not None and layers != ["full_attention"] * sizes["n_layer"]:
        raise UserError(f"config.json: layer_types={quoted(layers)} are not supported, only full_attention")
    base = rope.get("rope_theta", hf_settings.get("rope_theta", 10000.0))
    has_own_head_size = sizes["head_size"] * sizes["n_head"] != sizes["n_embd"]
    return {
        "qk_norm": model_type == "qwen3",
        "rope_base": validate(base, float, "config.json", "rope_theta"),
        "n_kv_head": sizes["n_kv_head"] if sizes["n_kv_head"] != sizes["n_head"] else 0,
        "head_size": sizes["head_size"] if has_own_head_size else 0,
    }


def build_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of config.json; `UserError` if transformers has no such model."""
    model_type = select_model_type(config)
    settings = {name: getattr(config, field) for name, field in SETTINGS_BY_TYPE[model_type].items()}
    settings |= {"model_type": model_type, "bos_token_id": None, "eos_token_id": None}
    if model_type in LAYER_NAMES:
        settings["activation_function"] = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    if model_type == "gpt2":
        settings["scale_attn_weights"] = config.scaled_scores
    elif model_type == "gpt_neo":
        n_pairs, n_unpaired = divmod(config.n_layer, 2)
        pair = ["global", "local" if config.window else "global"]
        settings["attention_types"] = [[pair, n_pairs], [["global"], n_unpaired]]
        settings |= {"window_size": config.window} if config.window else {}
    else:
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
        settings |= {"attention_bias": False} | ({"mlp_bias": False} if model_type == "llama" else {})
    return settings


def select_model_type(config: ModelConfig) -> str:
    """Return the transformers `model_type` that represents the model exactly; `UserError` if there is none."""
    if config.architecture == "modern":
        if not config.qk_norm and config.n_embd % config.n_head:
            raise UserError(
                f"transformers' Llama needs model.n_embd={config.n_embd} to be a multiple of"
                f" model.n_head={config.n_head}"
            )
        return "qwen3" if config.qk_norm else "llama"
    if not config.scaled_scores and not config.qkv_bias:
        return "gpt_neo"
    if config.window:
        raise UserError(
            f"transformers has no architecture with model.window={config.window} and"
            f" {'model.qkv_bias=true' if config.qkv_bias else 'model.scaled_scores=true'}"
        )
    return "gpt2"


def hf_name(model_type: str, name: str) -> str:
    """Return the transformers name of one of our weights."""
    if name == LM_HEAD:
        return name
    if model_type not in LAYER_NAMES:
        return NAME_PREFIX[model_type] + name
    module, _, part = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{NAME_PREFIX[model_type]}{TOP_NAMES[module]}.{part}"
    _, layer, submodule = module.split(".", 2)
    return f"{NAME_PREFIX[model_type]}h.{layer}.{LAYER_NAMES[model_type][submodule]}.{part}"


def build_name_map(model_type: str, config: ModelConfig) -> dict[str, list[str]]:
    """Map each transformers name to our weights concatenated in it (GPT-2 fuses q, k and v)."""
    name_map: dict[str, list[str]] = {}
    for name in expected_shapes(config):
        name_map.setdefault(hf_name(model_type, name), []).append(name)
    return name_map


def is_transposed(model_type: str, name: str) -> bool:
    """Return whether transformers stores this matrix as (in, out): GPT-2's blocks use Conv1D, not Linear."""
    return model_type == "gpt2" and re.match(r"(transformer\.)?h\.", name) is not None


def add_explicit_tables(
    config: ModelConfig, weights: Mapping[str, Array], model_type: str
) -> tuple[ModelConfig, Mapping[str, Array]]:
    """Add the weights that `classic` lacks and transformers has: a sinusoid table `wpe`; in GPT-2, zero qkv biases."""
    config = dataclasses.replace(config, learned_positions=True, qkv_bias=model_type == "gpt2")
    tables = {
        name: build_sinusoid_table(*shape) if name == POSITION_EMBEDDING else np.zeros(shape, np.float32)
        for name, shape in expected_shapes(config).items()
        if name not in weights
    }
    return config, {**weights, **tables}


def drop_explicit_tables(config: ModelConfig, weights: dict[str, Array]) -> tuple[ModelConfig, dict[str, Array]]:
    """Remove what `add_explicit_tables` adds: a position table of sinusoids, and qkv biases that are zero."""
    if config.learned_positions and np.array_equal(
        weights[POSITION_EMBEDDING], build_sinusoid_table(config.n_ctx, config.n_embd)
    ):
        config = dataclasses.replace(config, learned_positions=False)
    biases = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    if config.qkv_bias and not any(weight.any() for name, weight in weights.items() if name.endswith(biases)):
        config = dataclasses.replace(config, qkv_bias=False)
    return config, {name: weights[name] for name in expected_shapes(config)}
