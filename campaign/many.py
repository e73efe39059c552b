"""Several processes at once on one empty cache, one model without quantized weights, or one output."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

from campaign import base as valid_files
from campaign.full_disk import split
from campaign.outputs import check_model, digest
from campaign.program import command, environment, judge, shell_code
from campaign.record import Record

COMPLAINTS = re.compile(r"damaged|cannot be (written|read|cached?)|cannot cache|Traceback|made from other weights")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that several processes run at once in one folder."""

    words: str
    copies: tuple[str, ...] = ()
    winners: str = "all"  # "all" must succeed, or "one" (the others may be refused)
    same_output: bool = True  # whether all that succeed print the same
    leaves: tuple[str, ...] = ()  # every file that may be there afterwards, as patterns


TIMEOUT_SECONDS = 3600.0  # eight processes may each compile the CPU engine
CASES = {
    "compile": Case("warmup", leaves=("cache/forward-*.o",)),
    "generate": Case(
        "generate model --max-tokens 20 --seed 3", copies=("model",), leaves=("model/*.*", "cache/forward-*.o")
    ),
    "quantize": Case(
        "quantize model --precision int8 --precision int4",
        copies=("model",),
        leaves=("model/[!.]*", "cache/forward-*.o"),
    ),
    "prepare": Case(
        "prepare sample --tokenizer bpe:300 --out data", winners="one", same_output=False, leaves=("data/*",)
    ),
    "prepare-in-one": Case(
        "prepare BASE/text/a.txt --tokenizer bpe:280 --out data", winners="one", same_output=False, leaves=("data/*",)
    ),
    "export": Case("export BASE/model --format gguf --out a.gguf", winners="one", leaves=("a.gguf", "a.Modelfile")),
    "quantize-out": Case("quantize BASE/model --out new", winners="one", leaves=("new/*",)),
}


def many(record: Record, work: Path, names: list[str], *, processes: list[int], plant: str | None) -> None:
    """Run each case with each number of processes."""
    base = valid_files.build(work)
    for name in names or sorted(CASES):
        for n in processes:
            at_once(record, work, base, name, n, plant)


def at_once(record: Record, work: Path, base: Path, name: str, n: int, plant: str | None) -> None:
    """Run one case with `n` processes and check their ends and what is there afterwards."""
    case = CASES[name]
    folder = work / "many" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for copy in case.copies:
        shutil.copytree(base / copy, folder / copy)
    fresh_cache = any(pattern.startswith("cache/") for pattern in case.leaves)
    variables = environment(work, **({"TINYSTORIES_CACHE": str(folder / "cache")} if fresh_cache else {}))
    processes = [
        subprocess.Popen(
            command(*split(case.words, base), plant=plant),
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(n)
    ]
    ends = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    codes = [shell_code(process.returncode) for process in processes]
    problems = []
    for code, (_, stderr) in zip(codes, ends, strict=True):
        record.counts["processes"] += 1
        record.counts[f"{name} code {code}"] += 1
        text = stderr.decode(errors="replace")
        if problem := judge(code, text):
            problems.append(problem)
        elif code == 0 and (complaint := COMPLAINTS.search(text)):
            problems.append(f"a process complains: {complaint.group()}")
    if case.winners == "all" and any(codes):
        problems.append(f"exit codes {codes}")
    if 0 not in codes:
        problems.append(f"nobody succeeded: {codes}")
    outputs = {stdout for code, (stdout, _) in zip(codes, ends, strict=True) if code == 0}
    if case.same_output and len(outputs) != 1:
        problems.append(f"{len(outputs)} different outputs")
    allowed = {path for pattern in case.leaves for path in folder.glob(pattern)}
    others = [path for path in folder.rglob("*") if path.is_file() and path not in allowed]
    if others or any(path.name.startswith(".") for path in allowed):
        problems.append(f"left behind: {sorted(str(path.relative_to(folder)) for path in others)}")
    for model in ("model", "new"):
        if (folder / model / "config.json").exists() and (problem := check_model(folder / model)):
            problems.append(problem)
    if problems:
        finding = record.add_finding(f"{name}-{n}", problems[0], problems=problems, words=case.words)
        (finding / "output").write_text("\n----\n".join(stderr.decode(errors="replace") for _, stderr in ends))
        (finding / "files").write_text("\n".join(f"{digest(path)[:16]} {path}" for path in sorted(folder.rglob("*"))))
    shutil.rmtree(folder)
