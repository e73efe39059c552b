"""The process that reads damaged inputs one after another, under a memory limit; started by fuzz.py.

It reports on the file descriptor of its stdout, one JSON object per line: {"start": N}, then {"done": N, ...}.
"""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import tinystories
from campaign.plants import PLANTS
from campaign.program import command, environment, judge, shell_code
from campaign.readers import READERS, Action, make_input

MAX_OUTPUT = 20_000
MAX_LEAKED_FILES = 100


def main() -> None:
    name, seed, start, stop, base_name, scratch_name, headroom, plant = sys.argv[1:]
    report = os.fdopen(os.dup(1), "w", buffering=1)
    base, scratch = Path(base_name), Path(scratch_name)
    scratch.mkdir(parents=True, exist_ok=True)
    if plant:
        PLANTS[plant]()
    warm_up(name, base, scratch)
    limit_memory(int(headroom))
    n_open_at_start = count_open_files()
    for number in range(int(start), int(stop)):
        folder, out = make_room(scratch)
        log, actions = make_input(name, int(seed), number, base, folder)
        print(json.dumps({"start": number, "damage": log, "actions": actions}), file=report)
        verdicts, problem, output = [], None, ""
        for action in actions:
            code, output = perform(action, folder, out, base, scratch)
            verdicts.append(code)
            if problem := judge(code, output):
                break
            if code:
                break
        if problem is None and count_open_files() > n_open_at_start + MAX_LEAKED_FILES:
            gc.collect()  # what cycles of objects hold is not lost yet
            if (n_open := count_open_files()) > n_open_at_start + MAX_LEAKED_FILES:
                problem = f"{n_open} open files"
        print(
            json.dumps({"done": number, "codes": verdicts, "problem": problem, "output": output[-MAX_OUTPUT:]}),
            file=report,
        )
        if problem:
            sys.stdin.readline()  # wait until the input has been saved
    report.close()
    os._exit(0)


def warm_up(name: str, base: Path, scratch: Path) -> None:
    """Read the valid files in every way, so that later memory use is that of the damaged files alone."""
    import random

    reader, seen = READERS[name], []
    for number in range(60):
        rng = random.Random(number)
        folder, out = make_room(scratch)
        shutil.copytree(base / rng.choice(reader.bases), folder)
        actions = reader.actions(rng, folder, None)
        if actions in seen:
            continue
        seen.append(actions)
        for action in actions:
            code, output = perform(action, folder, out, base, scratch)
            if code and ".arrow" in str(actions):  # only a download may be in this format
                break
            if code:
                raise SystemExit(f"campaign: {action} fails with {code} on valid files:\n{output}")


def make_room(scratch: Path) -> tuple[Path, Path]:
    """Remove the last input and output; return the paths of the next."""
    outputs = scratch / "outputs"
    for path in (scratch / "in", outputs):
        shutil.rmtree(path, ignore_errors=True)
    outputs.mkdir()
    return scratch / "in", outputs / "out"


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def limit_memory(headroom: int) -> None:
    """Limit the data segment to what is in use now plus `headroom` bytes."""
    status = Path("/proc/self/status").read_text()
    in_use = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + headroom, in_use + headroom))


def perform(action: Action, folder: Path, out: Path, base: Path, scratch: Path) -> tuple[int, str]:
    """Perform an action; return its exit code (1 for an exception that escaped) and what it wrote to stderr."""
    places = {"IN": str(folder), "OUT": str(out), "BASE": str(base)}
    words = [
        "/".join(places.get(part, part) for part in word.split("/")) if word[:1] != "/" else word for word in action
    ]
    log = scratch / "stderr"
    for descriptor, path in ((1, Path(os.devnull)), (2, log)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    code: Any = 0
    try:
        if words[0] == "process":
            variables = environment(scratch, TINYSTORIES_CACHE=str(folder))
            done = subprocess.run(command(*words[1:]), env=variables, check=False)
            code = shell_code(done.returncode)
        elif words[0] == "load":
            load_and_generate(Path(words[1]), words[2])
        elif words[0] == "same":
            if differing := find_difference(Path(words[1]), Path(words[2])):
                raise AssertionError(f"{differing} differs from that of a straight run")
        else:
            from tinystories.cli import main as run_program

            run_program(words)
    except SystemExit as stop:
        code = stop.code or 0
    except tinystories.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    return code, log.read_bytes()[-4 * MAX_OUTPUT :].decode(errors="replace")


def find_difference(out: Path, expected: Path) -> str:
    """Return the name of a file that differs in two folders of prepared data, but for the source's name; "" if none."""
    if sorted(os.listdir(out)) != sorted(os.listdir(expected)):
        return "the list of files"
    for path in expected.iterdir():
        contents = [(folder / path.name).read_bytes() for folder in (out, expected)]
        if path.name == "meta.json":
            contents = [json.loads(content) | {"source": ""} for content in contents]
        if contents[0] != contents[1]:
            return path.name
    return ""


def load_and_generate(model: Path, how: str) -> None:
    """Load a model in a precision, or with another engine, and generate a few tokens."""
    options: dict[str, Any] = {"engine": "cpu", "precision": how, "threads": 1, "n_slots": 2}
    if how == "torch":
        options |= {"engine": "torch", "device": "cpu", "precision": "fp32", "threads": None}
    if how == "shortlist":
        options |= {"precision": "int8", "shortlist": True}
    tinystories.load(model, **options).generate("Once", max_tokens=3, seed=1)


if __name__ == "__main__":
    main()
