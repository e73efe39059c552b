"""Hub sources: the real `datasets` and `huggingface_hub` against a local stand-in; offline, a quick and useful error.

The clients read HF_ENDPOINT when they are imported, so they run in subprocesses.
"""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hub_server import REVISION, Hub, serving
from pyarrow import parquet

from tinystories.data.tokenizer import END

pytestmark = pytest.mark.extended

pytest.importorskip("datasets")

READ = """
import itertools, json
from tinystories.data.source import hub as hub_source, reader
from tinystories.data.source.reader import ReadOptions
from tinystories.data.source.resolve import resolve_source, iter_stories
from tinystories.errors import UserError

def attempt(call):
    try:
        return call()
    except UserError as error:
        return str(error)

def resumed(name, step):
    "How many positions give other stories than a straight reading, and how many there are."
    source = resolve_source(name).pin_revision()
    batches = list(source.read_batches(ReadOptions()))
    wrong = 0
    for n in range(0, len(batches), step):
        position = json.loads(json.dumps(batches[n].position))
        rest = [s for batch in source.read_batches(ReadOptions(), position) for s in batch.stories]
        wrong += rest != [s for batch in batches[n + 1:] for s in batch.stories]
    return wrong, len(batches)

answers = {}
for name in ("hf:someone/parquet", "hf:someone/jsonl", "hf:someone/text", "tinystories", "tinystories-v2",
             "tinystories-clean", "hf:someone/parquet@main", "hf:someone/parquet@REVISION"):
    answers[name] = {split: list(iter_stories(name, split=split)) for split in ("train", "val")}
answers["revision"] = resolve_source("hf:someone/jsonl").pin_revision().revision
own = [resolve_source(name).pin_revision().get_validation_split() for name in ("tinystories", "hf:someone/jsonl")]
answers["validation"] = [source and source.name for source in own]
answers["column"] = attempt(lambda: list(iter_stories("hf:someone/other-column")))
answers["chosen"] = list(iter_stories("hf:someone/other-column", text_field="story"))
answers["number"] = attempt(lambda: list(iter_stories("hf:someone/other-column", text_field="id")))
answers["no separator"] = attempt(lambda: list(iter_stories("hf:someone/no-separator")))
answers["no repository"] = attempt(lambda: list(iter_stories("hf:someone/nothing")))
answers["no revision"] = attempt(lambda: list(iter_stories("hf:someone/jsonl@v9")))
answers["no file"] = attempt(lambda: list(iter_stories("hf:someone/empty")))
answers["broken"] = attempt(lambda: list(iter_stories("hf:someone/broken")))
reader.BATCH_BYTES = 200
answers["resumed tinystories-clean"] = resumed("tinystories-clean", 1)
hub_source.ROWS_PER_BATCH = 7
for name in ("hf:someone/parquet", "hf:someone/jsonl", "hf:someone/text"):
    answers["resumed " + name] = resumed(name, 9)
print(json.dumps(answers))
""".replace("REVISION", REVISION)

TRAIN = [f"Story {n} of a {'café' if n % 9 == 0 else 'cat'}.\nThe end." for n in range(120)]
VAL = [f"Validation story {n}." for n in range(10)]
CLEAN = [f"row {n}" for n in range(20_050)]


def table(texts: list[str], column: str = "text") -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), out, row_group_size=25)
    return out.getvalue()


def text(texts: list[str]) -> bytes:
    return "".join(f"{story}\n{END}\n" for story in texts).encode()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": story}) + "\n" for story in texts).encode()


DATASETS = {
    "someone/parquet": {
        "README.md": b"---\nlicense: mit\n---\n# Stories\n",
        "data/train-00000-of-00002.parquet": table(TRAIN[:70]),
        "data/train-00001-of-00002.parquet": table(TRAIN[70:]),
        "data/validation-00000-of-00001.parquet": table(VAL),
    },
    "someone/jsonl": {"train.jsonl": lines(TRAIN)},
    "someone/text": {"train.txt": text(TRAIN), "validation.txt": text(VAL)},
    "roneneldan/TinyStories": {
        "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
        "TinyStories-train.txt": b"another form of the same",
        "TinyStoriesV2-GPT4-train.txt": text(["v2", *TRAIN]),
        "TinyStoriesV2-GPT4-valid.txt": text(["v2", *VAL]),
        "data/train-00000-of-00001-2d5a1467fff1081b.parquet": table(["v1", *TRAIN]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": table(["v1", *VAL]),
    },
    "karpathy/tinystories-gpt4-clean": {"train.parquet": table(CLEAN)},
    "someone/other-column": {"train.parquet": table(TRAIN, "story")},
    "someone/no-separator": {"train.txt": b"one\ntwo\n"},
    "someone/empty": {"README.md": b"# Nothing yet\n"},
    "someone/broken": {"train.parquet": table(TRAIN)[:900]},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving(Hub(DATASETS)) as server:
        yield server


def child(code: str, endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Settings of the environment that runs the tests.
    hidden = ("HF_", "HUGGING", "http", "HTTP", "no_proxy", "NO_PROXY")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = child(READ, hub.endpoint, tmp_path_factory.mktemp("home"))
    assert done.stderr == ""  # the clients print nothing either
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


@pytest.mark.parametrize("name", ["hf:someone/parquet", "hf:someone/text"])
def test_a_dataset_has_its_own_splits(answers: dict[str, Any], name: str) -> None:
    assert answers[name] == {"train": TRAIN, "val": VAL}


def test_a_dataset_without_validation_split_is_read_whole(answers: dict[str, Any]) -> None:
    assert answers["hf:someone/jsonl"] == {"train": TRAIN, "val": TRAIN}
    assert answers["validation"] == ["tinystories (validation)", None]


def test_the_known_collections_are_found_in_their_repositories(answers: dict[str, Any]) -> None:
    assert answers["tinystories"] == {"train": ["v1", *TRAIN], "val": ["v1", *VAL]}
    assert answers["tinystories-v2"] == {"train": ["v2", *TRAIN], "val": ["v2", *VAL]}
    assert answers["tinystories-clean"] == {"train": CLEAN[20_000:], "val": CLEAN[10_000:20_000]}


def test_everything_is_read_at_one_commit(answers: dict[str, Any], hub: Hub) -> None:
    assert answers["revision"] == REVISION
    assert (
        answers["hf:someone/parquet@main"] == answers[f"hf:someone/parquet@{REVISION}"] == answers["hf:someone/parquet"]
    )
    assert not [request for request in hub.requests if "/resolve/main/" in request]


@pytest.mark.parametrize("name", ["hf:someone/parquet", "hf:someone/jsonl", "hf:someone/text", "tinystories-clean"])
def test_streams_resume_from_any_batch(answers: dict[str, Any], name: str) -> None:
    wrong, batches = answers[f"resumed {name}"]
    assert wrong == 0
    assert batches > 10 or name == "tinystories-clean"


def test_columns_are_named_and_chosen(answers: dict[str, Any]) -> None:
    assert "no column 'text'; columns: id, story" in answers["column"]
    assert "--text-field" in answers["column"]
    assert answers["chosen"] == TRAIN
    assert "holds int64, not text" in answers["number"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no repository", "hf:someone/nothing: no dataset someone/nothing on the Hub"),
        ("no revision", "hf:someone/jsonl@v9: someone/jsonl has no revision v9"),
        ("no separator", f"no {END} in the whole file"),
        ("no file", "hf:someone/empty: streaming someone/empty"),
        ("broken", "hf:someone/broken: streaming someone/broken"),
    ],
)
def test_errors_of_the_hub_are_one_line(answers: dict[str, Any], what: str, message: str) -> None:
    assert message in answers[what]
    assert "\n" not in answers[what]


PREPARE = """
import dataclasses, json, sys
from pathlib import Path
from tinystories.data.source import reader
from tinystories.data.staging import StagingDir
from tinystories.data.prepare import prepare

reader.BATCH_BYTES = 200
right, saves = StagingDir.save, iter(range(99))

def stop(self, **options):
    right(self, now=True)
    assert next(saves) < 5, "stop"

def run(out):
    report = prepare("hf:someone/parquet", Path(sys.argv[1]) / out, tokenizer="bpe:300", progress=False)
    return dataclasses.asdict(report)

answers = {}
if "network" in sys.argv:
    StagingDir.save = stop
    try:
        run("out")
    except AssertionError as error:
        answers["stopped"] = str(error)
    StagingDir.save = right
    answers["straight"] = run("straight")
answers["out"] = run("out")
print(json.dumps(answers, default=str))
"""


def test_prepare_records_the_commit_resumes_and_then_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    answers = json.loads(child(PREPARE, hub.endpoint, tmp_path, str(tmp_path), "network").stdout)
    assert answers["stopped"] == "stop"
    assert answers["out"]["meta"] == answers["straight"]["meta"]
    meta = answers["straight"]["meta"]
    assert meta["revision"] == meta["val_revision"] == REVISION
    assert {name: split["stories"] for name, split in meta["splits"].items()} == {"train": 120, "val": 10}
    again = json.loads(child(PREPARE, "http://127.0.0.1:9", tmp_path, str(tmp_path)).stdout)
    assert again["out"]["up_to_date"]


OFFLINE = """
import sys
from tinystories.data.source import hub as hub_source
from tinystories.data.prepare import prepare
from tinystories.errors import UserError

hub_source.CONNECT_TIMEOUT_SECONDS = float(sys.argv[2])
try:
    prepare("tinystories", sys.argv[1], tokenizer="bpe:300")
except UserError as error:
    print(error)
"""


def offline(endpoint: str, tmp_path: Path, seconds: float) -> str:
    """The output that a user without network access sees."""
    done = child(OFFLINE, endpoint, tmp_path, str(tmp_path / "out"), str(seconds))
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return done.stdout


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])  # refuses; has no address
def test_without_network_one_line_says_how_to_go_on(endpoint: str, tmp_path: Path) -> None:
    message = offline(endpoint, tmp_path, 20)
    assert f"could not reach {endpoint}/datasets/roneneldan/TinyStories" in message
    for way in ("--data", "local file", "sample"):
        assert way in message
    assert not (tmp_path / "out").exists()


def test_a_network_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        message = offline(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, 1)
    assert "could not reach" in message
    assert "sample" in message
