"""The commands as a user types them, in processes of their own: output, exit codes, one-line errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PROGRAM, ROOT, one_line_error, run_python, tinystories

from tinystories import checkpoint, cli, load
from tinystories.cli.write import generate as write
from tinystories.data.prepare import prepare
from tinystories.engine.cpu import jit
from tinystories.generate.batching import Request

pytestmark = pytest.mark.extended

TINY = "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 64 --train.device cpu"
SHORT = "--train.steps 6 --train.batch_size 4 --train.micro_batch 2 --train.log_every 2 --train.eval_every 4"


@pytest.fixture(scope="module")
def run(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, made by the command line."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    result = tinystories(
        "train", "--data", str(sample_data), "--out", str(out), *TINY.split(), *SHORT.split(), "--json"
    )
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout)
    assert last["steps"] == 6
    assert last["bits_per_byte"] > 0
    assert "tinystories generate" in result.stderr
    return out


def test_help_shows_examples_and_imports_nothing_large() -> None:
    """Processor time would depend on the machine; what takes it is imports."""
    assert "tinystories generate" in tinystories("--help").stdout
    program = "import sys, tinystories.cli; print({'numpy', 'torch', 'numba', 'tokenizers'} & sys.modules.keys())"
    assert run_python("-c", program).stdout == "set()\n"


@pytest.mark.parametrize("command", [*cli.cli.list_commands(None), "pack"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.cli, [command, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_generate_twice_gives_the_same_text(run: Path) -> None:
    words = ["generate", str(run), "--prompt", "Once upon a time", "--max-tokens", "30", "--seed", "1"]
    first, second, other = tinystories(*words), tinystories(*words), tinystories(*words[:-1], "2")
    assert first.stdout == second.stdout != other.stdout
    assert first.stdout.startswith("Once upon a time")
    assert re.search(r"30 tokens, \d+ tokens/s, seed 1", first.stderr)
    whole = tinystories(*words, "--no-stream")
    assert whole.stdout == first.stdout


@pytest.mark.parametrize(
    ("stop", "ends_before"),
    [(r"\n", "\n"), ("\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\d", r"\d"), ("n", "n")],
)
def test_stop_takes_a_newline_and_a_tab_as_escapes(
    stop: str, ends_before: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests: list[Request] = []
    monkeypatch.setattr(write, "print_stories", lambda _, request, *__, **___: requests.append(request))
    assert cli.run(cli.cli, ["generate", "--engine", "cpu", "--stop", stop, "--stop", "x"]) == 0
    assert requests[0].stop == (ends_before, "x")
    assert cli.run(cli.cli, ["generate", "--help"]) == 0
    assert r"\n is a newline (as is $'\n' in bash)" in " ".join(capsys.readouterr().out.split())


def test_stop_at_a_newline_ends_the_story_with_its_paragraph() -> None:
    whole, stopped = (
        tinystories("generate", "--seed", "36", "--max-tokens", "90", *more).stdout for more in ([], ["--stop", r"\n"])
    )
    assert "\n" in whole.rstrip("\n")
    assert stopped == whole.partition("\n")[0] + "\n"


def test_generate_writes_jsonl_and_txt(run: Path, tmp_path: Path) -> None:
    common = ["generate", str(run), "--prompt", "The cat", "--num", "3", "--seed", "5", "--max-tokens", "20"]
    shown = tinystories(*common, "--out", str(tmp_path / "s.jsonl"))
    assert shown.returncode == 0
    stories = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [story["number"] for story in stories] == [0, 1, 2]
    assert len({story["text"] for story in stories}) == 3
    assert shown.stdout == "\n\n---\n\n".join(story["text"] for story in stories) + "\n"
    tinystories(*common, "--out", str(tmp_path / "s.txt"), "--no-stream")
    text = (tmp_path / "s.txt").read_text(encoding="utf-8")
    assert text == "".join(story["text"] + "\n<|endoftext|>\n" for story in stories)
    assert "must end in .txt or .jsonl" in one_line_error(tinystories(*common, "--out", str(tmp_path / "s.doc")))


def test_generate_writes_the_stories_of_the_python_api(run: Path, tmp_path: Path) -> None:
    words = ["--prompt", "The cat", "--num", "10", "--seed", "5", "--max-tokens", "20", "--engine", "cpu"]
    shown = tinystories("generate", str(run), *words, "--out", str(tmp_path / "s.jsonl"))
    stories = load(run, engine="cpu").generate("The cat", num=10, seed=5, max_tokens=20)
    printed = "\n\n---\n\n".join(story.text for story in stories) + "\n"
    assert shown.stdout == re.sub("\r\n?", "\n", printed)  # `tinystories` reads stdout with universal newlines
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["ids"] for line in lines] == [list(story.ids) for story in stories]


def test_eval_reports_bits_per_byte_of_the_text(run: Path, sample_data: Path, tmp_path: Path) -> None:
    story = "The little dog ran home. He was glad."
    (tmp_path / "s.txt").write_text(f"{story}\n<|endoftext|>\nA cat sat.\n<|endoftext|>\n", encoding="utf-8")
    result = tinystories("eval", str(run), "--data", str(tmp_path / "s.txt"), "--json")
    score = json.loads(result.stdout)
    assert {"bits_per_byte", "nats_per_token", "tokens", "bytes", "stories"} <= score.keys()
    assert score["stories"] == 2
    assert score["bytes"] == len(story) + len("A cat sat.")
    assert score["bits_per_byte"] * score["bytes"] * 0.6931472 == pytest.approx(
        score["nats_per_token"] * score["tokens"], rel=1e-5
    )
    prepared = tinystories("eval", str(run), "--data", str(sample_data), "--limit", "2", "--json")
    assert json.loads(prepared.stdout)["stories"] == 2


def test_info_describes_a_model_prepared_data_and_a_config(run: Path, sample_data: Path) -> None:
    def facts(*words: str) -> dict[str, Any]:
        result = tinystories("info", *words, "--json")
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    assert facts("--config", str(ROOT / "configs" / "seed-89m.toml"))["parameters"] == 89_274_368
    assert facts("--config", "seed-89m")["parameters"] == 89_274_368
    model = facts(str(run))
    assert model["model"]["n_embd"] == 16
    assert model["provenance"]["step"] == 6
    assert facts(str(sample_data))["vocab_size"] == 400
    assert "parameters" in tinystories("info", str(run)).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --config nano --train.stpes 3", "unknown setting train.stpes; did you mean train.steps?"),
        ("train --config nan0", "did you mean the preset nano?"),
        ("train --train.steps many", "expected a value of type int"),
        ("train --train.steps", "needs a value"),
        ("train --xyzzy", "settings look like --train.steps 40"),
        ("train steps", "did you mean --train.steps?"),
        ("train --reusme", "did you mean --resume?"),
        ("train small", "did you mean --config small?"),
        ("train --data nowhere --out never", "nowhere"),
        (
            "train --data CONTRIBUTING.md --out never",
            "tinystories prepare CONTRIBUTING.md --tokenizer bpe:4096 --out DIR",
        ),
        ("generate nowhere", "no such model directory; train one with: tinystories train --out nowhere"),
        ("generate runs/seed-89m", "tinystories train --config seed-89m --out runs/seed-89m"),
        ("generate CONTRIBUTING.md", "a file; a model is a directory"),
        ("generate --promt Once", "(see tinystories generate --help)"),
        ("generate --shortlist", "the bundled storyteller has no shortlist"),
        ("generate --out stories.md", "stories.md: the name of a story file must end in .txt or .jsonl"),
        ("generate --out nowhere/stories.txt", "folder nowhere"),
        ("prepare sample empty.txt --out never", "sample is a named collection"),
        ("prepare empty.txt --out never", "empty.txt is empty"),
        ("prepare plain.txt --tokenizer bpe:300 --out never", "no <|endoftext|> in the whole file"),
        ("quantize", "MODEL"),
        ("eval nowhere --data nothing.txt", "no such model directory"),
        ("prepare nothing.txt --out never", "nothing.txt"),
        ("info somewhere --config nano", "either PATH or --config"),
        ("frobnicate", "frobnicate"),
        ("generate . --temperature -1", "config.json"),
    ],
)
def test_every_mistake_gets_one_line_and_exit_code_2(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "plain.txt").write_text("Once upon a time.")
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    assert message in one_line_error(tinystories(*words.split(), cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CONTRIBUTING.md", "empty.txt", "plain.txt"]


def test_a_prompt_in_place_of_the_model_is_recognized() -> None:
    assert "use --prompt" in one_line_error(tinystories("generate", "The little fox"))


def test_a_file_of_another_program_is_sent_to_import(tmp_path: Path) -> None:
    (tmp_path / "a b.gguf").write_bytes(b"GGUF")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, quoted in (("a b.gguf", "'a b.gguf'"), ("hf", "hf")):
        error = one_line_error(tinystories("generate", name, cwd=tmp_path))
        assert f"tinystories import {quoted} --out DIR" in error


@pytest.mark.parametrize("words", ["", "bench"])
def test_help_is_shown_without_a_command(words: str) -> None:
    shown = tinystories(*words.split())
    assert shown.returncode == 2
    assert shown.stderr.startswith("Usage: ")
    assert "error" not in shown.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
@pytest.mark.parametrize(("where", "code"), [("> /dev/full", 2), ("--no-stream > /dev/full", 2), ("--out full.txt", 2)])
def test_a_full_disk_is_one_line(run: Path, tmp_path: Path, where: str, code: int) -> None:
    (tmp_path / "full.txt").symlink_to("/dev/full")
    program = f'"{sys.executable}" -m tinystories generate "{run}" --max-tokens 5 {where}'
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "cannot be written: No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_that_cannot_be_written_is_one_line(sample_data: Path) -> None:
    words = ["train", "--data", str(sample_data), "--out", "/proc/a", *TINY.split(), *SHORT.split()]
    assert "--out /proc/a cannot be written" in one_line_error(tinystories(*words))


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Compiling is replaced; it says that it cannot keep the result.
    monkeypatch.setattr(jit, "load_object", lambda *_: None)
    monkeypatch.setattr(jit, "load_or_compile", lambda _: b"")
    monkeypatch.setenv("TINYSTORIES_CACHE", str(tmp_path / "missing"))
    assert cli.run(cli.cli, ["warmup"]) == 2
    assert f"{tmp_path / 'missing'} cannot be written: set TINYSTORIES_CACHE" in capsys.readouterr().err


def test_the_bundled_storyteller_is_never_written_to(tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.BUNDLED_MODEL.iterdir()}
    for precision in ("int4", "fp32"):
        done = tinystories("generate", "--precision", precision, "--max-tokens", "3", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in checkpoint.BUNDLED_MODEL.iterdir()} == before


def test_a_space_after_the_prompt_is_noted(run: Path) -> None:
    words = ["generate", str(run), "--max-tokens", "3", "--prompt"]
    assert "the prompt ends in a space" in tinystories(*words, "Once ").stderr
    assert "the prompt ends in a space" not in tinystories(*words, "Once").stderr


def test_eval_in_int8_and_int4_is_near_fp32(run: Path, tmp_path: Path) -> None:
    """int8 and int4 are near fp32, which is torch's; none is another."""
    model = tmp_path / "model"
    shutil.copytree(run, model)
    assert "ready: " in tinystories("warmup").stdout
    packed = tinystories("quantize", str(model), "--precision", "int8", "--precision", "int4")
    assert packed.returncode == 0, packed.stderr
    assert [line.partition(":")[0] for line in packed.stdout.splitlines()] == [
        str(model / f"packed-{precision}.safetensors") for precision in ("int8", "int4")
    ]
    (tmp_path / "s.txt").write_text("The dog ran home.<|endoftext|>Lily saw a small bird and smiled.")
    scores = {}
    for flags in ("", "--engine cpu", "--precision int8", "--engine cpu --precision int4 --threads 1"):
        result = tinystories("eval", str(model), "--data", str(tmp_path / "s.txt"), "--json", *flags.split())
        assert result.returncode == 0, result.stderr
        scores[flags] = json.loads(result.stdout)["bits_per_byte"]
    exact = scores.pop("")
    assert scores.pop("--engine cpu") == pytest.approx(exact, rel=1e-5)
    assert min(abs(score - exact) for score in scores.values()) > 0
    assert max(abs(score - exact) for score in scores.values()) < 0.05 * exact


@pytest.mark.parametrize("name", ["quantize", "pack"])
def test_quantize_and_its_former_name_pack_are_one_command(run: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(run, model)
    result = tinystories(name, str(model), "--precision", "int8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{model}/packed-int8.safetensors: ")
    assert f"tinystories {name} --help" in one_line_error(tinystories(name))


def test_pack_is_not_listed() -> None:
    listed = [line.split()[0] for line in tinystories("--help").stdout.splitlines() if line.startswith("  ")]
    assert "quantize" in listed
    assert "pack" not in listed


def test_an_int8_model_directory_tells_the_same_story(run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    packed = tinystories("quantize", str(run), "--out", str(small))
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout.startswith(f"{small}: ")
    words = ["--seed", "1", "--max-tokens", "20", "--engine", "cpu"]
    expected = tinystories("generate", str(run), *words, "--precision", "int8")
    for precision in ("auto", "int8"):
        assert tinystories("generate", str(small), *words, "--precision", precision).stdout == expected.stdout
    from_both = [tinystories("generate", str(model), *words, "--precision", "int8-a8") for model in (run, small)]
    assert from_both[0].returncode == 0, from_both[0].stderr
    assert from_both[0].stdout == from_both[1].stdout
    assert tinystories("generate", str(small), *words[:4], "--engine", "torch").returncode == 0
    assert "exists; choose another --out" in one_line_error(tinystories("quantize", str(run), "--out", str(small)))
    wrong = tinystories("quantize", str(run), "--out", str(tmp_path / "x"), "--precision", "int4")
    assert "--out is for int8" in one_line_error(wrong)


def test_an_int8_model_directory_keeps_new_sampling_defaults(run: Path, tmp_path: Path) -> None:
    greedy, words = tmp_path / "greedy", ["--seed", "1", "--max-tokens", "20"]
    assert tinystories("quantize", str(run), "--out", str(greedy), "--temperature", "0").returncode == 0
    expected = tinystories("generate", str(run), *words, "--temperature", "0").stdout
    assert tinystories("generate", str(greedy), *words).stdout == expected
    assert tinystories("generate", str(run), *words).stdout != expected
    assert checkpoint.read_model(greedy).sampling.min_p == checkpoint.read_model(run).sampling.min_p
    alone = tinystories("quantize", str(run), "--min-p", "0.1")
    assert "--min-p sets a default of the model that --out writes" in one_line_error(alone)
    bad = tinystories("quantize", str(run), "--out", str(tmp_path / "bad"), "--min-p", "7")
    assert "min_p=7.0 must be in [0, 1]" in one_line_error(bad)
    assert not (tmp_path / "bad").exists()


def test_a_shortlist_is_written_described_and_used(run: Path, sample_data: Path, tmp_path: Path) -> None:
    """With all ids that the training stories hold, greedy stories are the same; no other id wins."""
    model = tmp_path / "model"
    shutil.copytree(run, model)
    generate = ["generate", str(model), "--seed", "1", "--max-tokens", "20", "--temperature", "0", "--precision"]
    assert "has no shortlist" in one_line_error(tinystories(*generate, "int4", "--shortlist"))
    words = ["--precision", "int4", "--shortlist", "205", "--data", str(sample_data)]
    packed = tinystories("quantize", str(model), *words)
    assert packed.returncode == 0, packed.stderr
    lines = packed.stdout.splitlines()
    assert lines[0] == f"{model}/shortlist.json: 205 of 400 ids, 100.00% of the training tokens"
    assert re.fullmatch(r"not in it: 0\.\d\d% of the validation tokens; \d+\.\d% of the stories need one", lines[1])
    assert lines[2].startswith(f"{model}/packed-int4.safetensors: ")
    for precision in ("fp32", "int8", "int8-a8", "int4"):
        listed = tinystories(*generate, precision, "--shortlist")
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout == tinystories(*generate, precision).stdout
    prepare("sample", tmp_path / "all", tokenizer=str(model / "tokenizer.json"), val_fraction=0, progress=False)
    packed = tinystories("quantize", str(model), "--shortlist", "100", "--data", str(tmp_path / "all"))
    assert packed.returncode == 0, packed.stderr
    assert "validation" not in packed.stdout
    (model / "shortlist.json").write_text("{}")
    assert "shortlist.json is damaged" in one_line_error(tinystories(*generate, "int8", "--shortlist"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quantize MODEL --shortlist 100", "--shortlist N and --data DIR go together"),
        ("quantize MODEL --data DATA", "--shortlist N and --data DIR go together"),
        ("quantize MODEL --data nowhere --shortlist 100", "nowhere holds no prepared data"),
        ("quantize MODEL --data DATA --shortlist 1", "a shortlist of 1 ids"),
        ("quantize MODEL --data DATA --shortlist 999", "a shortlist of 999 ids"),
        ("generate MODEL --shortlist --engine torch", "--shortlist is for the CPU engine: add --engine cpu"),
    ],
)
def test_an_impossible_shortlist_is_refused(run: Path, sample_data: Path, words: str, message: str) -> None:
    places = {"MODEL": str(run), "DATA": str(sample_data)}
    assert message in one_line_error(tinystories(*(places.get(word, word) for word in words.split())))
    assert not list(run.glob("shortlist*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--temperature -1", "temperature"), ("--top-p 0", "top_p"), ("--min-p 2", "min_p"), ("--engine llama", "engine")],
)
def test_a_sampling_setting_out_of_range_is_named(run: Path, flags: str, message: str) -> None:
    assert message in one_line_error(tinystories("generate", str(run), *flags.split()))


def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -c '{PROGRAM}' generate {run} --max-tokens 300 --seed 1"
    for reader in ("head -c 5", "head -n 1"):
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{command} | {reader}"], capture_output=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert b"Traceback" not in result.stderr


def test_the_resolved_config_can_be_printed_and_read_back(tmp_path: Path) -> None:
    printed = tinystories("train", "--config", "nano", "--train.steps", "7", "--print-config").stdout
    (tmp_path / "mine.toml").write_text(printed, encoding="utf-8")
    again = tinystories("train", "--config", str(tmp_path / "mine.toml"), "--print-config").stdout
    assert printed == again
    assert "steps = 7" in printed
