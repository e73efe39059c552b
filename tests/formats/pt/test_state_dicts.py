"""State dicts of the original program and of programs like it, whatever they call their weights."""

import dataclasses
import os
import pickle
import re
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import train_bpe
from tinystories.data.source.resolve import iter_stories
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.imports import import_model
from tinystories.formats.torch_file import find_problem
from tinystories.model import GPT
from tinystories.position_tables import build_sinusoid_table

State = dict[str, Tensor]
LECTURE = [
    (r"embed_tokens", "token_embedding_table"),
    (r"layers\.(\d+)\.", r"blocks.\1."),
    (r"self_attn\.o_proj", "sa.proj"),
    (r"mlp\.up_proj", "ffwd.net.0"),
    (r"mlp\.down_proj", "ffwd.net.2"),
    (r"input_layernorm", "ln1"),
    (r"post_attention_layernorm", "ln2"),
    (r"^norm", "ln_f"),
]
SEPARATE = [*LECTURE, (r"self_attn\.q_proj", "attn.query"), (r"self_attn\.k_proj", "attn.key")]
SEPARATE += [(r"self_attn\.v_proj", "attn.value")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(300, iter_stories("sample")).save(path)
    return path


@pytest.fixture(scope="module")
def classic(tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]) -> GPT:
    """Heads are 64 wide, as in the original."""
    return awake(
        tiny(
            architecture="classic", vocab_size=300, n_ctx=512, n_embd=128, n_head=2, n_ff=96, tied=False, qk_norm=False
        )
    )


def renamed(state: State, table: list[tuple[str, str]]) -> State:
    for old, new in table:
        state = {re.sub(old, new, name): weight for name, weight in state.items()}
    return state


def by_heads(state: State, n_head: int) -> State:
    """As the lecture has it: every head its own three matrices and its own mask."""
    out = {}
    for name, weight in state.items():
        if match := re.fullmatch(r"(layers\.\d+\.self_attn)\.([qkv])_proj\.weight", name):
            word = {"q": "query", "k": "key", "v": "value"}[match[2]]
            for i, part in enumerate(weight.chunk(n_head)):
                out[f"{match[1].replace('self_attn', 'sa')}.heads.{i}.{word}.weight"] = part
                out[f"{match[1].replace('self_attn', 'sa')}.heads.{i}.tril"] = torch.ones(512, 512).tril()
        else:
            out[name] = weight
    return renamed(out, LECTURE)


def fused(state: State) -> State:
    out = {name: weight for name, weight in state.items() if not re.search(r"[qkv]_proj", name)}
    for i in range(2):
        parts = [state[f"layers.{i}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        out[f"layers.{i}.self_attn.qkv.weight"] = torch.cat(parts)
    return out


def nanogpt(state: State) -> State:
    """Fused q, k, v under nanoGPT's names, with its masks and its zero biases."""
    names = [
        ("embed_tokens", "wte"),
        (r"layers\.", "h."),
        ("self_attn.qkv", "attn.c_attn"),
        ("mlp.down_proj", "mlp.c_proj"),
    ]
    names += [("self_attn.o_proj", "attn.c_proj"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")]
    out = renamed(fused(state), [*names, ("^norm", "ln_f")])
    for i in range(2):
        out |= {f"h.{i}.attn.bias": torch.ones(1, 1, 512, 512).tril(), f"h.{i}.attn.c_attn.bias": torch.zeros(384)}
    return {f"transformer.{name}": weight for name, weight in out.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "ours": lambda state: state,
    "the lecture": lambda state: by_heads(state, 2),
    "separate q, k, v": lambda state: renamed(state, SEPARATE),
    "fused": fused,
    "nanoGPT": nanogpt,
    "compiled": lambda state: {f"_orig_mod.module.{name}": weight for name, weight in state.items()},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1e-3}, "iter_num": 3},
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 1},
    "with its sinusoids": lambda state: state | {"pos_enc.pe": torch.from_numpy(build_sinusoid_table(512, 128))[None]},
    "with sizes": lambda state: {"model": state, "model_args": {"n_head": 2, "block_size": 512}},
    "half precision": lambda state: {name: weight.half() for name, weight in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(classic: GPT, tokenizer: Path, tmp_path: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout](dict(classic.state_dict())), tmp_path / "gpt.pt")
    import_model(str(tmp_path / "gpt.pt"), tokenizer).write(tmp_path / "model")
    found = ModelBundle.read(tmp_path / "model")
    assert found.config == dataclasses.replace(classic.config, dropout=0)
    ids = np.arange(3, 43)
    with torch.no_grad():
        expected = classic.logits(classic(torch.from_numpy(ids)[None]))[0].numpy()
    np.testing.assert_allclose(found.logits(ids), expected, atol=0.05 if layout == "half precision" else 1e-4)


def test_without_a_head_the_embedding_is_it(classic: GPT, tokenizer: Path, tmp_path: Path) -> None:
    state = dict(classic.state_dict())
    for kind in ("absent", "equal"):
        state.pop("lm_head.weight", None)
        if kind == "equal":
            state["lm_head.weight"] = state["embed_tokens.weight"]
        torch.save(state, tmp_path / "gpt.pt")
        import_model(str(tmp_path / "gpt.pt"), tokenizer).write(tmp_path / kind)
        assert ModelBundle.read(tmp_path / kind).config.tied


def test_biases_that_are_not_there_are_zero(classic: GPT, tokenizer: Path, tmp_path: Path) -> None:
    state = {name: weight for name, weight in classic.state_dict().items() if not name.endswith("bias")}
    state["layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    torch.save(state, tmp_path / "gpt.pt")
    found = import_model(str(tmp_path / "gpt.pt"), tokenizer)
    found.check()
    assert not found.weights["layers.1.mlp.up_proj.bias"].any()


def test_learned_positions_and_gelu_of_nanogpt_are_settings(classic: GPT, tokenizer: Path, tmp_path: Path) -> None:
    state = {f"transformer.{name.replace('layers.', 'h.')}": weight for name, weight in classic.state_dict().items()}
    state = renamed(state, [(r"mlp\.up_proj", "mlp.c_fc"), ("embed_tokens", "wte")])
    state["transformer.wpe.weight"] = torch.ones(40, 128)
    torch.save({"model": state, "model_args": {"n_head": 4}}, tmp_path / "gpt.pt")
    found = import_model(str(tmp_path / "gpt.pt"), tokenizer)
    assert (found.config.learned_positions, found.config.activation) == (True, "gelu_erf")
    assert (found.config.n_head, found.config.n_ctx) == (4, 40)


def test_an_assumed_size_is_logged(
    classic: GPT, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(dict(classic.state_dict()), tmp_path / "gpt.pt")
    import_model(str(tmp_path / "gpt.pt"), tokenizer)
    assert "head dimension of 64" in caplog.text
    assert "context of 512 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.gate.weight": torch.ones(3, 3)}, "weight 'layers.0.gate.weight' is unknown"),
        ({"lm_head.bias": torch.ones(300)}, "head has a bias"),
        ({"ln_f.weight": torch.ones(128)}, "weight 'ln_f.weight' is duplicated"),
        ({"embed_tokens.weight": None}, "is not a GPT"),
        ({"layers.3.ln1.weight": torch.ones(128)}, "blocks are missing.* 3, .* number 3"),
        ({"layers.0.mlp.up_proj.weight": torch.ones(96, 7)}, "shapes do not match"),
        ({"layers.0.mlp.up_proj.weight": torch.ones(2**40, 0)}, "shapes do not match"),
        ({"layers.1.mlp.up_proj.weight": torch.ones(96, 7)}, "up_proj.weight "),
        ({"layers.0.attn.tril": torch.ones(0, 2**40), "pe": torch.ones(0, 2**40)}, "position table"),
        ({"layers.0.mlp.down_proj.weight": None}, "down_proj.weight' is missing"),
        ({"layers.1.mlp.up_proj.weight": torch.full((96, 128), torch.nan)}, "not finite"),
        ({"norm.weight": torch.ones(128, dtype=torch.int32)}, "'norm.weight' is torch.int32"),
        ({"pe": torch.ones(512, 128)}, "position table `pe`"),
        ({"norm.weight": "text"}, "'norm.weight' is not a tensor"),
        ({"norm.weight": torch.ones(1).expand(2**40)}, "is larger than the file"),
        ({"norm.weight": torch.ones(128).to_sparse()}, "'torch._utils._rebuild_sparse_tensor'"),
    ],
)
def test_unknown_parts_are_refused_by_name(
    classic: GPT, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    state = {n: w for n, w in (dict(classic.state_dict()) | changes).items() if w is not None}
    torch.save(state, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / "gpt.pt"), tokenizer).write(tmp_path / "out")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_does_not_run(tokenizer: Path, tmp_path: Path) -> None:
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "gpt.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    for name in ("gpt.pt", "bare.pt"):
        with pytest.raises(UserError, match="is not a valid file of tensors") as caught:
            import_model(str(tmp_path / name), tokenizer)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    """The same archive with other bytes in its entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def pickled(*program: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, content: b"\x80\x02" + b"".join(program) + b"." if name.endswith("data.pkl") else content


BOMBS: dict[str, Callable[[Path], object]] = {
    "compressed": lambda path: rewritten(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED),
    "a pickle of zeros": lambda path: rewritten(
        path, lambda _, content: bytes(2**24) + content, compression=zipfile.ZIP_DEFLATED
    ),
    "memory asked for": lambda path: rewritten(path, pickled(b"cbuiltins\nbytearray\n", b"\x8a\x05\0\0\0\0\1\x85R")),
    "another class": lambda path: rewritten(path, pickled(b"ctorch.nn.modules.linear\nLinear\n)R")),
    "text that doubles": lambda path: rewritten(path, pickled(b"c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R")),
    "two pickles": lambda path: zipfile.ZipFile(path, "a").writestr("data.pkl", b"\x80\x02}."),
    "no pickle": lambda path: zipfile.ZipFile(path, "w").writestr("data", b""),
    "text": lambda path: path.write_text("a story"),
    "of torch before 1.6": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
}


def test_a_key_of_shared_tuples_is_refused_without_memory_for_its_parts(tokenizer: Path, tmp_path: Path) -> None:
    """A tuple of two that are the same tuple of two that are ...: its repr would have 2**20 parts."""
    steps = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(20))
    torch.save({"a": torch.ones(1)}, tmp_path / "gpt.pt")
    rewritten(tmp_path / "gpt.pt", pickled(b"N\x85q\0" + steps + b"}h\x14K\1s"))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"gpt\.pt: a key is not the name of a tensor"):
            import_model(str(tmp_path / "gpt.pt"), tokenizer)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_name_from_the_stack_of_the_pickle_is_refused(classic: GPT, tokenizer: Path, tmp_path: Path) -> None:
    torch.save(dict(classic.state_dict()), tmp_path / "gpt.pt")
    rewritten(tmp_path / "gpt.pt", pickled(b"\x8c\x02os\x8c\x05mkdir\x93"))
    with pytest.raises(UserError, match=r"gpt\.pt is not a valid file of tensors"):
        import_model(str(tmp_path / "gpt.pt"), tokenizer)


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_that_grow_or_hold_more_than_tensors_never_reach_torch(
    classic: GPT, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **_: reached.append(arguments))
    torch.save(dict(classic.state_dict()), tmp_path / "gpt.pt")
    BOMBS[kind](tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"gpt\.pt is not a valid file of tensors") as caught:
        import_model(str(tmp_path / "gpt.pt"), tokenizer)
    assert "\n" not in str(caught.value)
    assert not reached


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.nn.Parameter(torch.ones(2)), "kind": torch.bfloat16, "plain": [1, 2.5, None, True, "x"]},
        OrderedDict(a=torch.ones(3).half(), b=torch.ones(2).bfloat16(), c=torch.ones(1, dtype=torch.float8_e4m3fn)),
        {"optimizer": {"betas": (0.9, 0.95), "groups": [{"lr": 1e-3}] * 3}, "device": torch.device("cpu")},
    ],
)
def test_files_of_plain_values_have_no_problem(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert find_problem(tmp_path / "x.pt") == ""
    torch.load(tmp_path / "x.pt", weights_only=True)


def test_names_from_a_file_are_shown_safely(classic: GPT, tokenizer: Path, tmp_path: Path) -> None:
    state = dict(classic.state_dict()) | {"\x1b[31m\n" + "x" * 500: torch.ones(1)}
    torch.save(state, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"weight '\\x1b\[31m\\nx+\.\.\. is unknown") as caught:
        import_model(str(tmp_path / "gpt.pt"), tokenizer)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [{}, [1, 2], torch.ones(3), {"model": {}}])
def test_other_contents_are_refused(tokenizer: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"contains no state dict|is not a tensor"):
        import_model(str(tmp_path / "gpt.pt"), tokenizer)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_user_error(classic: GPT, tokenizer: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Cut short it is always refused; with a flipped bit it is refused or another model."""
    if not (tmp_path / "whole.pt").exists():
        torch.save(dict(classic.state_dict()), tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 4000)))
    cut = data.draw(st.booleans())
    if cut:
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "gpt.pt").write_bytes(content)
    try:
        import_model(str(tmp_path / "gpt.pt"), tokenizer).check()
    except UserError:
        return
    assert not cut


def test_another_vocabulary_needs_its_tokenizer(classic: GPT, tmp_path: Path) -> None:
    torch.save(dict(classic.state_dict()), tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"300 ids.*tokenizer\.json with --tokenizer"):
        import_model(str(tmp_path / "gpt.pt"))
