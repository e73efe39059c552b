"""Models of the Hub, by the real `huggingface_hub` against a local stand-in.

The client reads HF_ENDPOINT when it is imported, so it runs in processes of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import serving
from model_hub import TOKEN, ModelHub, Repository

from tinystories import checkpoint, load
from tinystories.cli import cli
from tinystories.cli.common import run as run_command
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.source.hub import parse_hub_name
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.files import atomic_directory, sha256
from tinystories.formats.bundle import ModelBundle
from tinystories.hub import client as hub_module
from tinystories.hub.card import build_model_card
from tinystories.hub.published import read_registry
from tinystories.model import GPT

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.extended

CONFIG = b'{"model_type": "gpt2"}'
WEIGHTS = bytes(range(256)) * 40
CODE = b"raise SystemExit('code of a repository was run')"
FILES = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"not needed beside safetensors",
    "modeling_own.py": CODE,
    "README.md": b"# A model",
    "onnx/model.safetensors": b"of a folder below",
    "../../../escaped.safetensors": b"out of the cache",
    "../config.json": b"out of the snapshot",
    "/tmp/absolute.safetensors": b"anywhere",
    "*.safetensors": b"a pattern as a name",
}
WANTED = ["config.json", "model.safetensors", "tokenizer.json"]

READ = """
import json, pathlib, sys
from tinystories.errors import UserError
from tinystories.hub.client import download, resolve_model_folder

def attempt(source, call=download):
    try:
        return str(call(source))
    except UserError as error:
        return str(error)

names = json.loads(sys.argv[1])
print(json.dumps({name: attempt(name) for name in names} | {"model": attempt(names[0], resolve_model_folder)}))
"""


def child(code: str, hub: str, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(hub, home) | more,
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(endpoint: str, home: Path) -> dict[str, str]:
    hidden = ("HF_", "HUGGING", "http", "HTTP", "no_proxy", "NO_PROXY")  # settings of whoever runs the tests
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return kept | ours


def attempts(hub: str, home: Path, *names: str, **more: str) -> tuple[dict[str, str], str]:
    """What download gives for each of the names, a folder or an error; and what was said on standard error."""
    done = child(READ, hub, home, json.dumps(names), **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def held(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def hub() -> Iterator[ModelHub]:
    older = Repository(FILES | {"config.json": b'{"model_type": "older"}'})
    older.tags["v1"] = older.tags["main"]
    older.commit(FILES)
    models = {
        "someone/model": older,
        "someone/pickled": Repository({"config.json": CONFIG, "pytorch_model.bin": b"x", "vocab.json": b"{}"}),
        "someone/one-gguf": Repository({"config.json": CONFIG, "a.gguf": b"GGUF"}),
        "someone/two-gguf": Repository({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}),
        "someone/code": Repository({"config.json": CONFIG, "modeling_own.py": CODE}),
        "someone/private": Repository(FILES, private=True),
        "someone/gated": Repository(FILES, gated=True),
        "someone/altered": Repository(FILES, served={"model.safetensors": WEIGHTS[::-1]}),
        "someone/altered-config": Repository(FILES, served={"config.json": CONFIG.replace(b"gpt2", b"gpt3")}),
        "someone/shorter": Repository(FILES, served={"model.safetensors": WEIGHTS[:-1]}),
        "someone/longer": Repository(FILES, served={"model.safetensors": WEIGHTS + b"x"}),
    }
    with serving(ModelHub(models)) as server:
        yield server


def test_a_download_has_readable_files_and_nothing_else(hub: ModelHub, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b" / "home"
    names = ["hf:someone/model", "hf:someone/model@v1", "hf:someone/pickled", "hf:someone/one-gguf"]
    found, said = attempts(hub.endpoint, home, *names)
    assert held(found["hf:someone/model"]) == {name: FILES[name] for name in WANTED}
    assert held(found["hf:someone/model@v1"])["config.json"] == b'{"model_type": "older"}'
    assert list(held(found["hf:someone/pickled"])) == ["config.json", "pytorch_model.bin", "vocab.json"]
    assert list(held(found["hf:someone/one-gguf"])) == ["a.gguf", "config.json"]
    assert "tinystories import hf:someone/model --out DIR" in found["model"]
    assert [line.split(":")[0] for line in said.splitlines()] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file() and b"out of" in path.read_bytes()]
    assert not files
    assert not [path for path in tmp_path.rglob("*escaped*") if path.suffix != ".json"]
    assert not Path("/tmp/absolute.safetensors").exists()
    assert not [request for request in hub.requests if ".py" in request or "escaped" in request]


def test_a_cached_file_is_not_requested_again(hub: ModelHub, tmp_path: Path) -> None:
    first, _ = attempts(hub.endpoint, tmp_path, "hf:someone/model")
    hub.requests.clear()
    again, _ = attempts(hub.endpoint, tmp_path, "hf:someone/model")
    assert again == first
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:someone/nothing", "no model someone/nothing at http"),
        ("hf:someone/private", "(a private one needs HF_TOKEN)"),
        ("hf:someone/gated", "request access at http"),
        ("hf:someone/model@v9", "has no such revision"),
        ("hf:someone/code", "has none of *.safetensors, pytorch_model*.bin, *.gguf"),
        ("hf:someone/two-gguf", "tinystories import FILE (a.gguf, b.gguf)"),
        ("hf:someone/-bad-", "is not a valid repository name"),
        ("hf:gpt2", "is not of the form hf:OWNER/NAME"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(messages: dict[str, str], name: str, message: str) -> None:
    assert messages[name].startswith(name)
    assert message in messages[name]
    assert "\n" not in messages[name]


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The errors of all that cannot be had, in one process."""
    marked = test_a_refusal_of_the_hub_is_one_line.pytestmark[0]  # type: ignore[attr-defined]
    models = {
        "someone/private": Repository(FILES, private=True),
        "someone/gated": Repository(FILES, gated=True),
        "someone/model": Repository(FILES),
        "someone/code": Repository({"config.json": CONFIG, "modeling_own.py": CODE}),
        "someone/two-gguf": Repository({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}),
    }
    with serving(ModelHub(models)) as server:
        return attempts(server.endpoint, tmp_path_factory.mktemp("home"), *(name for name, _ in marked.args[1]))[0]


@pytest.mark.parametrize("name", ["hf:a/b@../../c", "hf:../b", "hf:a/..", "hf:a/b/c", "hf:a/b@", "hf:a/b@x y", "hf:"])
def test_names_do_not_lead_out_of_the_cache(name: str) -> None:
    with pytest.raises(UserError, match="is not of the form hf:OWNER/NAME"):
        parse_hub_name(name)


def test_private_and_gated_models_come_by_a_token(hub: ModelHub, tmp_path: Path) -> None:
    names = ["hf:someone/private", "hf:someone/gated"]
    found, _ = attempts(hub.endpoint, tmp_path, *names, HF_TOKEN=TOKEN)
    assert all(list(held(found[name])) == WANTED for name in names)


def test_other_bytes_than_listed_are_refused_and_not_kept(hub: ModelHub, tmp_path: Path) -> None:
    damaged = {
        "hf:someone/altered": "model.safetensors arrived damaged",
        "hf:someone/altered-config": "config.json arrived damaged",
        "hf:someone/shorter": "should be of size 10240 but has size 10239",
        "hf:someone/longer": "should be of size 10240 but has size 10241",
    }
    found, _ = attempts(hub.endpoint, tmp_path, *damaged)
    for source, message in damaged.items():
        assert found[source].startswith(f"{source}: ")
        assert message in found[source]
        hub.models[source.removeprefix("hf:")].served.clear()
    found, _ = attempts(hub.endpoint, tmp_path, *damaged)
    for source in damaged:
        assert held(found[source]) == {name: FILES[name] for name in WANTED}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: ModelHub, tmp_path: Path) -> None:
    """The client keeps what it has by steps of 10 MiB."""
    large = WEIGHTS * 2500
    hub.models["someone/large"] = Repository(FILES | {"model.safetensors": large})
    hub.cuts["model.safetensors"] = 12_000_000
    found, _ = attempts(hub.endpoint, tmp_path, "hf:someone/large")
    assert held(found["hf:someone/large"])["model.safetensors"] == large
    commit = hub.models["someone/large"].tags["main"]
    assert f"GET /someone/large/resolve/{commit}/model.safetensors bytes=10485760-" in hub.requests


def test_after_a_kill_whole_files_are_kept(hub: ModelHub, tmp_path: Path) -> None:
    hub.stalls["model.safetensors"] = 3000
    command = [sys.executable, "-c", READ, json.dumps(["hf:someone/model"])]
    process = subprocess.Popen(command, env=environment(hub.endpoint, tmp_path), stdout=subprocess.PIPE)
    assert hub.stalled.wait(60)
    commit = hub.models["someone/model"].tags["main"]
    small = [f"GET /someone/model/resolve/{commit}/{name}" for name in ("config.json", "tokenizer.json")]
    for _ in range(600):
        if all(list(tmp_path.rglob(name.rsplit("/")[-1])) for name in small):
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    hub.requests.clear()
    found, _ = attempts(hub.endpoint, tmp_path, "hf:someone/model")
    assert held(found["hf:someone/model"]) == {name: FILES[name] for name in WANTED}
    assert not set(small) & set(hub.requests)


def test_without_network_an_earlier_download_serves_and_says_so(hub: ModelHub, tmp_path: Path) -> None:
    names = ["hf:someone/model", "hf:someone/model@v1"]
    before, _ = attempts(hub.endpoint, tmp_path, *names)
    after, said = attempts("http://127.0.0.1:9", tmp_path, *names, "hf:someone/pickled")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert "hf:someone/model: the Hub does not answer (ConnectError)" in said
    assert "http://127.0.0.1:9/someone/pickled" in after["hf:someone/pickled"]


FULL = """
import collections, errno, shutil, sys
import huggingface_hub
from tinystories.errors import UserError
from tinystories.hub.client import download

def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

usage = shutil.disk_usage
for free in (True, False):
    if free:
        shutil.disk_usage = lambda path: usage(path)._replace(free=10_000)
    else:
        shutil.disk_usage, huggingface_hub.snapshot_download = usage, full
    try:
        download("hf:someone/model")
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_said_before_and_while_it_fills(hub: ModelHub, tmp_path: Path) -> None:
    before, meanwhile = child(FULL, hub.endpoint, tmp_path).stdout.splitlines()
    assert before.startswith("hf:someone/model needs 0.0 MB")
    assert meanwhile.startswith("hf:someone/model: the disk is full")


@pytest.fixture(scope="module")
def model(
    tiny: Callable[..., ModelConfig],
    awake: Callable[[ModelConfig], GPT],
    sample_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run: a model directory with what training and generating leave in it besides."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = Tokenizer.load(sample_data)
    provenance = {
        "data_source": "tinystories",
        "tokens_seen": 1234567,
        "val_bits_per_byte": 0.71234,
        "val_stories": 4000,
    }
    with atomic_directory(folder) as draft:
        config = tiny(vocab_size=tokenizer.vocab_size)
        checkpoint.write_model(draft, awake(config), tokenizer, SamplingConfig(temperature=0.7), provenance)
    for name in ("packed-int8.safetensors", "metrics.jsonl", "samples.md", "state/optimizer.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"stays here")
    return folder


def test_a_pushed_model_downloads_bit_for_bit(hub: ModelHub, model: Path, tmp_path: Path) -> None:
    name, command = "me/stories", "from tinystories.cli import main; main()"
    words = ("push", str(model), name, "--message", "First", "--license", "mit")
    done = child(command, hub.endpoint, tmp_path, *words, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    there = hub.models[name]
    assert there.private
    assert there.messages == ["First"]
    assert f"pushed: {hub.endpoint}/{name}/commit/{there.tags['main']}" in done.stdout
    pushed = there.commits[there.tags["main"]]
    own = {name: (model / name).read_bytes() for name in ("config.json", *checkpoint.read_model(model).checksums)}
    assert set(pushed) == {*own, "README.md", ".gitattributes"}
    assert all(f"{name}: 0." in done.stdout for name in (*own, "README.md"))
    assert pushed["README.md"].decode() == build_model_card(ModelBundle.read(model), name, "mit")
    found, _ = attempts(hub.endpoint, tmp_path / "elsewhere", f"hf:{name}", HF_TOKEN=TOKEN)
    assert held(found["model"]) == own


FETCH = """
import json, pathlib, sys
from tinystories.errors import UserError
from tinystories.hub.published import fetch

known, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
for name in ("good", "altered", "gone", "unknown"):
    try:
        fetch(name, out / name, known)
    except UserError as error:
        print(error)
"""


def test_published_weights_are_fetched_at_their_commit_and_by_their_hash(
    hub: ModelHub, model: Path, tmp_path: Path
) -> None:
    own = {name: (model / name).read_bytes() for name in ("config.json", *checkpoint.read_model(model).checksums)}
    there = hub.models["us/stories"] = Repository(own)
    entry = {
        "text": "a test",
        "repository": "us/stories",
        "revision": there.tags["main"],
        "sha256": sha256(model / "config.json"),
    }
    there.commit(own | {"model.safetensors": b"a later version"})
    known = {"good": entry, "altered": entry | {"sha256": "0" * 64}, "gone": entry | {"revision": "0" * 40}}
    done = child(FETCH, hub.endpoint, tmp_path / "home", json.dumps(known), str(tmp_path))
    assert held(str(tmp_path / "good")) == own
    altered, gone, unknown = done.stdout.splitlines()
    assert altered == "us/stories: config.json does not match the published hash; nothing was written"
    assert gone.startswith("hf:us/stories@0000")
    assert "unknown" in unknown
    assert unknown.endswith("good, altered, gone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "home"]


def test_the_table_of_published_weights_is_whole() -> None:
    for entry in read_registry().values():
        assert entry.keys() == {"text", "repository", "revision", "sha256"}
        assert parse_hub_name(f"hf:{entry['repository']}@{entry['revision']}")
        assert len(entry["revision"]) == 40
        assert len(entry["sha256"]) == 64


PUSH = """
import json, os, sys
from tinystories.errors import UserError
from tinystories.hub.client import push

for name, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        push({"README.md": b"---\\n---"}, name)
    except UserError as error:
        print(error)
"""


def test_a_push_needs_a_token_and_keeps_private_what_should_be(hub: ModelHub, tmp_path: Path) -> None:
    hub.models["me/public"] = Repository({})
    wrong = {
        ("me/stories", ""): "set HF_TOKEN to one from https://huggingface.co/settings/tokens",
        ("me/stories", "hf_wrong"): "me/stories: the Hub denied access (401)",
        ("others/stories", TOKEN): "others/stories: the Hub denied access (403)",
        ("me/public", TOKEN): "me/public already exists and is public; push with --public",
        ("me/stories@v1", TOKEN): "leave @v1 out",
        ("stories", TOKEN): "is not of the form OWNER/NAME",
    }
    done = child(PUSH, hub.endpoint, tmp_path, json.dumps(list(wrong)))
    assert done.stderr == ""
    for line, message in zip(done.stdout.splitlines(), wrong.values(), strict=True):
        assert message in line
    assert not hub.models["me/public"].messages
    done = child(PUSH, "http://127.0.0.1:9", tmp_path, json.dumps([("me/stories", TOKEN)]))
    assert done.stdout.startswith("me/stories: cannot reach http://127.0.0.1:9/me/stories")
    done = child(
        PUSH.replace(", name)", ", name, private=False)"), hub.endpoint, tmp_path, '[["me/public", "hf_right"]]'
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert hub.models["me/public"].messages == ["A model of TinyStories GPT"]


def test_a_damaged_model_is_not_pushed(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", *checkpoint.read_model(model).checksums):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors does not match its checksum"):
        hub_module.collect_files(tmp_path, "me/stories")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "MODEL"],
        ["eval", "MODEL", "--data", "sample"],
        ["info", "MODEL"],
        ["pack", "MODEL"],
        ["export", "MODEL", "--format", "hf", "--out", "never-written"],
        ["push", "MODEL", "me/stories"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_takes_a_model_of_the_hub(
    words: list[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    (tmp_path / "config.json").write_bytes(CONFIG)
    monkeypatch.setattr(hub_module, "download", lambda source: asked.append(source) or tmp_path)
    command = ["hf:someone/model@v1" if word == "MODEL" else word for word in words]
    assert run_command(cli, command) == 2
    assert asked == ["hf:someone/model@v1"]
    assert "tinystories import hf:someone/model@v1 --out DIR" in capsys.readouterr().err
    with pytest.raises(UserError, match="tinystories import hf:someone/model --out DIR"):
        load("hf:someone/model")
    monkeypatch.setattr(hub_module, "download", lambda _: model)
    assert load("hf:someone/model", engine="cpu", precision="fp32").settings.temperature == 0.7


def test_a_model_of_ours_is_imported_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imports = pytest.importorskip("tinystories.formats.imports")
    monkeypatch.setattr(hub_module, "download", lambda _: model)
    for number, source in enumerate(("hf:me/stories", str(model))):
        out = tmp_path / str(number)
        assert run_command(cli, ["import", source, "--out", str(out)]) == 0, capsys.readouterr().err
        assert ModelBundle.read(out).provenance == ModelBundle.read(model).provenance
    with pytest.raises(UserError, match="leave --tokenizer out"):
        imports.import_model(str(model), model / "tokenizer.json")
