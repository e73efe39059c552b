"""A full disk at every write: nothing is lost, nothing half-written has a final name, and the next run succeeds."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign import base as valid_files
from campaign.outputs import check_run, digest, list_checkpoints
from campaign.program import ROOT, TINY_MODEL, environment, judge
from campaign.record import Record

STRIDE_BYTES = 4096
LIBRARY_SOURCE = Path(__file__).with_name("full_disk.c")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command in a folder with a full disk. BASE in its words is the folder of valid files."""

    words: str
    copies: tuple[str, ...] = ()  # of the valid files, before it starts
    outputs: tuple[str, ...] = ()  # afterwards as before, or as after a straight run
    run: str = ""  # a run directory, whose checkpoints must be whole
    again: str = ""  # the command once there is space (default: the same)


TRAIN = f"train --data BASE/data --out run {' '.join(TINY_MODEL)} --train.eval_every 4 --train.checkpoint_every 2"
SWEEP = f"sweep --data BASE/data --out sweep {' '.join(TINY_MODEL)} --train.steps 2 --optim.learning_rate 1e-3:1e-2:log"
CASES = {
    "train": Case(f"{TRAIN} --train.steps 4", run="run", again=f"{TRAIN} --train.steps 4 --resume"),
    "resume": Case(
        f"{TRAIN} --train.steps 6 --resume",
        copies=("run",),
        run="run",
        again="train --data BASE/data --out run --resume --train.steps 6",
    ),
    "prepare": Case("prepare BASE/text/a.txt --tokenizer bpe:280 --out data", outputs=("data",)),
    "export-gguf": Case("export BASE/model --format gguf --out a.gguf", outputs=("a.gguf", "a.Modelfile")),
    "export-gguf-q8": Case("export BASE/model --format gguf --precision q8_0 --out a.gguf", outputs=("a.gguf",)),
    "export-hf": Case("export BASE/model --format hf --out hf", outputs=("hf",)),
    "export-onnx": Case("export BASE/model --format onnx --out a.onnx", outputs=("a.onnx",)),
    "export-llama2c": Case(
        "export BASE/llama-run --format llama2c --out a.bin", outputs=("a.bin", "a.tokenizer.bin", "a.tokenizer.json")
    ),
    "export-over": Case(
        "export BASE/model --format hf --out hf-gpt2 --force", copies=("hf-gpt2",), outputs=("hf-gpt2",)
    ),
    "import": Case("import BASE/hf-llama --out model", outputs=("model",)),
    "import-over": Case("import BASE/hf-llama --out model --force", copies=("model",), outputs=("model",)),
    "quantize-out": Case("quantize BASE/model --out int8-copy", outputs=("int8-copy",)),
    "quantize": Case(
        "quantize model --precision int8 --precision int4",
        copies=("model",),
        outputs=tuple(f"model/{name}" for name in ("config.json", "model.safetensors", "packed-int4.safetensors")),
    ),
    "generate": Case("generate model --max-tokens 5 --seed 1 --num 3 --out stories.jsonl", copies=("model",)),
    "sweep": Case(f"{SWEEP} --trials 1", again=f"{SWEEP} --trials 2 --resume"),
}


class Server:
    """The fork server, with the library that makes disks full if there is one."""

    def __init__(self, work: Path, plant: str | None) -> None:
        self.work = work
        variables = environment(work)
        self.library = compile_library(work)
        if self.library:
            variables["LD_PRELOAD"] = str(self.library)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "campaign.fork_server", *([plant] if plant else [])],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, words: list[str], cwd: Path, *, call: int = 0, n_bytes: int = -1, full: bool = True
    ) -> dict[str, Any]:
        """Run a command line; return its exit code, its stderr, and the calls and bytes counted."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        log = self.work / "full-stderr"
        request = {
            "words": words,
            "cwd": str(cwd),
            "folder": str(cwd) if full and self.library else "",
            "call": call,
            "bytes": n_bytes,
            "stderr": str(log),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return {**json.loads(self.process.stdout.readline()), "stderr": log.read_text(errors="replace")}

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compile_library(work: Path) -> Path | None:
    """Compile full_disk.c; None without a C compiler, or if this is not Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    library = work / "full_disk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, LIBRARY_SOURCE, "-ldl"], check=True)
    return library


def full_disk(record: Record, work: Path, names: list[str], *, points: int, sizes: int, plant: str | None) -> None:
    """Run the cases with a disk that is full at call n, after n bytes, and by a file system of n bytes."""
    base = valid_files.build(work)
    server = Server(work, plant)
    if server.library is None:
        print("no C compiler: full disks only by small file systems", file=sys.stderr)
    try:
        for name in names or sorted(CASES):
            attack(record, work, base, server, name, points, sizes)
    finally:
        server.close()


def attack(record: Record, work: Path, base: Path, server: Server, name: str, points: int, sizes: int) -> None:
    """Run one case at all points, after a straight run that shows how many there are."""
    case = CASES[name]
    folder = work / "full" / name
    straight = start(folder / "straight", case, base)
    result = server.run(split(case.words, base), straight)
    if result["code"]:
        raise SystemExit(f"campaign: `{case.words}` fails with {result['code']}:\n{result['stderr']}")
    expected = {output: digest(straight / output) for output in case.outputs}
    used = sum(file.stat().st_size for file in straight.rglob("*") if file.is_file())
    if server.library:
        print(f"{name}: {result['calls']} calls, {result['bytes']:,} bytes", flush=True)
        for call in spread(range(1, result["calls"] + 1), points):
            once(record, base, server, name, folder / "trial", expected, call=call)
        for n_bytes in spread(range(0, result["bytes"] + 1, STRIDE_BYTES), points):
            once(record, base, server, name, folder / "trial", expected, n_bytes=n_bytes)
    if sizes and hasattr(os, "geteuid") and os.geteuid() == 0:
        for i in range(1, sizes + 1):
            with small_file_system(folder / "small", (1 << 16) + i * used * 3 // (2 * sizes)) as mounted:
                if mounted:
                    once(record, base, server, name, folder / "small" / "trial", expected, mount=folder / "small")
    shutil.rmtree(folder)


def once(
    record: Record,
    base: Path,
    server: Server,
    name: str,
    folder: Path,
    expected: dict[str, str],
    *,
    call: int = 0,
    n_bytes: int = -1,
    mount: Path | None = None,
) -> None:
    """Run a case on a full disk, check what it left, and run it again with space."""
    case = CASES[name]
    try:
        start(folder, case, base)
    except OSError:  # what must be there before does not fit
        record.counts["too small for the start"] += 1
        return
    before = {output: digest(folder / output) for output in case.outputs}
    checkpoints = list_checkpoints(folder / case.run) if case.run else set()
    result = server.run(split(case.words, base), folder, call=call, n_bytes=n_bytes, full=mount is None)
    record.counts[f"code {result['code']}"] += 1
    record.counts["full disks"] += 1
    stderr = result["stderr"]
    problem = judge(result["code"], stderr)
    for output, old in before.items():
        kept = [digest(path) for path in folder.glob(f".*/{output}")]  # not under its name, and not lost
        if problem is None and digest(folder / output) not in (old, expected[output]) and old not in kept:
            problem = f"{output} is neither what it was nor complete"
    if problem is None and case.run:
        problem = check_run(folder / case.run, checkpoints)
    after = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    if problem is None:
        if mount is not None:
            subprocess.run(["mount", "-o", "remount,size=256m", str(mount)], check=True)
        if result["code"]:
            second = server.run(split(case.again or case.words, base), folder, full=False)
            is_complete = all(digest(folder / output) == expected[output] for output in case.outputs)
            # Only the last sync may have failed: the output is complete, and is not written again.
            if second["code"] and not (is_complete and case.outputs):
                problem, stderr = f"the next run, with space, fails with {second['code']}", second["stderr"]
            elif not is_complete:
                problem = "the next run, with space, writes something else than a straight run"
    if problem:
        point = (
            f"call-{call}" if call else f"bytes-{n_bytes}" if n_bytes >= 0 else f"size-{os.statvfs(folder).f_blocks}"
        )
        finding = record.add_finding(f"{name}-{point}", problem, words=case.words)
        (finding / "output").write_text(f"{stderr}\n\nfiles: {after}\n")


def split(words: str, base: Path) -> list[str]:
    return [word.replace("BASE", str(base)) for word in words.split()]


def start(folder: Path, case: Case, base: Path) -> Path:
    """Make the folder in which a case runs, with what must be there before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in case.copies:
        shutil.copytree(base / name, folder / name)
    return folder


def spread(values: range, n: int) -> list[int]:
    """Return `n` of the values, evenly spread with the first and the last; all of them if `n` is 0."""
    if not n or n >= len(values):
        return list(values)
    return sorted({values[i * (len(values) - 1) // max(n - 1, 1)] for i in range(n)})


@contextlib.contextmanager
def small_file_system(folder: Path, n_bytes: int) -> Iterator[bool]:
    """Mount a new file system of a given size in memory at a folder; yield false if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
