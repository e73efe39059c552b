"""torch 2.10 to 2.13 will do: training uses nothing that came after 2.10."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

# Public names that torch 2.13 has and 2.10 has not, in the modules that this package might use.
NEWER = """
torch thread_safe_generator
torch.autograd enforce_grad_layout_policy
torch.autograd.graph region_activation_memory_budget set_override_stale_capture_stream
torch.backends.cuda blas_workspace_size cublas_workspace_size cublaslt_workspace_size is_ck_sdpa_available
torch.compiler CacheInfo NestedCompileRegionOptions get_default_backend keep_portable_guards_unsafe set_default_backend
torch.cuda caching_allocator_disabled current_solver_handle platform
torch.distributed all_gather_single record_comm reduce_scatter_single
torch.nn LinearCrossEntropyLoss LinearCrossEntropyOptions
torch.nn.attention restore_flash_attention_impl
torch.nn.functional linear_cross_entropy
torch.optim swap_in_optimizer_params_and_state
"""
HIDE_AND_TRAIN = """
import functools, pathlib, sys
import torch, torch.distributed, torch.nn.attention

for line in sys.argv[1].strip().splitlines():
    module, *names = line.split()
    home = functools.reduce(getattr, module.split(".")[1:], torch)
    for name in names:
        if hasattr(home, name):
            delattr(home, name)

from tinystories.config_file import load_config
from tinystories.train.run import train

settings = dict(word.split("=") for word in sys.argv[3:])
report = train(load_config("nano", settings), pathlib.Path(sys.argv[2]))
assert report is not None and report.bits_per_byte > 0
"""
TOY = (
    "model.n_layer=1 model.n_embd=16 model.n_head=2 model.n_ff=16 model.n_ctx=32 train.steps=2 train.batch_size=2"
    " train.micro_batch=1 train.device=cpu train.sample_tokens=4"
)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_needs_nothing_newer_than_torch_2_10(kind: str, sample_data: Path, tmp_path: Path) -> None:
    settings = [*TOY.split(), f"optim.kind={kind}", f"data.dir={sample_data}"]
    command = [sys.executable, "-c", HIDE_AND_TRAIN, NEWER, str(tmp_path / "run"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
