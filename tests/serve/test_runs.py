"""The lab's endpoints for runs: what is in the folder, live metrics, and everything that may be wrong with it."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import pytest
from serve_helpers import PATIENCE_S, Client, Running, Serve, wait_until

import tinystories
from tinystories.cli.write.serve import lab_options
from tinystories.errors import UserError
from tinystories.serve.errors import ApiError
from tinystories.serve.lab import live, run_metrics, runs
from tinystories.serve.lab.run_metrics import MetricsReader, RunProblemError, parse_record
from tinystories.serve.settings import ServerConfig

KEY = "a-long-enough-key"
TEXT = "Once upon a time there was a cat."


@pytest.fixture(scope="module")
def server(serve_model: Serve, trained_run: Path) -> Iterator[Running]:
    with serve_model(runs_folder=trained_run.parent, poll_s=0.01) as running:
        yield running


def get(running: Running, path: str) -> Any:
    status, answer, _ = running.client.request("GET", f"/lab/api/{path}")
    assert status == 200, answer
    return answer


def refused(running: Running, path: str, status: int, body: object = None) -> str:
    """The message with which a request fails."""
    method = "GET" if body is None else "POST"
    got, answer, _ = running.client.request(method, f"/lab/api/{path}", body)
    assert got == status, answer
    return str(answer["error"]["message"])


@contextlib.contextmanager
def watching(running: Running, path: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Open a stream; what is yielded returns the next event."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
    try:
        connection.request("GET", f"/lab/api/{path}", headers=running.client.headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")

        def read() -> dict[str, Any]:
            while line := response.readline():
                if line.startswith(b"data: "):
                    return dict(json.loads(line.removeprefix(b"data: ")))
            raise EOFError

        yield read
    finally:
        connection.close()


def status_of_stream(running: Running, name: str) -> int:
    """The status with which a stream begins, or is refused."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", f"/lab/api/runs/{name}/metrics")
        return connection.getresponse().status


def write_run(root: Path, name: str, *lines: str) -> Path:
    """Write a metrics.jsonl; return its path."""
    (root / name).mkdir(parents=True, exist_ok=True)
    path = root / name / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def step(number: int, **values: object) -> str:
    return json.dumps({"step": number, "tokens": 10 * number, "loss": 3.0, **values})


def test_a_run_is_listed_with_how_far_it_is(server: Running) -> None:
    answer = get(server, "runs")
    (run,) = answer["runs"]
    assert (answer["has_folder"], answer["n_runs"], answer["problems"]) == (True, 1, [])
    assert (run["name"], run["step"], run["steps"]) == ("tiny", 12, 12)
    assert run["loss"] > 0
    assert run["val_bits_per_byte"] > 0
    assert run["age_s"] >= 0


def test_samples_and_checkpoints_of_a_run(server: Running, trained_run: Path) -> None:
    answer = get(server, "runs/tiny")
    assert answer["checkpoints"] == [4, 8, 12]
    assert (answer["keep_checkpoints"], answer["checkpoint_every"]) == (9, 4)
    assert [section["step"] for section in answer["samples"]] == [4, 8, 12]
    text = (trained_run / "samples.md").read_text(encoding="utf-8")
    for section in answer["samples"]:
        assert "validation stories" in section["score"]
        assert len(section["stories"]) == 2
        assert section["stories"][0].startswith("The cat")
        assert all(f"> {story.splitlines()[0]}" in text for story in section["stories"])


def test_the_stream_has_the_lines_of_the_file(server: Running, trained_run: Path) -> None:
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    with watching(server, "runs/tiny/metrics?after=0") as read:
        event = read()
    assert event["run"] == "tiny"
    assert event["after"] == (trained_run / "metrics.jsonl").stat().st_size
    assert [record["step"] for record in event["records"]] == [json.loads(line)["step"] for line in lines]
    for record, line in zip(event["records"], lines, strict=True):
        assert record.items() <= json.loads(line).items()
    assert "stride" in event
    assert server.client.request("HEAD", "/lab/api/runs/tiny/metrics")[0] == 200  # ends at once
    offset = len(lines[0]) + 1
    with watching(server, f"runs/tiny/metrics?after={offset}") as read:
        assert len(read()["records"]) == len(lines) - 1


def test_a_checkpoint_scores_a_text_as_the_python_api_does(server: Running, trained_run: Path) -> None:
    surprises = []
    for number in (4, 8, 12):
        _, answer, _ = server.client.request("POST", "/lab/api/runs/tiny/score", {"text": TEXT, "step": number})
        folder = trained_run / "checkpoints" / f"step-{number:07d}"
        trace = tinystories.load(folder, engine="cpu", precision="fp32", threads=1).trace(TEXT)
        assert answer["ids"] == trace.ids.tolist()
        assert answer["surprise_bits"][1:] == pytest.approx(trace.surprise_bits[1:].tolist(), abs=1e-3)
        assert answer["bits_per_byte"] == pytest.approx(trace.bits_per_byte, abs=1e-3)
        surprises.append(answer["mean_bits"])
    assert len(set(surprises)) == 3
    _, newest, _ = server.client.request("POST", "/lab/api/runs/tiny/score", {"text": TEXT})
    assert newest["mean_bits"] == surprises[-1]
    assert "no checkpoint of step 5" in refused(server, "runs/tiny/score", 400, {"text": TEXT, "step": 5})


def test_new_lines_new_samples_and_two_runs_arrive_on_one_connection(serve_chaotic: Serve, tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "a", step(1)), write_run(tmp_path, "b", step(5), step(6))
    with (
        serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running,
        watching(running, "runs/a/metrics?after=0&also=b&also_after=0") as read,
    ):
        events = [read(), read()]
        assert {event["run"]: [r["step"] for r in event["records"]] for event in events} == {"a": [1], "b": [5, 6]}
        with first.open("a") as file:
            file.write(step(2) + "\n" + step(3)[:-5])
            file.flush()
            assert [record["step"] for record in read()["records"]] == [2]  # not the half-written one
            file.write(step(3)[-5:] + "\n")
        assert [record["step"] for record in read()["records"]] == [3]
        (tmp_path / "b" / "samples.md").write_text("## Step 6 (x)\n\n> A story\n")
        event = read()
        assert (event["run"], event["has_changed"]) == ("b", True)
        with second.open("a") as file:
            file.write(step(7) + "\n")
        assert read()["records"][0]["step"] == 7


def test_a_file_that_is_cut_back_or_replaced_is_read_from_the_top(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", step(1), step(2), step(3))
    reader = MetricsReader(lambda: path)
    assert [record["step"] for record in reader.read().records] == [1, 2, 3]
    assert reader.read() is None
    path.write_text(step(1) + "\n" + step(2) + "\n")  # as by a resumed run
    update = reader.read()
    assert (update.restart, [record["step"] for record in update.records]) == (True, [1, 2])
    path.write_text("".join(step(n) + "\n" for n in range(100, 120)))  # longer than before
    update = reader.read()
    assert (update.restart, update.records[0]["step"], len(update.records)) == (True, 100, 20)
    middle = MetricsReader(lambda: path, after=7)  # of a client that has seen another file
    assert middle.read().restart
    beyond = MetricsReader(lambda: path, after=10**9)
    assert beyond.read().restart


def test_a_run_that_vanishes_and_comes_back_is_reported(serve_chaotic: Serve, tmp_path: Path) -> None:
    write_run(tmp_path, "a", step(1))
    with (
        serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running,
        watching(running, "runs/a/metrics?after=0") as read,
    ):
        read()
        shutil.rmtree(tmp_path / "a")
        event = read()
        while "problem" not in event:  # the rest of the folder may go first
            event = read()
        assert "was removed" in event["problem"]
        assert str(tmp_path) not in event["problem"]
        write_run(tmp_path, "b", step(9))
        (tmp_path / "b").rename(tmp_path / "a")
        event = read()
        assert event["problem"] is None
        assert (event["restart"], event["records"][0]["step"]) == (True, 9)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "null",
        "[]",
        '"step"',
        "{}",
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": -1}',
        '{"step": true}',
        '{"step": 1' + "0" * 30 + "}",
        '{"step": ' + "9" * 6000 + "}",
        "[" * 100_000,
        "\x00\x00\x00",
        "\xff\xfe",
    ],
)
def test_damaged_lines_are_counted_and_left_out(tmp_path: Path, line: str) -> None:
    path = write_run(tmp_path, "a", step(1))
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n" + step(2).encode() + b"\n\n")
    update = MetricsReader(lambda: path).read()
    assert [record["step"] for record in update.records] == [1, 2]
    assert (update.n_damaged, update.first_damaged) == (1, 2)


def test_numbers_that_are_none_are_null() -> None:
    line = b'{"step": 3, "loss": NaN, "grad_norm": Infinity, "tokens": "many", "learning_rate": 1e308, "seconds": [1]}'
    assert parse_record(line) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "tokens": None,
        "learning_rate": None,
        "seconds": None,
    }


def test_a_line_without_an_end_takes_little_memory(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", step(1))
    with path.open("ab") as file:
        file.write(b"x" * (3 * run_metrics.CHUNK_BYTES) + b"\n" + step(2).encode() + b"\n")
    update = MetricsReader(lambda: path).read()
    assert [record["step"] for record in update.records] == [1, 2]
    assert update.n_damaged >= 1
    assert update.after == path.stat().st_size


def test_a_hundred_thousand_points_are_thinned(serve_chaotic: Serve, tmp_path: Path) -> None:
    n = 100_000
    lines = [step(i) for i in range(n)]
    lines[50_000] = json.dumps({"step": 50_000, "tokens": 5, "evaluated": True, "val_bits_per_byte": 1.5})
    write_run(tmp_path, "long", *lines)
    with (
        serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running,
        watching(running, "runs/long/metrics?after=0") as read,
    ):
        event = read()
        steps = [record["step"] for record in event["records"]]
        assert run_metrics.MAX_POINTS / 2 <= len(steps) <= run_metrics.MAX_POINTS + 3
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, n - 1)
        assert 50_000 in steps  # evaluations are few, and stay
        assert event["stride"] == 32
        assert get(running, "runs")["runs"][0]["step"] == n - 1


def test_a_file_too_large_to_draw_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, "a", step(1))
    monkeypatch.setattr(run_metrics, "MAX_METRICS_BYTES", 10)
    with pytest.raises(RunProblemError, match="too large to draw"):
        MetricsReader(lambda: path).read()


def test_thousands_of_runs_are_listed_newest_first_and_can_be_searched(serve_chaotic: Serve, tmp_path: Path) -> None:
    for i in range(2000):
        path = write_run(tmp_path, f"run-{i:04d}", step(i))
        os.utime(path, (1e9 + i, 1e9 + i))
    with serve_chaotic(runs_folder=tmp_path) as running:
        answer = get(running, "runs")
        assert answer["n_runs"] == 2000
        assert [run["name"] for run in answer["runs"]] == [f"run-{i:04d}" for i in range(1999, 1899, -1)]
        answer = get(running, "runs?find=RUN-007")
        assert (answer["n_runs"], answer["runs"][0]["step"]) == (10, 79)


HOSTILE_NAMES = ["<img src=x onerror=alert(1)>", "a b", "ü🐈", "a'b\"c", "%2e%2e", "a?b#c", "-rf", "a\nb", "x" * 255]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_strange_names_are_ordinary(serve_chaotic: Serve, tmp_path: Path, name: str) -> None:
    write_run(tmp_path, name, step(4))
    with serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running:
        assert get(running, "runs")["runs"][0]["name"] == name
        assert get(running, f"runs/{quote(name, safe='')}")["name"] == name
        with watching(running, f"runs/{quote(name, safe='')}/metrics") as read:
            assert read()["records"][0]["step"] == 4


@pytest.mark.parametrize(
    "name",
    ["..", ".", ".hidden", "", "%2e%2e", "..%2fsecret", "a%2f..%2f..%2fsecret", "a%00b", "x" * 4000, "%ff", "nothing"],
)
def test_no_name_leads_out_of_the_folder(serve_chaotic: Serve, tmp_path: Path, name: str) -> None:
    write_run(tmp_path, "secret", step(1))
    write_run(tmp_path / "runs", "a", step(1))
    write_run(tmp_path / "runs", ".hidden", step(1))
    with serve_chaotic(runs_folder=tmp_path / "runs") as running:
        for path in (f"runs/{name}", f"runs/{name}/metrics"):
            if name:
                assert running.client.request("GET", f"/lab/api/{path}")[0] == 404
        for hostile in ("..", "../secret", "a/../../secret", "a\0b", "", "\ud800"):
            with pytest.raises(ApiError):
                runs.find_run(tmp_path / "runs", hostile)
        assert [run["name"] for run in get(running, "runs")["runs"]] == ["a"]


def test_links_out_of_the_folder_are_not_followed(serve_chaotic: Serve, tmp_path: Path, trained_run: Path) -> None:
    root = tmp_path / "runs"
    secret = write_run(tmp_path, "secret", step(77))
    (tmp_path / "secret" / "samples.md").write_text("## Step 1 (x)\n\n> hidden words\n")
    write_run(root, "good", step(1))
    (root / "linked").symlink_to(tmp_path / "secret")
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(secret)
    (root / "loop").symlink_to(root / "loop")
    (root / "inside").symlink_to(root / "good")
    (root / "good" / "samples.md").symlink_to(tmp_path / "secret" / "samples.md")
    (root / "good" / "checkpoints").symlink_to(trained_run / "checkpoints")
    with serve_chaotic(runs_folder=root, poll_s=0.01) as running:
        answer = get(running, "runs")
        assert sorted(run["name"] for run in answer["runs"]) == ["good", "inside"]
        assert answer["problems"] == ["2 links lead out of the folder of runs, so that they are not followed"]
        assert running.client.request("GET", "/lab/api/runs/linked")[0] == 404
        described = get(running, "runs/good")
        assert (described["samples"], described["checkpoints"]) == ([], [])
        assert "hidden words" not in json.dumps(described)
        with watching(running, "runs/file/metrics") as read:
            event = read()
            assert "not a file inside the folder" in event["problem"]
            assert "records" not in event


def test_a_checkpoint_with_a_linked_or_damaged_file_is_refused(
    serve_model: Serve, trained_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(trained_run, root / "tiny")
    folder = root / "tiny" / "checkpoints" / "step-0000004"
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (root / "tiny" / "checkpoints" / "step-0000008" / "model.safetensors").write_bytes(b"x" * 100)
    with serve_model(runs_folder=root) as running:
        linked = refused(running, "runs/tiny/score", 400, {"text": TEXT, "step": 4})
        damaged = refused(running, "runs/tiny/score", 400, {"text": TEXT, "step": 8})
    assert "link out of the folder" in linked
    assert "checksum" in damaged
    assert str(tmp_path) not in linked + damaged


def test_what_is_not_a_file_is_not_read(serve_chaotic: Serve, tmp_path: Path) -> None:
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "metrics.jsonl")
    write_run(tmp_path, "good", step(1))
    os.mkfifo(tmp_path / "good" / "samples.md")
    with serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running:
        assert [run["name"] for run in get(running, "runs")["runs"]] == ["good"]
        assert "samples.md is not a file" in get(running, "runs/good")["problems"][0]
        with watching(running, "runs/pipe/metrics") as read:
            assert "not a file" in read()["problem"]


def test_samples_that_are_damaged_or_long_are_shown_as_far_as_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "a", step(1))
    run = runs.Run(tmp_path, "a")
    assert run.describe()["problems"] == ["the run has no samples.md, or it was removed"]
    data = (
        b"no header\n## Step 1,000 (1.5 bits)\n\n> A <b>\n>\n> dog\n\n> Two\xff\n\n## Step x\n## Step 2,000\n\n> cut o"
    )
    (tmp_path / "a" / "samples.md").write_bytes(data)
    assert run.describe()["samples"] == [
        {"step": 1000, "score": "1.5 bits", "stories": ["A <b>\n\ndog", "Two\ufffd"]},
        {"step": 2000, "score": "", "stories": ["cut o"]},
    ]
    monkeypatch.setattr(runs, "MAX_SAMPLES_BYTES", 30)
    described = run.describe()
    assert [section["step"] for section in described["samples"]] == [2000]
    assert "only its last part" in described["problems"][0]


def test_settings_that_cannot_be_read_are_unknown(tmp_path: Path) -> None:
    write_run(tmp_path, "a", step(1))
    run = runs.Run(tmp_path, "a")
    for text in ("[train", "train = 3", "[train]\nsteps = 'x'", "[train]\nsteps = true", "\0", "[" * 70_000):
        (tmp_path / "a" / "config.toml").write_text(text)
        assert run.setting("steps") is None
    (tmp_path / "a" / "config.toml").write_text("[train]\nsteps = 30\n")
    assert run.setting("steps") == 30


def test_without_a_folder_there_are_no_runs(serve_chaotic: Serve, tmp_path: Path) -> None:
    with serve_chaotic() as running:
        assert get(running, "runs") == {"has_folder": False, "runs": [], "n_runs": 0, "problems": []}
        assert running.client.request("GET", "/lab/api/runs/a")[0] == 404
    root = tmp_path / "runs"
    root.mkdir()
    with serve_chaotic(runs_folder=root) as running:
        assert get(running, "runs")["runs"] == []
        root.rmdir()
        assert "cannot be read" in get(running, "runs")["problems"][0]


def test_a_folder_that_is_missing_or_is_a_run_is_refused_at_the_start(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        ServerConfig(runs_folder=tmp_path / "nothing")
    with pytest.raises(UserError, match=f"is a run itself; name the folder that holds it: --runs {trained_run.parent}"):
        ServerConfig(runs_folder=trained_run)


def test_the_options_find_the_folder_and_the_second_model(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path | None, Path | None]] = []

    @click.command()
    @lab_options
    def command(runs_folder: Path | None, compare_model: Path | None) -> None:
        seen.append((runs_folder, compare_model))

    def invoke(*words: str) -> None:
        command.main(list(words), standalone_mode=False)

    monkeypatch.chdir(tmp_path)
    invoke()
    (tmp_path / "runs").mkdir()
    invoke()
    invoke("--runs", "elsewhere", "--compare", str(trained_run))
    assert seen == [(None, None), (Path("runs"), None), (Path("elsewhere"), trained_run)]
    with pytest.raises(UserError, match="no such model directory"):
        invoke("--compare", "nothing")


@pytest.mark.parametrize(
    "query",
    [
        "after=-1",
        "after=x",
        "after=1.5",
        "after=%C2%B2",
        "after=" + "1" * 20,
        "also=tiny",
        "also=b&also=c&also=d&also=e",
    ],
)
def test_a_wrong_stream_is_refused(server: Running, query: str) -> None:
    assert server.client.request("GET", f"/lab/api/runs/tiny/metrics?{query}")[0] in (400, 404)


def test_runs_obey_key_host_and_origin(serve_chaotic: Serve, tmp_path: Path) -> None:
    write_run(tmp_path, "a", step(1))
    with serve_chaotic(keys=(KEY,), runs_folder=tmp_path, poll_s=0.01) as running:
        stranger = Client(running.port)
        for path in ("runs", "runs/a", "runs/a/metrics", "quiz", "compare"):
            assert stranger.request("GET", f"/lab/api/{path}")[0] == 401
            assert running.client.request("GET", f"/lab/api/{path}", None, {"Host": "evil.example"})[0] == 403
            origin = {"Origin": "http://evil.example"}
            assert running.client.request("GET", f"/lab/api/{path}", None, origin)[0] == 403
        assert stranger.request("POST", "/lab/api/runs/a/score", {"text": "a"})[0] == 401
        with watching(running, "runs/a/metrics") as read:
            assert read()["records"][0]["step"] == 1


def test_a_stream_ends_with_the_server_and_too_many_are_refused(
    serve_chaotic: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_WATCHERS", 2)
    write_run(tmp_path, "a", step(1))
    with serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running, contextlib.ExitStack() as stack:
        reads = [stack.enter_context(watching(running, "runs/a/metrics")) for _ in range(2)]
        for read in reads:
            read()
        assert status_of_stream(running, "a") == 429
        running.signal()  # drains: nothing else is in progress
        for read in reads:
            with pytest.raises(EOFError):
                read()


def test_a_stream_ends_whole_when_the_server_drains(tmp_path: Path) -> None:
    write_run(tmp_path, "a", step(1))
    service: Any = types.SimpleNamespace(config=ServerConfig(poll_s=0.001), is_draining=False)
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)
        service.is_draining = b"records" in message.get("body", b"")

    async def receive() -> Any:
        await asyncio.Event().wait()  # the client stays

    async def run() -> None:
        response = live.LiveMetrics(service, live.Watchers(), [live.Feed(runs.Run(tmp_path, "a"), 0)])
        async with asyncio.timeout(PATIENCE_S):
            await response({"type": "http", "method": "GET"}, receive, send)

    asyncio.run(run())
    assert messages[-1] == {"type": "http.response.body", "body": b""}


def test_a_second_ctrl_c_ends_a_stream_quietly(
    serve_chaotic: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, "a", step(1))
    with (
        serve_chaotic(runs_folder=tmp_path, poll_s=1000.0) as running,  # it does not end by itself
        watching(running, "runs/a/metrics") as read,
    ):
        read()
        running.signal()
        running.signal()
        running.thread.join(PATIENCE_S)
        assert not running.thread.is_alive()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_page_that_leaves_frees_its_place(
    serve_chaotic: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_WATCHERS", 1)
    write_run(tmp_path, "a", step(1))
    with serve_chaotic(runs_folder=tmp_path, poll_s=0.01) as running:
        with watching(running, "runs/a/metrics") as read:
            read()
        path = "/lab/api/runs/a/metrics?after=x"  # answered whether there is a place or not
        assert running.client.request("GET", path)[0] == 400

        wait_until(lambda: status_of_stream(running, "a") == 200)
