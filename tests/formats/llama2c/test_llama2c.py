"""llama2.c's files hold our models exactly, and theirs are read as run.c reads them."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_c import decode, encode, peer, read_table

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import train_bpe
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.imports import import_model
from tinystories.formats.llama2c import format as llama2c
from tinystories.formats.tokenizer_conversion import BYTE_PIECES, build_sentencepiece_bpe
from tinystories.generate.storyteller import Storyteller
from tinystories.weights.names import expected_shapes

TEXT = "Once upon a time there was a caf\u00e9. \u201cHello,\u201d said Tom.\n\nThe end."
PIECES = [b"<unk>", b"<s>", b"</s>", *(name.encode() for name in BYTE_PIECES), b" ", b"o", b"n", b" o", b" on"]
MORE = {"n_ctx": 64, "n_embd": 32, "n_ff": 48, "qk_norm": False}  # groups of 16


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_bpe(420, iter_stories("sample"))


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    return build_sentencepiece_bpe(PIECES, [0.0] * 260 + [-1.0, -2.0, -3.0, -4.0], 1)


def random_model(config: ModelConfig, tokenizer: Tokenizer) -> ModelBundle:
    rng = np.random.default_rng(3)
    weights = {
        name: (rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, shape[1] ** -0.5, shape)).astype("f4")
        for name, shape in expected_shapes(config).items()
    }
    return ModelBundle(config=config, weights=weights, tokenizer=tokenizer)


@pytest.fixture(params=[(0, True), (2, False)], ids=["tied", "untied, grouped heads"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., ModelConfig], own: Tokenizer) -> ModelBundle:
    n_kv_head, tied = request.param
    return random_model(tiny(vocab_size=431, n_kv_head=n_kv_head, tied=tied, **MORE), own)


@pytest.mark.parametrize("precision", ["f32", "q8_0"])
def test_the_file_says_what_the_model_says(model: ModelBundle, tmp_path: Path, precision: str) -> None:
    """`export` compares the two readings; what is imported again agrees with ours on the same text."""
    done = export(model, "llama2c", tmp_path / "m.bin", precision=precision)
    assert [path.name for path in done.paths] == ["m.bin", "m.tokenizer.bin", "m.tokenizer.json"]
    assert done.max_difference < (1e-4 if precision == "f32" else 2)
    again = import_model(str(tmp_path / "m.bin"))
    ours = model.logits([model.tokenizer.end_id, *model.tokenizer.encode(TEXT)])
    found = again.logits([again.tokenizer.end_id, *again.tokenizer.encode(TEXT)])
    assert again.tokenizer.decode(again.tokenizer.encode(TEXT)) == TEXT
    np.testing.assert_allclose(np.sort(ours), np.sort(found), atol=1e-4 if precision == "f32" else 0.5)
    assert again.config == model.config


def test_end_and_bytes_stand_where_run_c_has_them(model: ModelBundle, tmp_path: Path) -> None:
    export(model, "llama2c", tmp_path / "m.bin")
    pieces, scores = read_table((tmp_path / "m.tokenizer.bin").read_bytes())
    assert len(pieces) == model.config.vocab_size
    assert pieces[1] == b"\n<s>\n"
    assert pieces[3] == b"<0x00>"
    assert pieces[4:259] == [bytes([byte]) for byte in range(1, 256)]
    again = import_model(str(tmp_path / "m.bin")).tokenizer
    ids = encode(pieces, scores, TEXT)
    assert decode(pieces, ids) == TEXT.encode()
    assert ids[1:] == again.encode(" " + TEXT)[1:], "alike but for the space that run.c puts in front"


def test_our_own_words_are_mostly_split_alike(own: Tokenizer, tiny: Callable[..., ModelConfig], tmp_path: Path) -> None:
    """run.c knows no words, so a few pairs merge that GPT-2's split keeps apart."""
    llama2c.write(random_model(tiny(vocab_size=420, **MORE), own), tmp_path / "m.bin", "f32")
    table = read_table((tmp_path / "m.tokenizer.bin").read_bytes())
    again = llama2c.read(tmp_path / "m.bin", None).tokenizer
    texts = [story for story, _ in zip(iter_stories("sample"), range(8), strict=False)]
    alike = [encode(*table, text) == again.encode(" " + text) for text in texts]
    assert sum(alike) > 0.7 * len(alike)


def test_a_table_of_theirs_comes_back_byte_for_byte(
    theirs: Tokenizer, tiny: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    model = random_model(tiny(vocab_size=len(PIECES), **MORE), theirs)
    for name in ("one", "two"):
        export(model, "llama2c", tmp_path / f"{name}.bin")
        model = import_model(str(tmp_path / f"{name}.bin"))
        assert model.tokenizer.json_text == theirs.json_text
    assert not (tmp_path / "one.tokenizer.json").exists()
    for suffix in (".bin", ".tokenizer.bin"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def version_1(legacy: bytes, config: ModelConfig) -> bytes:
    """The same checkpoint as version 1."""
    shapes, at = {}, 28
    for name, shape in llama2c.iter_tensors(config, 0):
        shapes[name] = legacy[at : at + 4 * int(np.prod(shape))]
        at += len(shapes[name])
    sizes = struct.pack("<5i", *struct.unpack_from("<5i", legacy)) + struct.pack("<2i", config.vocab_size, config.n_ctx)
    start = (struct.pack("<Ii", 0x616B3432, 1) + sizes + bytes([config.tied])).ljust(256, b"\0")
    return start + b"".join(shapes[name] for name, _ in llama2c.iter_tensors(config, 1))


def test_version_1_holds_the_same_weights(model: ModelBundle, tmp_path: Path) -> None:
    export(model, "llama2c", tmp_path / "m.bin")
    (tmp_path / "one.bin").write_bytes(version_1((tmp_path / "m.bin").read_bytes(), model.config))
    old = import_model(str(tmp_path / "m.bin"))
    new = import_model(str(tmp_path / "one.bin"), tmp_path / "m.tokenizer.json")
    assert new.config == old.config
    assert new.weights.keys() == old.weights.keys()
    assert all(np.array_equal(new.weights[name], old.weights[name]) for name in old.weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "classic"}, "tinystories train --model.architecture modern --model.qk_norm false$"),
        ({"qk_norm": True}, "train one with: tinystories train --model.qk_norm false$"),
        ({"norm_eps": 1e-6, "rope_base": 500.0}, "--model.norm_eps 1e-05 --model.rope_base 10000.0$"),
    ],
)
def test_a_setting_that_llama2c_lacks_is_refused_by_name(
    own: Tokenizer, tiny: Callable[..., ModelConfig], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = random_model(tiny(**({"vocab_size": 420} | MORE | changes)), own)
    with pytest.raises(UserError, match=message):
        export(model, "llama2c", tmp_path / "m.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, theirs: Tokenizer, tiny: Callable[..., ModelConfig]) -> Path:
    """A folder with whole files of all three versions and their tokenizer."""
    folder = tmp_path_factory.mktemp("llama2c")
    config = tiny(vocab_size=len(PIECES), n_layer=1, **(MORE | {"n_ctx": 4}))
    model = random_model(config, theirs)
    for name, precision in (("v0", "f32"), ("v2", "q8_0")):
        llama2c.write(model, folder / f"{name}.bin", precision)
    (folder / "v1.bin").write_bytes(version_1((folder / "v0.bin").read_bytes(), config))
    shutil.copy(folder / "v0.tokenizer.bin", folder / "tokenizer.bin")
    return folder


def patched(whole: Path, name: str, at: int, value: bytes) -> bytes:
    data = (whole / name).read_bytes()
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("v0.bin", 0, struct.pack("<i", 0), "is not a llama2.c checkpoint: its header says 0"),
        ("v0.bin", 0, struct.pack("<i", 2**30), "is not a llama2.c checkpoint"),
        ("v0.bin", 8, struct.pack("<i", 2**24), "is not a llama2.c checkpoint"),
        ("v0.bin", 8, struct.pack("<i", 1000), "its header implies"),
        ("v2.bin", 12, struct.pack("<i", 2**24), "its header implies"),
        ("v0.bin", 12, struct.pack("<i", 5), "is not a llama2.c checkpoint"),
        ("v0.bin", 16, struct.pack("<i", 3), "is not a llama2.c checkpoint"),
        ("v0.bin", 24, struct.pack("<i", 5), "its header implies"),
        ("v1.bin", 4, struct.pack("<i", 3), "version 3; only 0, 1 and 2"),
        ("v2.bin", 37, struct.pack("<i", 0), "group size 0 "),
        ("v2.bin", 37, struct.pack("<i", -16), "group size -16 "),
        ("v2.bin", 37, struct.pack("<i", 24), "group size 24 "),
        ("v0.bin", 28, struct.pack("<f", float("nan")), "embed_tokens.weight .*not finite"),
        ("v2.bin", 256, struct.pack("<f", float("inf")), "input_layernorm.weight .*not finite"),
    ],
)
def test_damage_is_named(whole: Path, tmp_path: Path, name: str, at: int, value: bytes, message: str) -> None:
    (tmp_path / "m.bin").write_bytes(patched(whole, name, at, value))
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / "m.bin"), whole / "tokenizer.bin").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_longer_file_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes((whole / "v0.bin").read_bytes() + bytes(4))
    with pytest.raises(UserError, match="its header implies"):
        import_model(str(tmp_path / "m.bin"), whole / "tokenizer.bin")


@given(st.sampled_from(["v0.bin", "v1.bin", "v2.bin"]), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_cut_is_noticed(whole: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = (whole / name).read_bytes()
    (tmp_path / "m.bin").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError):
        import_model(str(tmp_path / "m.bin"), whole / "tokenizer.bin")


def refused(source: Path, tokenizer: Path) -> bool:
    """Whether an import ends with one line that says why; it never ends with another exception."""
    try:
        import_model(str(source), tokenizer).check()
    except UserError as error:
        return "\n" not in str(error) or pytest.fail(f"several lines: {error}")
    return False


@given(st.sampled_from(["v0.bin", "v1.bin", "v2.bin"]), st.integers(0, 300), st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_another_model(whole: Path, tmp_path: Path, name: str, at: int, bit: int) -> None:
    (tmp_path / "m.bin").write_bytes(patched(whole, name, at, bytes([(whole / name).read_bytes()[at] ^ 1 << bit])))
    refused(tmp_path / "m.bin", whole / "tokenizer.bin")


@given(st.integers(0, 3000), st.one_of(st.none(), st.integers(0, 255)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_tokenizers_are_refused_or_others(whole: Path, tmp_path: Path, at: int, value: int | None) -> None:
    content = (whole / "tokenizer.bin").read_bytes()
    at %= len(content)
    damaged = content[:at] if value is None else patched(whole, "tokenizer.bin", at, bytes([value]))
    (tmp_path / "t.bin").write_bytes(damaged)
    assert refused(whole / "v0.bin", tmp_path / "t.bin") or value is not None, "a cut table is not whole"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has only 0 pieces, the model 264"),
        (struct.pack("<ifi", 9, 0.0, -1), "piece 0 has -1 bytes"),
        (struct.pack("<ifi", 9, 0.0, 2**30), "piece 0 has 1,073,741,824 bytes"),
        (struct.pack("<ifi", 9, 0.0, 3) + b"abc", "has only 1 pieces, the model 264"),
        (b'{"a": \xff}', "is not UTF-8"),
        (b"{}", "is not a Hugging Face tokenizer"),
    ],
)
def test_wrong_tokenizers_are_named(whole: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_model(str(whole / "v0.bin"), tmp_path / "t.bin")


def test_a_tokenizer_bin_of_another_size_or_none_is_refused(whole: Path, tmp_path: Path) -> None:
    longer = (whole / "tokenizer.bin").read_bytes() + struct.pack("<fi", 0, 1) + b"x"
    (tmp_path / "t.bin").write_bytes(longer)
    with pytest.raises(UserError, match="has more pieces, the model 264"):
        import_model(str(whole / "v0.bin"), tmp_path / "t.bin")
    with pytest.raises(UserError, match=r"--tokenizer .*nothing\.bin: no such file; .*tokenizer\.json"):
        import_model(str(whole / "v0.bin"), tmp_path / "nothing.bin")
    with pytest.raises(UserError, match=r"no tokenizer.*tokenizer\.bin with --tokenizer"):
        import_model(str(whole / "v1.bin"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published stories260K, imported."""
    folder = tmp_path_factory.mktemp("published") / "stories260K"
    import_model(str(peer("stories260K.bin")), peer("tok512.bin")).write(folder)
    return folder


BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a"
    " big, red ball. She wanted to play with it, but it was too high."
)


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_the_published_model_tells_its_story(published: Path, engine: str) -> None:
    teller = Storyteller.load(published, EngineConfig(engine=engine, n_slots=1))
    story = teller.generate("Once upon a time", temperature=0, max_tokens=100)
    assert story.text.startswith(BEGINNING)


def test_the_published_model_goes_out_byte_for_byte(published: Path, tmp_path: Path) -> None:
    export(ModelBundle.read(published), "llama2c", tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == peer("stories260K.bin").read_bytes()
    assert (tmp_path / "m.tokenizer.bin").read_bytes() == peer("tok512.bin").read_bytes()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run and runq, compiled from the sources in LLAMA2C_DIR."""
    if "LLAMA2C_DIR" not in os.environ or not shutil.which("cc"):
        pytest.skip("needs LLAMA2C_DIR, a copy of github.com/karpathy/llama2.c, and a C compiler")
    folder = tmp_path_factory.mktemp("programs")
    for name in ("run", "runq"):
        source = Path(os.environ["LLAMA2C_DIR"]) / f"{name}.c"
        subprocess.run(["cc", "-O2", "-o", folder / name, source, "-lm"], check=True, capture_output=True)
    return folder


def told(program: Path, checkpoint: Path, prompt: str) -> str:
    """100 tokens, greedily; what of a character its program cannot print is left out."""
    table = checkpoint.with_suffix(".tokenizer.bin")
    command = [program, checkpoint, "-z", table, "-t", "0", "-n", "100", "-i", prompt]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode(errors="ignore").strip("\n")


@pytest.mark.interop
def test_run_c_tells_what_we_tell(programs: Path, published: Path, tmp_path: Path) -> None:
    export(ModelBundle.read(published), "llama2c", tmp_path / "m.bin")
    teller = Storyteller.load(published, EngineConfig(engine="cpu", precision="fp32", n_slots=1))
    story = teller.generate("Once upon a time", temperature=0, max_tokens=100)
    theirs = told(programs / "run", tmp_path / "m.bin", "Once upon a time")
    assert len(theirs) > 200
    assert story.text.startswith(theirs)


@pytest.mark.interop
def test_run_c_reads_our_own_vocabulary(programs: Path, model: ModelBundle, tmp_path: Path) -> None:
    """It puts a space in front, so it tells what we tell after one; it prints no bytes that are no text."""
    model.write(tmp_path / "model")
    export(model, "llama2c", tmp_path / "m.bin")
    teller = Storyteller.load(tmp_path / "model", EngineConfig(engine="cpu", precision="fp32", n_slots=1))
    story = teller.generate(" Once upon a time", temperature=0, max_tokens=12)
    theirs = told(programs / "run", tmp_path / "m.bin", "Once upon a time")
    theirs, ours = (re.sub(r"[^ -~]", "", text) for text in (theirs, story.text.lstrip()))
    assert len(ours) > len("Once upon a time")
    assert theirs.startswith(ours)


@pytest.mark.interop
def test_runq_reads_8_bits(programs: Path, published: Path, tmp_path: Path) -> None:
    export(ModelBundle.read(published), "llama2c", tmp_path / "m.bin", precision="q8_0")
    assert told(programs / "runq", tmp_path / "m.bin", "Once upon a time").startswith(BEGINNING)
