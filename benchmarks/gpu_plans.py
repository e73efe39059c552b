"""The two plans of benchmarks/gpu.py: their steps in order, with sizes and time limits."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu import Session

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "gpu-kit"
GRACE_SECONDS = 5.0  # time that a step has to save its state after it is interrupted


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    command: str  # shell words after `python`
    limit: float  # seconds
    min_seconds: float = 0.0  # skipped if fewer seconds of the budget are left


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What differs between a GPU and the rehearsal on a CPU; strings are command-line options."""

    device: str
    pytest: str
    training: str  # for benchmarks/train.py
    compile_jobs: int  # variants compiled in parallel
    generation: str  # for benchmarks/streams.py
    profile: str  # for benchmarks/profile_training.py
    precisions: tuple[str, ...]
    seeds: tuple[int, ...]
    short_run: str  # for the runs that compare precisions
    candidate: str  # for the bundled storyteller: at most 15M parameters
    teacher: str  # for the chain of teachers
    weight_decays: tuple[str, ...]
    epochs: tuple[int, int]  # maximum for the candidates; for the final run
    budget_shares: tuple[float, float]  # fractions: the candidates and each teacher; the student


GPU = PlanConfig(
    device="cuda",
    pytest="-m gpu -n 6",
    training="--shape 12x512 --heads 8 --context 512 --vocab 50257 --peer-vocab 50257,50304 --untied --compile"
    " --micro-batch 32,16,8 --peer-bias false --steps 10 --runs 5",
    compile_jobs=12,
    generation="--preset modern-89m --vocab 50257 --streams 1,256,32 --tokens 400 --runs 3",
    profile="--config storyteller --train.batch_size 32 --train.micro_batch 32",
    precisions=("bf16", "fp32"),
    seeds=(1, 2),
    short_run="--train.batch_size 32 --train.micro_batch 32 --train.steps 250 --train.compile off",  # 2M tokens
    candidate="--model.n_layer 11 --model.n_embd 320 --model.n_head 5 --model.n_ff 864 --model.n_ctx 512"
    " --model.dropout 0.1 --train.batch_size 16 --train.micro_batch 16",
    teacher="--model.n_layer 12 --model.n_embd 448 --model.n_head 7 --model.n_ff 1120 --model.n_ctx 512"
    " --model.dropout 0.1 --train.batch_size 16 --train.micro_batch 16",
    weight_decays=("0.8", "0.1", "1.6"),
    epochs=(12, 40),
    budget_shares=(0.36, 0.22),
)
TOY = PlanConfig(
    device="cpu",
    pytest="tests/train/test_prefetch.py tests/model/test_loss.py -m 'not compile and not gpu'",
    training="--shape 1x16 --heads 2 --context 16 --vocab 100 --peer-vocab 100,104 --untied --compile"
    " --micro-batch 2 --peer-bias false --steps 1 --runs 2 --threads 1 --only modern|V=104",
    compile_jobs=1,
    generation="--preset nano --vocab 300 --streams 1,3 --tokens 20 --runs 2 --model.n_layer 1",
    profile="--config nano --steps 2 --model.n_layer 1 --model.n_ctx 64 --train.batch_size 2 --train.micro_batch 2",
    precisions=("fp32",),
    seeds=(1,),
    short_run="--model.n_layer 1 --model.n_ctx 64 --train.batch_size 2 --train.micro_batch 2 --train.steps 3",
    candidate="--model.n_layer 1 --model.n_embd 32 --model.n_head 2 --model.n_ff 64 --model.n_ctx 64"
    " --train.batch_size 2 --train.micro_batch 2",
    teacher="--model.n_layer 2 --model.n_embd 32 --model.n_head 2 --model.n_ff 64 --model.n_ctx 64"
    " --train.batch_size 2 --train.micro_batch 2",
    weight_decays=("0.8", "0.1"),
    epochs=(1, 2),
    budget_shares=(0.3, 0.2),
)


def measure_plan(session: "Session") -> Iterator[list[Step]]:
    """Yield lists of steps that run in parallel; a step whose timing matters is alone in its list."""
    config, kit = session.config, KIT
    device, data = f"--device {config.device}", f"--data {kit}/data"
    train = f"benchmarks/train.py --nanogpt {kit}/nanogpt/model.py {device} {config.training}"
    compile_all = f"{train} --first-steps --compile-jobs {config.compile_jobs}"
    # Without our addopts and warnings-as-errors, which are meant for other library versions. The machine lacks the
    # programs that tests/formats and tests/hub need.
    pytest = "-m pytest -o addopts= -W default -p no:cacheprovider -q --ignore=tests/formats --ignore=tests/hub"
    concurrent_steps = [
        Step("tests", f"{pytest} {config.pytest}", limit=120, min_seconds=20),
        Step("compile", compile_all, 120, 40),
    ]
    for precision, seed in itertools.product(config.precisions, config.seeds):
        name = f"{precision}-seed{seed}"
        run = f"-m tinystories train --config small {data} --out {session.work}/{name} --resume --json"
        settings = (
            f"--train.device {config.device} --train.precision {precision} --train.seed {seed} {config.short_run}"
        )
        concurrent_steps.append(Step(name, f"{run} {settings}", limit=120, min_seconds=30))
    yield concurrent_steps
    yield [Step("training", train, limit=150, min_seconds=30)]
    yield [Step("generation", f"benchmarks/streams.py {device} {config.generation}", limit=120, min_seconds=25)]
    yield [
        Step("profile", f"benchmarks/profile_training.py {device} {data} {config.profile}", limit=60, min_seconds=20)
    ]
    if config is TOY:
        yield [Step("collect", f"{pytest} -m gpu --collect-only", limit=120)]
        wait = "import json, time; print(json.dumps({'benchmark': 'wait'}), flush=True); time.sleep(600)"
        yield [Step("cut on purpose", f"-c {shlex.quote(wait)}", limit=2)]


def train_plan(session: "Session") -> Iterator[list[Step]]:
    """Train candidates with several weight decays in parallel, then one long run with the best weight decay.

    If training supports distillation (`train.teacher`), train a chain of teachers instead of the long run, and finally
    a student of their mean.
    """
    config, budget = session.config, session.seconds_left()
    stage_seconds, student_seconds = (share * budget for share in config.budget_shares)
    candidate_epochs, final_epochs = config.epochs
    decay_flags = {f"candidate-decay{decay}": f"--optim.weight_decay {decay}" for decay in config.weight_decays}
    yield [
        make_timed_step(session, name, stage_seconds, candidate_epochs, f"{config.candidate} {decay}")
        for name, decay in decay_flags.items()
    ]
    scores = {result["run"]: result["val_bits_per_byte"] for result in session.results("timed training")}
    finished = [name for name in decay_flags if name in scores]
    decay = decay_flags[min(finished, key=scores.__getitem__)] if finished else next(iter(decay_flags.values()))
    if not has_teachers():
        yield [make_timed_step(session, "long", session.seconds_left(), final_epochs, f"{config.candidate} {decay}")]
        return
    teacher_names: list[str] = []
    while not teacher_names or session.seconds_left() - student_seconds > stage_seconds:
        teacher_flag = f"--train.teacher {session.work}/{teacher_names[-1]}" if teacher_names else ""
        teacher_names.append(f"link{len(teacher_names) + 1}")
        teacher_seconds = min(stage_seconds, session.seconds_left() - student_seconds)
        yield [
            make_timed_step(
                session, teacher_names[-1], teacher_seconds, final_epochs, f"{config.teacher} {decay} {teacher_flag}"
            )
        ]
    teacher_paths = "|".join(f"{session.work}/{link}" for link in teacher_names)
    yield [
        make_timed_step(
            session,
            "student",
            session.seconds_left(),
            final_epochs,
            f"{config.candidate} {decay} --train.teacher '{teacher_paths}'",
        )
    ]


def make_timed_step(session: "Session", name: str, seconds: float, epochs: int, settings: str) -> Step:
    run = f"benchmarks/timed_training.py {name} --seconds {seconds - GRACE_SECONDS:.0f} --epochs {epochs}"
    paths = f"--data {KIT}/data --work {session.work} --train.device {session.config.device}"
    return Step(name, f"{run} {paths} {settings}", limit=seconds + GRACE_SECONDS, min_seconds=40)


def has_teachers() -> bool:
    """Whether this version supports distillation, that is, has the setting `train.teacher`."""
    return "teacher: " in (ROOT / "src" / "tinystories" / "config.py").read_text(encoding="utf-8")
