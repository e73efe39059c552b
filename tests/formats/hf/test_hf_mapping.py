"""The same logits as Hugging Face's models with the same weights (no download: their code, random weights)."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from format_helpers import GPT2
from torch import Tensor

from tinystories.checkpoint import state_dict_to_save
from tinystories.config import ModelConfig
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.formats.hf.mapping import from_transformers, to_hf_config_and_weights, to_transformers
from tinystories.model import GPT

GPT2_BIAS = GPT2 | {"qkv_bias": True}
GPT_NEO = {"architecture": "classic", "activation": "gelu_tanh", "scaled_scores": False, "window": 5, "n_layer": 3}


def random_tokens() -> Tensor:
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(8))


def arrays_of(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in weights.items()}


def require_same_logits(ours: GPT, theirs: Any) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (ours.logits(ours(tokens)) - expected).abs().max()
    assert expected.std() > 0.5, "logits too flat to compare"
    assert difference <= 1e-4


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"architecture": "classic"}, "GPT2LMHeadModel"),
        ({"architecture": "classic", "activation": "gelu_erf"}, "GPT2LMHeadModel"),
        (GPT2_BIAS, "GPT2LMHeadModel"),
        (GPT2_BIAS | {"scaled_scores": False}, "GPT2LMHeadModel"),
        (GPT_NEO, "GPTNeoForCausalLM"),
        (GPT_NEO | {"learned_positions": True, "window": 0}, "GPTNeoForCausalLM"),
        ({}, "Qwen3ForCausalLM"),
        ({"n_kv_head": 2}, "Qwen3ForCausalLM"),
        ({"n_kv_head": 1, "head_size": 10}, "Qwen3ForCausalLM"),
        ({"n_embd": 22, "head_size": 4}, "Qwen3ForCausalLM"),
        ({"qk_norm": False}, "LlamaForCausalLM"),
        ({"qk_norm": False, "n_kv_head": 2, "head_size": 4}, "LlamaForCausalLM"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_our_logits_and_the_round_trip_is_bit_exact(
    tiny: Callable[..., ModelConfig],
    awake: Callable[[ModelConfig], GPT],
    changes: dict[str, object],
    kind: str,
    tied: bool,
) -> None:
    """Their model gives our logits, and what comes back are our config and the same bits."""
    rope = {} if changes.get("architecture") else {"rope_base": 500.0}
    model = awake(tiny(**changes | rope, tied=tied, norm_eps=1e-3))
    weights = state_dict_to_save(model)
    theirs = to_transformers(model.config, weights)
    assert type(theirs).__name__ == kind
    require_same_logits(model, theirs)
    for settings, named in (
        to_hf_config_and_weights(model.config, arrays_of(weights)),
        (json.loads(theirs.config.to_json_string()), arrays_of(theirs.state_dict())),
    ):
        config, back = from_transformers(settings, named)
        assert config == model.config
        assert back.keys() == weights.keys()
        assert all((back[name] == weights[name].numpy()).all() for name in back)


SMALL = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
LLAMA = SMALL | {"max_position_embeddings": 24, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
THEIRS = {
    "gpt2": SMALL | {"n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 4},
    "gpt_neo": SMALL
    | {"max_position_embeddings": 24, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "window_size": 5}
    | {"attention_types": [[["global", "local"], 2]]},
    "llama": LLAMA | {"num_attention_heads": 4},
    "qwen3": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
}


@pytest.fixture
def theirs(request: pytest.FixtureRequest) -> Any:
    """A model of transformers none of whose weights are near zero or one."""
    kind = request.param if hasattr(request, "param") else "gpt2"
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **THEIRS[kind]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("theirs", THEIRS, ids=str, indirect=True)
def test_their_models_run_here(theirs: Any) -> None:
    """The model without a cache, and both engines: a prompt longer than the window, then steps up to the last place."""
    config, weights = from_transformers(json.loads(theirs.config.to_json_string()), arrays_of(theirs.state_dict()))
    assert config.n_params == sum(weight.numel() for weight in theirs.parameters())
    model = GPT(config).eval()
    missing = model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    require_same_logits(model, theirs)
    ids = random_tokens()[0]
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0].numpy()
    for engine in (TorchEngine(model, device="cpu"), CpuEngine(config, weights)):
        found = [engine.prefill(0, ids[:9].tolist()), *(engine.step([0], [int(i)])[0] for i in ids[9:])]
        np.testing.assert_allclose(np.stack(found), expected[8:], atol=1e-4)


def test_files_as_they_are_on_the_hub_are_read(theirs: Any) -> None:
    """Masks among the weights, a tied head beside its embedding, names without the prefix, half precision."""
    settings, weights = json.loads(theirs.config.to_json_string()), arrays_of(theirs.state_dict())
    _, expected = from_transformers(settings, weights)
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 24, 24), np.uint8)}
    masks["transformer.h.1.attn.masked_bias"] = np.float32(-1e4)
    without = {
        name.removeprefix("transformer."): w for name, w in (weights | masks).items() if name != "lm_head.weight"
    }
    for named in (weights | masks, without):
        _, found = from_transformers(settings, named)
        assert all((found[name] == expected[name]).all() for name in found | expected)
    _, found = from_transformers(settings, {name: w.astype(np.float16) for name, w in weights.items()})
    assert all(weight.dtype == np.float32 for weight in found.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("transformer.wpe.weight"), "weight 'embed_positions.weight' is missing"),
        (lambda w: w.update(other=w["lm_head.weight"]), "weight 'other' is unknown"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"] + 1}), "lm_head.weight differs from"),
        (
            lambda w: w.update({"transformer.h.0.attn.c_attn.weight": w["transformer.h.0.attn.c_attn.weight"].T}),
            r"k_proj.weight has shape \(8, 72\), expected \(24, 24\)",
        ),
        (
            lambda w: w.update({"transformer.ln_f.bias": np.zeros(24, np.int8)}),
            r"ln_f.bias. is int8, not floating-point",
        ),
    ],
)
def test_other_weights_are_refused(theirs: Any, change: Callable[[dict[str, Any]], object], complaint: str) -> None:
    weights: dict[str, Any] = arrays_of(theirs.state_dict())
    change(weights)
    with pytest.raises(UserError, match=complaint):
        from_transformers(json.loads(theirs.config.to_json_string()), weights)


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("gpt2", {"model_type": "gptj"}, "model_type='gptj' is not one of gpt2, gpt_neo, llama, qwen3"),
        ("gpt2", {"model_type": None}, "model_type=None"),
        ("gpt2", {"n_layer": None}, "n_layer is missing"),
        ("gpt2", {"n_embd": "wide"}, "n_embd='wide' must be of type int"),
        ("gpt2", {"vocab_size": 0}, "vocab_size=0"),
        ("gpt2", {"n_head": 5}, "must be a multiple of model.n_head=5"),
        (
            "gpt2",
            {"activation_function": "quick_gelu"},
            "activation_function='quick_gelu' is not one of relu, gelu_new",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt_neo", {"attention_types": [[["local"], 4]]}, "only alternating global and local"),
        ("gpt_neo", {"attention_types": [[["global"], 10**18]]}, "do not describe 4 layers"),
        ("gpt_neo", {"attention_types": "global"}, "do not describe 4 layers"),
        ("gpt_neo", {"attention_types": [["x" * 2**24, 4]]}, "do not describe 4 layers"),
        ("gpt_neo", {"attention_types": [[[], 2**40]] * 9}, "do not describe 4 layers"),
        ("gpt_neo", {"attention_layers": ["global"] * 4}, "do not describe 4 layers"),
        ("gpt_neo", {"window_size": 0}, "window_size=0 must be positive"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters="),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters="),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types="),
    ],
    ids=str,
)
def test_other_models_are_refused(kind: str, change: dict[str, Any], complaint: str) -> None:
    settings = {"model_type": kind} | THEIRS[kind] | change
    with pytest.raises(UserError) as caught:
        from_transformers(settings, {})
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "classic", "window": 5}, "model.window=5 and model.scaled_scores=true"),
        (GPT_NEO | {"qkv_bias": True}, "model.window=5 and model.qkv_bias=true"),
        ({"qk_norm": False, "n_embd": 22, "head_size": 4}, "Llama needs model.n_embd=22"),
    ],
    ids=str,
)
def test_a_model_that_transformers_lacks_is_refused(
    tiny: Callable[..., ModelConfig], changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        to_hf_config_and_weights(tiny(**changes), {})
