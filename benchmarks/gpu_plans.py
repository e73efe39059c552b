"""The two plans of benchmarks/gpu.py: which steps, with which sizes, under which limits, in which order."""

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
GRACE = 5.0  # seconds that a step has to save itself, once it was told to stop


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    command: str  # as in a shell, after `python`
    limit: float  # seconds
    floor: float = 0.0  # seconds of the budget under which it is not begun


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and the rehearsal on a CPU: options as on a command line."""

    device: str
    pytest: str
    training: str  # of benchmarks/train.py
    compile_jobs: int  # variants of it that are compiled at the same time
    generation: str  # of benchmarks/streams.py
    profile: str  # of benchmarks/profile_training.py
    precisions: tuple[str, ...]
    seeds: tuple[int, ...]
    short_run: str  # of the runs that compare precisions
    candidate: str  # for the bundled storyteller: at most 15M parameters
    link: str  # of the chain of teachers
    decays: tuple[str, ...]
    epochs: tuple[int, int]  # of candidates; of what the best of them leads to
    shares: tuple[float, float]  # of the budget: for the candidates and each link; for the last student


GPU = Sizes(
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
    link="--model.n_layer 12 --model.n_embd 448 --model.n_head 7 --model.n_ff 1120 --model.n_ctx 512"
    " --model.dropout 0.1 --train.batch_size 16 --train.micro_batch 16",
    decays=("0.8", "0.1", "1.6"),
    epochs=(12, 40),
    shares=(0.36, 0.22),
)
TOY = Sizes(
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
    link="--model.n_layer 2 --model.n_embd 32 --model.n_head 2 --model.n_ff 64 --model.n_ctx 64"
    " --train.batch_size 2 --train.micro_batch 2",
    decays=("0.8", "0.1"),
    epochs=(1, 2),
    shares=(0.3, 0.2),
)


def measure_plan(session: "Session") -> Iterator[list[Step]]:
    """Steps side by side in a list; those whose times count are alone in theirs."""
    sizes, kit = session.sizes, KIT
    device, data = f"--device {sizes.device}", f"--data {kit}/data"
    train = f"benchmarks/train.py --nanogpt {kit}/nanogpt/model.py {device} {sizes.training}"
    compile_all = f"{train} --first-steps --compile-jobs {sizes.compile_jobs}"
    # Without our options and errors of warnings, which are those of other versions; tests/interop needs other programs.
    pytest = "-m pytest -o addopts= -W default -p no:cacheprovider -q --ignore=tests/interop"
    together = [Step("tests", f"{pytest} {sizes.pytest}", limit=120, floor=20), Step("compile", compile_all, 120, 40)]
    for precision, seed in itertools.product(sizes.precisions, sizes.seeds):
        name = f"{precision}-seed{seed}"
        run = f"-m tinystories train --config small {data} --out {session.work}/{name} --resume --json"
        settings = f"--train.device {sizes.device} --train.precision {precision} --train.seed {seed} {sizes.short_run}"
        together.append(Step(name, f"{run} {settings}", limit=120, floor=30))
    yield together
    yield [Step("training", train, limit=150, floor=30)]
    yield [Step("generation", f"benchmarks/streams.py {device} {sizes.generation}", limit=120, floor=25)]
    yield [Step("profile", f"benchmarks/profile_training.py {device} {data} {sizes.profile}", limit=60, floor=20)]
    if sizes is TOY:
        yield [Step("collect", f"{pytest} -m gpu --collect-only", limit=120)]
        wait = "import json, time; print(json.dumps({'benchmark': 'wait'}), flush=True); time.sleep(600)"
        yield [Step("cut on purpose", f"-c {shlex.quote(wait)}", limit=2)]


def train_plan(session: "Session") -> Iterator[list[Step]]:
    """Candidates with several weight decays side by side; then the best decay for as long as there is time. Where
    training knows teachers (`train.teacher`), the time goes into a chain of them first, and the last part into a
    student of their mean.
    """
    sizes, budget = session.sizes, session.left()
    seconds, last = (share * budget for share in sizes.shares)
    few, many = sizes.epochs
    decays = {f"candidate-decay{decay}": f"--optim.weight_decay {decay}" for decay in sizes.decays}
    yield [timed(session, name, seconds, few, f"{sizes.candidate} {decay}") for name, decay in decays.items()]
    scores = {result["run"]: result["val_bits_per_byte"] for result in session.results("timed training")}
    finished = [name for name in decays if name in scores]
    decay = decays[min(finished, key=scores.__getitem__)] if finished else next(iter(decays.values()))
    if not has_teachers():
        yield [timed(session, "long", session.left(), many, f"{sizes.candidate} {decay}")]
        return
    links: list[str] = []
    while not links or session.left() - last > seconds:
        teacher = f"--train.teacher {session.work}/{links[-1]}" if links else ""
        links.append(f"link{len(links) + 1}")
        time_of_link = min(seconds, session.left() - last)
        yield [timed(session, links[-1], time_of_link, many, f"{sizes.link} {decay} {teacher}")]
    teachers = "|".join(f"{session.work}/{link}" for link in links)
    yield [timed(session, "student", session.left(), many, f"{sizes.candidate} {decay} --train.teacher '{teachers}'")]


def timed(session: "Session", name: str, seconds: float, epochs: int, settings: str) -> Step:
    run = f"benchmarks/timed_training.py {name} --seconds {seconds - GRACE:.0f} --epochs {epochs}"
    places = f"--data {KIT}/data --work {session.work} --train.device {session.sizes.device}"
    return Step(name, f"{run} {places} {settings}", limit=seconds + GRACE, floor=40)


def has_teachers() -> bool:
    """Whether training can learn from other models' probabilities."""
    return "teacher: " in (ROOT / "src" / "tinystories" / "config.py").read_text(encoding="utf-8")
