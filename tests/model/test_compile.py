"""torch.compile takes both architectures whole: one graph, no breaks, the same numbers.

These run in a pytest call of their own: the shape-checking hook of the other one splits graphs.
"""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tinystories.config import ModelConfig
from tinystories.model import GPT, KVCache, loss
from tinystories.model.distillation import DistillationObjective
from tinystories.model.loss import IGNORE_INDEX, Objective

# Capturing a whole graph is dynamo's work and needs no C++ compiler; the default backend does.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

# Both warnings are about PyTorch's own code: what the compiler imports, and how it traces a Function.
pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["classic", "modern"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]) -> GPT:
    """Only one layer, because compiling each takes seconds."""
    if request.param == "classic":
        return awake(tiny(architecture="classic", tied=False, n_layer=1))
    return awake(tiny(n_kv_head=2, n_layer=1))


def test_the_model_is_one_graph(model: GPT, tokens: Tensor) -> None:
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_a_step_with_the_cache_is_one_graph_for_all_positions(model: GPT, tokens: Tensor) -> None:
    """With a constant kv_len nothing is recompiled as the cache fills."""
    counter = CompileCounterWithBackend(BACKEND)
    step = torch.compile(model, fullgraph=True, backend=counter)
    cache = KVCache(model.config, batch=2)
    with torch.no_grad():
        model(tokens[:, :5], cache)
        hidden = torch.cat([step(tokens[:, t : t + 1], cache) for t in range(5, 12)], dim=1)
        torch.testing.assert_close(hidden, model(tokens)[:, 5:], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert cache.length.tolist() == [12, 12]


def test_the_objective_is_one_graph_with_the_same_gradients(model: GPT, tokens: Tensor) -> None:
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(Objective(model), fullgraph=True, backend=counter)
    weights = list(model.parameters())
    ours, eager = compiled(tokens, targets), Objective(model)(tokens, targets)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(
        torch.autograd.grad(ours, weights), torch.autograd.grad(eager, weights), rtol=1e-3, atol=1e-4
    )
    assert counter.frame_count == 1


def test_the_objective_is_one_graph_under_autocast(model: GPT, tokens: Tensor) -> None:
    compiled = torch.compile(Objective(model), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        total = compiled(tokens, tokens)
    total.backward()
    assert total.item() == pytest.approx(Objective(model)(tokens, tokens).item(), rel=0.05)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_compiled_as_for_cuda_no_logits_are_kept_for_the_backward_pass(
    model: GPT, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler decides what it keeps: it must be the gradients made on the way forward. Two chunks, padded."""
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 16)
    monkeypatch.setattr(loss, "vocab_padding", lambda vocab_size, _: -vocab_size % 64)
    kept: list[tuple[int, ...]] = []

    def remember(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        kept.extend(tuple(node.meta["val"].shape) for node in outputs if isinstance(node, fx.Node))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=remember,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    total = torch.compile(Objective(model), fullgraph=True, backend=backend)(tokens, targets)
    eager = Objective(model)(tokens, targets)
    torch.testing.assert_close(total, eager)
    weights = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(total, weights), torch.autograd.grad(eager, weights), rtol=1e-3, atol=1e-4
    )
    assert (64, model.config.n_embd) in kept
    assert not [shape for shape in kept if shape[-1:] in ((61,), (64,))]


def test_a_compiled_model_learns_from_teachers(
    model: GPT, tokens: Tensor, tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]
) -> None:
    """The loss is not part of the graphs, but both models are compiled."""
    teacher = awake(tiny(n_layer=1)).requires_grad_(False)
    objective = DistillationObjective(model, [teacher], 0.5, 2.0)
    compiled = torch.compile(objective, backend="aot_eager")
    weights = list(model.parameters())
    results = [f(tokens[:, :-1], tokens[:, 1:]) for f in (objective, compiled)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(result.total, weights) for result in results]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
