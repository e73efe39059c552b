"""Training on a GPU: the host never waits for it inside a step, and it learns what a CPU learns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import changed
from torch.nn import functional as F

from tinystories.config import Config
from tinystories.model.loss import IGNORE_INDEX, fused_linear_cross_entropy
from tinystories.train.loop import Trainer
from tinystories.train.run import train

pytestmark = [
    pytest.mark.gpu,
    # Of PyTorch's compiler: about its own imports and tracing, and about TF32, which nothing here asks for.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()


def on_cuda(config: Config, kind: str = "adamw", compiled: str = "off", precision: str = "auto") -> Config:
    """Steps without a pause: no evaluation or checkpoint falls due. 4,096 tokens in each of two micro-batches: the
    embedding's gradient is made another way for few.
    """
    config = changed(
        config, "train", device="cuda", compile=compiled, precision=precision, steps=100, batch_size=256,
        micro_batch=128, log_every=2, eval_every=1000, checkpoint_every=1000,
    )  # fmt: skip
    return changed(config, "optim", kind=kind)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_no_step_waits_for_the_device(
    config: Config, tmp_path: Path, kind: str, compiled: str, architecture: str
) -> None:
    """Two micro-batches, dropout, clipping, both optimizers, and lines of metrics on the way."""
    config = changed(config, "model", architecture=architecture, tied=architecture == "modern")
    trainer = Trainer(on_cuda(config, kind, compiled), tmp_path)
    with trainer.open_recorder(), trainer.prefetch_batches():
        for _ in range(4):  # compiles, makes the optimizers' state, and fills the caches of memory
            trainer.launch_step()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            trainer.train_step(trainer.train_state.step).loss.item()
        trainer.train_state.step += 1  # that step was taken, and is not counted
        for _ in range(6):
            trainer.launch_step()
        torch.cuda.set_sync_debug_mode("default")
        trainer.drain()
    assert trainer.train_state.step == 11


def test_the_host_is_at_most_one_step_ahead(config: Config, tmp_path: Path) -> None:
    trainer = Trainer(on_cuda(config), tmp_path)
    with trainer.open_recorder(), trainer.prefetch_batches():
        for _ in range(5):
            before = trainer.in_flight
            trainer.launch_step()
            assert before is None or (before.ready_event is not None and before.ready_event.query())


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_gpu_learns_what_a_cpu_learns(config: Config, tmp_path: Path, kind: str, compiled: str) -> None:
    config = changed(config, "model", dropout=0.0)
    losses = []
    for precision, device in (("fp32", "cpu"), ("fp32", "cuda"), ("auto", "cuda")):
        cuda = on_cuda(config, kind, compiled if device == "cuda" else "off", precision)
        trainer = Trainer(changed(cuda, "train", device=device), tmp_path)
        losses.append([trainer.train_step(step).loss.item() for step in range(8)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=0.02)
    assert losses[0][-1] < losses[0][0]


def test_a_run_goes_on_where_it_stopped(config: Config, tmp_path: Path) -> None:
    for steps in (6, 12):
        report = train(changed(config, "train", device="cuda", steps=steps), tmp_path / "run", resume=steps == 12)
    assert report is not None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_an_odd_vocabulary_is_cross_entropy(dtype: torch.dtype, compiled: bool) -> None:
    """More rows than a chunk holds, and not a multiple of one."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9000, 64, generator=generator).to("cuda", dtype).requires_grad_()
    weight = torch.randn(50257, 64, generator=generator).div_(8).to("cuda").requires_grad_()
    targets = torch.randint(50257, (9000,), generator=generator).cuda()
    targets[::7] = IGNORE_INDEX
    loss = torch.compile(fused_linear_cross_entropy) if compiled else fused_linear_cross_entropy
    ours = loss(hidden, weight, targets)
    theirs = F.cross_entropy(hidden.float() @ weight.t(), targets, reduction="sum", ignore_index=IGNORE_INDEX)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5 if dtype == torch.float32 else 2e-3)
    for found, right in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        assert F.cosine_similarity(found.float().flatten(), right.float().flatten(), dim=0) > 0.999
        assert found.float().norm().item() == pytest.approx(right.float().norm().item(), rel=0.02)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_run_learns_from_teachers(config: Config, tmp_path: Path, compiled: str) -> None:
    short = changed(on_cuda(config, compiled=compiled), "train", steps=4)
    train(short, tmp_path / "teacher")
    taught = changed(short, "train", teacher=(str(tmp_path / "teacher"),), teacher_weight=2.0)
    report = train(taught, tmp_path / "student")
    assert report is not None
    assert 0 < report.bits_per_byte < 5
