"""State dicts (.pt) of the original program and of small GPTs like it: LayerNorm before each half of a block.

The names of the weights say what they are: `TOP` and `BLOCK` list the known ones, of Karpathy's "Let's build GPT"
lecture (github.com/karpathy/ng-video-lecture), minGPT and nanoGPT, and ours. What a state dict does not say is taken
as in the original and told: heads are 64 wide, norms add 1e-5, scores are divided by the root of the head's width.
The only place that opens a pickle, once torch_file.py has seen that it holds nothing but tensors and plain values, by
torch's reader that builds these and runs nothing.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.data.vocabulary import gpt2
from tinystories.errors import UserError, shown
from tinystories.interop.portable import DEEPEST, Portable
from tinystories.interop.torch_file import require_plain
from tinystories.positions import sinusoid_table

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]

WRAPPERS = ("model", "state_dict", "model_state_dict")  # a checkpoint holds its state dict under one of these
SETTINGS = ("model_args", "config", "hparams")  # and nanoGPT its sizes under the first
PREFIX = re.compile(r"(_orig_mod\.|module\.|model\.|transformer\.|gpt\.)*")
GPT2_SIZES = (50257, 50304)  # ids, and filled up to a multiple of 64 as in nanoGPT
HEAD_SIZE = 64
CONTEXT = 512
MOST = 2**24  # tokens of a context

ATTENTION = r"(?:self_attn|sa|attn|attention|self_attention|mha)"
FEED_FORWARD = r"(?:mlp|ffwd|ff|ffn|feed_forward)"
TOP = {
    "embed_tokens": "embed_tokens|token_embedding_table|token_embedding|tok_emb|wte|embedding",
    "embed_positions": "embed_positions|position_embedding_table|position_embedding|pos_emb|wpe",
    "norm": "norm|ln_f|final_norm",
    "lm_head": "lm_head|head|output",
    "pe": r"(?:(?:pos_enc|pos_encoding|positional_encoding|pos_embedding|pos_emb|position)\.)?pe",
}
BLOCK = {
    "input_layernorm": "input_layernorm|ln1|ln_1|norm1",
    "post_attention_layernorm": "post_attention_layernorm|ln2|ln_2|norm2",
    "self_attn.q_proj": rf"{ATTENTION}\.(?:q_proj|query|q|wq)",
    "self_attn.k_proj": rf"{ATTENTION}\.(?:k_proj|key|k|wk)",
    "self_attn.v_proj": rf"{ATTENTION}\.(?:v_proj|value|v|wv)",
    "self_attn.qkv": rf"{ATTENTION}\.(?:c_attn|qkv|qkv_proj|in_proj)",  # q, k, v below each other
    "self_attn.heads.{}.q": rf"{ATTENTION}\.heads\.(\d+)\.(?:query|q)",
    "self_attn.heads.{}.k": rf"{ATTENTION}\.heads\.(\d+)\.(?:key|k)",
    "self_attn.heads.{}.v": rf"{ATTENTION}\.heads\.(\d+)\.(?:value|v)",
    "self_attn.o_proj": rf"{ATTENTION}\.(?:o_proj|proj|c_proj|out_proj|wo)",
    "mlp.up_proj": rf"{FEED_FORWARD}\.(?:up_proj|c_fc|fc1|linear1|net\.0)",
    "mlp.down_proj": rf"{FEED_FORWARD}\.(?:down_proj|c_proj|fc2|linear2|net\.2)",
}
LAYER = re.compile(r"(?:layers|blocks|h)\.(\d{1,4})\.(.+)\.(weight|bias)")
MASK = re.compile(
    rf"(?:layers|blocks|h)\.\d+\.{ATTENTION}\.(?:heads\.\d+\.)?(?:tril|mask|bias|causal_mask|masked_bias)"
)
GELU = re.compile(r"h\.\d+\.mlp\.c_fc\.weight")  # nanoGPT's and minGPT's name: they have GELU


def read(path: Path, tokenizer: Path | None) -> Portable:
    """A state dict as a `classic` model; GPT-2's tokenizer where none is given and the ids are as many.

    `UserError` where the file is not whole, holds anything but tensors and plain values, or weights that the lists
    above do not name.
    """
    state, facts = load(path)
    found = renamed(state, path)
    context = found.pop("context", None)
    heads = gathered(found, path)
    config = config_of(found, heads, context, facts, path)
    filled(found, config)
    words = Tokenizer.load(tokenizer) if tokenizer else original_tokenizer(config.vocab_size, path)
    provenance = {"imported_from": path.name, "format": "state dict"}
    return Portable(config=config, weights=found, tokenizer=words, provenance=provenance)


def load(path: Path) -> tuple[dict[str, "Tensor"], Mapping[str, Any]]:
    """The state dict, mapped, and the sizes that came with it. No code of the file is run."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install 'tinystories-gpt[train]'") from None
    require_plain(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of pickle, zip, storage sizes...: a hostile file may lead to any
        raise UserError(
            f"{path} is not a whole file of tensors: torch cannot read it; copy it again, or save it anew:"
            " torch.save(model.state_dict(), ...)"
        ) from None
    facts: Mapping[str, Any] = {}
    if isinstance(content, dict):
        facts = next((content[key] for key in SETTINGS if isinstance(content.get(key), dict)), {})
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no state dict; save one with torch.save(model.state_dict(), ...)")
    room = 2 * path.stat().st_size  # a tied head shows the embedding's numbers again
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: {shown(name)} is no tensor; save the weights alone: torch.save(model.state_dict(), ...)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {shown(name)} is not a plain tensor of numbers")
        room -= tensor.numel() * tensor.element_size()
        if room < 0:  # the same few numbers shown many times
            raise UserError(f"{path}: {shown(name)} of shape {shown(tuple(tensor.shape))} is larger than the file")
    return content, facts


def renamed(state: Mapping[str, "Tensor"], path: Path) -> dict[str, Any]:
    """fp32 arrays by our names; fused or separate heads as they are. "context": the length that a mask shows."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        bare = name[PREFIX.match(name).end() :]  # type: ignore[union-attr]
        if MASK.fullmatch(bare):
            if 0 < tensor.numel() < MOST:
                found["context"] = tensor.shape[-1] if tensor.ndim else None
            continue
        ours = our_name(bare)
        if ours is None:
            raise UserError(f"{path}: weight {shown(name)} is not known; docs/interop.md lists the names that are")
        if ours in found:
            raise UserError(f"{path}: weight {shown(name)} is there twice under different names")
        if not tensor.is_floating_point() or tensor.ndim not in ((2, 3) if ours == "pe" else (1, 2)):
            raise UserError(
                f"{path}: {shown(name)} is {tensor.dtype} of shape {shown(tuple(tensor.shape))}, not a matrix of"
                " weights"
            )
        found[ours] = tensor.float().numpy(force=True)
        if GELU.fullmatch(bare):
            found["gelu"] = True
    return found


def our_name(bare: str) -> str | None:
    for ours, names in TOP.items():
        if re.fullmatch(names, bare.removesuffix(".weight").removesuffix(".bias")):
            return ours if ours == "pe" else f"{ours}.{bare.rpartition('.')[2]}"
    if match := LAYER.fullmatch(bare):
        layer, rest, kind = match.groups()
        for ours, names in BLOCK.items():
            if inner := re.fullmatch(names, rest):
                return f"layers.{int(layer)}.{ours.format(*inner.groups())}.{kind}"
    return None


def gathered(found: dict[str, Any], path: Path) -> int:
    """Make q, k and v one matrix each. Returns the number of heads where the names show it, else 0."""
    count = 0
    for name in [name for name in found if ".self_attn.qkv." in name]:
        parts = np.split(found.pop(name), 3) if len(found[name]) % 3 == 0 else []
        if not parts:
            raise UserError(f"{path}: {name} does not hold q, k and v")
        for letter, part in zip("qkv", parts, strict=True):
            found[name.replace(".qkv.", f".{letter}_proj.")] = part
    heads: dict[str, dict[int, Array]] = {}
    for name in [name for name in found if ".heads." in name]:
        layer, number, letter, kind = re.fullmatch(r"(.+)\.heads\.(\d+)\.(.)\.(.+)", name).groups()  # type: ignore[union-attr]
        heads.setdefault(f"{layer}.{letter}_proj.{kind}", {})[int(number)] = found.pop(name)
    for name, parts_of in heads.items():
        count = len(parts_of)
        shapes = {part.shape for part in parts_of.values()}
        if sorted(parts_of) != list(range(count)) or len(shapes) > 1:
            raise UserError(f"{path}: the heads of {name} do not belong together")
        found[name] = np.concatenate([parts_of[i] for i in range(count)])
    return count


def config_of(
    found: dict[str, Any], heads: int, context: int | None, facts: Mapping[str, Any], path: Path
) -> ModelConfig:
    """The sizes, from shapes and names; what is not used any more leaves `found`."""
    embedding, up = found.get("embed_tokens.weight"), found.get("layers.0.mlp.up_proj.weight")
    if embedding is None or up is None or embedding.ndim != 2 or up.shape[1:] != embedding.shape[1:]:
        raise UserError(f"{path} is no GPT: the embedding or the first block is missing, or they do not fit")
    V, C = embedding.shape
    layers = {int(name.split(".")[1]) for name in found if name.startswith("layers.")}
    if layers != set(range(len(layers))) or len(layers) > DEEPEST:
        raise UserError(f"{path}: blocks are missing; there are {len(layers)}, the last is number {max(layers)}")
    head = found.get("lm_head.weight")
    settings: dict[str, Any] = {"tied": head is None or np.array_equal(head, embedding)}
    if settings["tied"]:
        found.pop("lm_head.weight", None)
    table = found.pop("pe", None)
    if table is not None:
        table = table.reshape(-1, table.shape[-1]) if table.ndim == 2 or 1 in table.shape[:2] else table
        if table.ndim != 2 or table.shape[1] != C or not np.allclose(table, sinusoid_table(*table.shape), atol=1e-3):
            raise UserError(f"{path}: its table of positions is not that of 'Attention is all you need'")
        context = context or len(table)
    if (learned := found.get("embed_positions.weight")) is not None:
        settings["learned_positions"], context = True, len(learned)
    if found.pop("gelu", False):
        settings["activation"] = "gelu_erf"
    drop_zeros(found)
    if any(re.search(r"[qkv]_proj\.bias", name) for name in found):
        settings["qkv_bias"] = True
    if "lm_head.bias" in found:
        raise UserError(f"{path}: its head has a bias, which our models do not have; train it without")
    heads = heads or number(facts, "n_head") or assumed(C // HEAD_SIZE or 1, f"heads are {HEAD_SIZE} wide", path)
    context = number(facts, "block_size") or context or assumed(CONTEXT, f"the context is {CONTEXT} tokens", path)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if lacking := sorted(settings.keys() - known):
        raise UserError(f"{path} has {' and '.join(lacking)}, which our classic models do not have")
    return ModelConfig(
        architecture="classic",
        vocab_size=V,
        n_ctx=context,
        n_layer=len(layers),
        n_head=heads,
        n_embd=C,
        n_ff=len(up),
        qk_norm=False,
        norm_eps=1e-5,
        **settings,
    )


def number(facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key)
    return value if type(value) is int and 0 < value < MOST else 0


def assumed(value: int, what: str, path: Path) -> int:
    log.warning("%s does not say so: taken that %s", path, what)
    return value


def drop_zeros(found: dict[str, Any]) -> None:
    """Biases that our models lack and that are zero say nothing."""
    for name in [n for n in found if re.search(r"([qkv]_proj|lm_head)\.bias$", n) and not found[n].any()]:
        del found[name]


def filled(found: dict[str, Any], config: ModelConfig) -> None:
    """Biases that a program without them leaves out are zero."""
    widths = {"self_attn.o_proj": config.n_embd, "mlp.up_proj": config.n_ff, "mlp.down_proj": config.n_embd}
    widths |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), config.n_embd)
    found.setdefault("norm.bias", np.zeros(config.n_embd, np.float32))
    for i in range(config.n_layer):
        for name, width in widths.items():
            found.setdefault(f"layers.{i}.{name}.bias", np.zeros(width, np.float32))
        for letter in "qkv" if getattr(config, "qkv_bias", False) else "":
            found.setdefault(f"layers.{i}.self_attn.{letter}_proj.bias", np.zeros(config.n_embd, np.float32))


def original_tokenizer(vocab_size: int, path: Path) -> Tokenizer:
    if vocab_size not in GPT2_SIZES:
        raise UserError(f"{path} has {vocab_size:,} ids, which are not GPT-2's; give its tokenizer.json by --tokenizer")
    return gpt2()
