"""Use a GPU for 15 minutes: run a plan of steps under one time budget, the most valuable first.

    python benchmarks/gpu.py measure --budget 210 --out OUT    test and time the CUDA code
    python benchmarks/gpu.py train --budget 420 --out OUT      train candidates for the bundled storyteller
    python benchmarks/gpu.py unpack OUT --to models            afterward: turn the returned files into model directories

Runs from a copy of the source tree, with PyTorch and the contents of gpu-kit/ (`make gpu-kit`); docs/gpu.md describes
the whole procedure. Each step runs in its own process with its own time limit. A step is skipped if less of the budget
is left than its minimum. JSON lines that a step prints are saved immediately, with GPU, driver, clocks, commit and
command, so a kill loses only the running step. A second call with the same --work skips finished steps, as does one
with their records in gpu-kit/records.jsonl. --out gets at most 8 files of 16 MiB: the records, the logs, and the
weights, best first. --toy runs the same on a CPU at toy sizes (`make gpu-rehearsal`).
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gpu_plans import GPU, GRACE_SECONDS, KIT, ROOT, TOY, PlanConfig, Step, measure_plan, train_plan

MIB = 2**20
MAX_BUNDLED_PARAMETERS = 15e6  # larger models serve only as teachers
MAX_FILES, MAX_FILE_BYTES, MAX_TOTAL_BYTES = 8, 16 * MIB, 64 * MIB  # limits of what is copied back


class Session:
    """The time budget, records and folders of one call."""

    def __init__(self, plan: str, config: PlanConfig, budget: float, work: Path, out: Path) -> None:
        self.plan, self.config, self.work, self.out = plan, config, work, out
        self.deadline = time.monotonic() + budget
        self.lock = threading.Lock()
        self.outcomes: dict[str, str] = {}  # step -> done, done before, failed, cut, skipped
        self.processes: list[subprocess.Popen[str]] = []
        (work / "logs").mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self.commit = read_commit()
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", install_kit(work)))),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TINYSTORIES_CACHE": str(work / "cache"),
        }
        # Steps run in parallel; using all cores in each would oversubscribe the CPU.
        self.environment["OMP_NUM_THREADS"] = "1" if config.device == "cpu" else "2"
        self.records_path = work / "records.jsonl"
        if not self.records_path.exists() and (KIT / "records.jsonl").exists():  # continue from another machine
            shutil.copyfile(KIT / "records.jsonl", self.records_path)
        self.records = read_records(self.records_path)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, step: Step, **values: Any) -> None:
        """Append a record, and sync it to disk before returning."""
        context = {"plan": self.plan, "step": step.name, **query_device(), "commit": self.commit}
        entry = context | {"command": step.command, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | values
        with self.lock, self.records_path.open("a+b") as file:
            self.records.append(entry)
            if file.tell() and not ends_with_newline(file):
                file.write(b"\n")  # a kill truncated the last line
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def is_done(self, step: Step) -> bool:
        return any(e["step"] == step.name and e.get("outcome") == "done" for e in self.records)

    def results(self, benchmark: str) -> list[dict[str, Any]]:
        """Return the JSON objects that steps printed for one benchmark."""
        printed = [entry["result"] for entry in self.records if "result" in entry]
        return [result for result in printed if result.get("benchmark") == benchmark]

    def run(self, steps: list[Step]) -> None:
        """Run steps in parallel, each until it ends or hits its limit; then pack the outputs so far."""
        threads = [threading.Thread(target=self.run_step, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pack_outputs(self)

    def run_step(self, step: Step) -> None:
        if self.is_done(step):
            self.outcomes[step.name] = "done before"
        elif self.seconds_left() < step.min_seconds:
            self.outcomes[step.name] = "skipped"
            self.record(step, outcome="skipped", seconds_left=self.seconds_left(), floor=step.min_seconds)
        else:
            self.outcomes[step.name] = self.execute(step)
        print(f"[{self.seconds_left():4.0f} s left] {step.name}: {self.outcomes[step.name]}", flush=True)

    def execute(self, step: Step) -> str:
        """Run a step, record each JSON line that it prints, and stop it at its limit. Return the outcome."""
        start_time, limit = time.monotonic(), max(0.0, min(step.limit, self.seconds_left()))
        process = subprocess.Popen(
            [sys.executable, *shlex.split(step.command)], cwd=ROOT, env=self.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        timers = [
            threading.Timer(limit + wait, kill_process_group, (process, how))
            for wait, how in ((0, SOFT_SIGNAL), (GRACE_SECONDS, HARD_SIGNAL))
        ]
        for timer in timers:
            timer.daemon = True
            timer.start()
        last_line = ""
        with process, (self.work / "logs" / f"{step.name}.log").open("a", encoding="utf-8") as log:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                last_line = line.strip() or last_line
                if (result := parse_json_object(line)) is not None:
                    self.record(step, result=result)
        for timer in timers:
            timer.cancel()
        self.processes.remove(process)
        code, seconds = process.returncode, time.monotonic() - start_time
        outcome = "done" if code == 0 else "cut" if seconds >= limit else "failed"
        self.record(step, outcome=outcome, exit_code=code, seconds=seconds, last_line=last_line[-500:])
        return outcome

    def stop(self) -> None:
        for process in list(self.processes):
            kill_process_group(process, HARD_SIGNAL)


SOFT_SIGNAL, HARD_SIGNAL = signal.SIGINT, signal.SIGKILL


def kill_process_group(process: subprocess.Popen[str], signal_number: signal.Signals) -> None:
    """Signal a step and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)


def ends_with_newline(file: BinaryIO) -> bool:
    """Whether the last byte is a newline; leaves the position at the end."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def parse_json_object(line: str) -> dict[str, Any] | None:
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return dict(json.loads(line))
    return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; a last line that a kill truncated is ignored."""
    if not path.exists():
        return []
    return [
        entry
        for line in path.read_text(encoding="utf-8").splitlines()
        if (entry := parse_json_object(line)) is not None
    ]


def read_commit() -> str:
    """Return the commit of this tree, from git or from the kit (a copy of a tree has no history)."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        if completed.returncode == 0:
            return completed.stdout.strip()
    path = KIT / "commit"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "unknown"


def query_device() -> dict[str, str]:
    """Return the current GPU, driver, clocks and power draw."""
    names = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(names, (value.strip() for value in output.splitlines()[0].split(",")), strict=True))
    return {"name": "CPU"}


def install_kit(work: Path) -> Path:
    """Install the kit's wheels into a folder under `work`, and return it for PYTHONPATH."""
    site = work / "site"
    wheels = sorted((KIT / "wheels").glob("*.whl"))
    if wheels and not site.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        draft = work / "site.draft"
        subprocess.run([*command, "--upgrade", "--target", str(draft), *map(str, wheels)], check=True)
        draft.rename(site)
    return site


def pack_outputs(session: Session) -> None:
    """Fill --out with the records, the logs, and the weights, best first, as long as they fit."""
    out, work = session.out, session.work
    for file in out.glob("[0-9]-*"):
        file.unlink()
    if session.records:
        shutil.copyfile(session.records_path, out / "records.jsonl")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for path in [*(work / "logs").glob("*.log"), *work.glob("*/metrics.jsonl"), *work.glob("*/samples.md")]:
            tar.add(path, path.relative_to(work))
    ranked = sorted(
        session.results("timed training"),
        key=lambda result: (result["parameters"] > MAX_BUNDLED_PARAMETERS, result["val_bits_per_byte"]),
    )
    archives = [(rank, result["run"], kind) for kind in ("int8", "fp16") for rank, result in enumerate(ranked, 1)]
    for rank, run, kind in sorted(archives, key=lambda item: (item[0] > 1, item[2] == "fp16", item[0])):
        tar_file = work / "weights" / f"{run}-{kind}.tar"
        if tar_file.exists():
            copy_in_chunks(tar_file, out, f"{rank}-{tar_file.name}")


def copy_in_chunks(file: Path, out: Path, name: str) -> None:
    """Copy a file in chunks of the allowed size, or skip it if they do not all fit."""
    size = file.stat().st_size
    n_chunks = -(-size // MAX_FILE_BYTES)
    existing = list(out.iterdir())
    if len(existing) + n_chunks > MAX_FILES or sum(path.stat().st_size for path in existing) + size > MAX_TOTAL_BYTES:
        return
    with file.open("rb") as source:
        for index in range(n_chunks):
            (out / (f"{name}.{index}" if n_chunks > 1 else name)).write_bytes(source.read(MAX_FILE_BYTES))


def unpack(folder: Path, to: Path) -> None:
    """Turn returned weights into model directories: TO/RANK-NAME-int8 and, from fp16, TO/RANK-NAME."""
    sys.path.insert(0, str(ROOT / "src"))
    import numpy as np
    from safetensors.numpy import load_file

    from tinystories import checkpoint
    from tinystories.config import ModelConfig, SamplingConfig
    from tinystories.config_file import build_dataclass
    from tinystories.data.tokenizer import Tokenizer
    from tinystories.files import atomic_directory

    names = sorted({path.name.partition(".tar")[0] for path in folder.glob("[0-9]-*.tar*")})
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        archive_path = to / f"{name}.tar"
        with archive_path.open("wb") as archive:
            for part in sorted(folder.glob(f"{name}.tar*")):
                archive.write(part.read_bytes())
        with tarfile.open(archive_path) as tar:
            tar.extractall(to / f"{name}.draft", filter="data")
        (extracted,) = (to / f"{name}.draft").iterdir()
        if name.endswith("-int8"):
            extracted.rename(to / name)
        else:
            config_json = json.loads((extracted / "config.json").read_text(encoding="utf-8"))
            config = build_dataclass(ModelConfig, config_json["model"], str(extracted), "model.")
            weights = {key: np.float32(value) for key, value in load_file(extracted / "model-fp16.safetensors").items()}
            with atomic_directory(to / name.removesuffix("-fp16")) as model_dir:
                tokenizer, provenance = Tokenizer.load(extracted), config_json["provenance"]
                checkpoint.write_arrays(model_dir, config, weights, tokenizer, SamplingConfig(), provenance)
        shutil.rmtree(to / f"{name}.draft")
        archive_path.unlink()
        model_files = checkpoint.read_model(to / name.removesuffix("-fp16"))
        print(f"{model_files.folder}: {model_files.config.n_params:,} parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="plan", required=True, metavar="measure|train|unpack")
    plans: dict[str, Callable[[Session], Iterator[list[Step]]]] = {"measure": measure_plan, "train": train_plan}
    for name in plans:
        subparser = commands.add_parser(name, help=f"run the plan `{name}`")
        subparser.add_argument("--budget", type=float, required=True, help="total seconds: the time left minus 90")
        subparser.add_argument("--out", type=Path, required=True, help="folder whose files are copied back")
        subparser.add_argument(
            "--work", type=Path, default=ROOT / "runs" / "gpu", help="folder for runs, logs and caches"
        )
        subparser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    subparser = commands.add_parser("unpack", help="turn the returned files into model directories")
    subparser.add_argument("folder", type=Path, help="the returned files of --out")
    subparser.add_argument("--to", type=Path, required=True, help="folder for the model directories")
    options = parser.parse_args()
    if options.plan == "unpack":
        unpack(options.folder, options.to)
        return 0
    for required in ("data/meta.json", "nanogpt/model.py"):
        if not (KIT / required).exists():
            print(f"error: {KIT / required} is missing; create the kit with: make gpu-kit", file=sys.stderr)
            return 2
    session = Session(options.plan, TOY if options.toy else GPU, options.budget, options.work, options.out)
    try:
        for steps in plans[options.plan](session):
            session.run(steps)
    finally:
        session.stop()
    counts = {name: list(session.outcomes.values()).count(name) for name in set(session.outcomes.values())}
    print(json.dumps({"plan": options.plan, "steps": len(session.outcomes), "outcomes": session.outcomes}))
    print(f"{options.plan}: " + ", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    return int("failed" in counts)


if __name__ == "__main__":
    sys.exit(main())
