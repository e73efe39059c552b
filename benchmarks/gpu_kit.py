"""Fill gpu-kit/ with what `benchmarks/gpu.py` needs on a borrowed machine without a network, and print its size.

    python benchmarks/gpu_kit.py --nanogpt nanoGPT/model.py --data stories

It contains nanoGPT's model.py, the stories as token files (bpe:4096, trained on them), Python 3.12 wheels that the
machine lacks (benchmarks/gpu_machine.txt lists what it has), and the commit hash. DATA is a folder with train.txt,
valid.txt and optionally train-more.txt; the first half of valid.txt is the kit's validation split, for model selection,
and the second half stays here as the test set. --nanogpt and --data default to stand-ins: a small model with the same
interface, and the bundled stories. The source tree and the kit together must stay under 64 MiB.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from script import run_main

from tinystories.data.prepare import prepare
from tinystories.data.tokenizer import END
from tinystories.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
MAX_KIT_BYTES = 64 * MIB
WHEELS = ("array-api-compat", "tomli-w")  # `make gpu-rehearsal` fails if one is missing
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# nanoGPT's interface with a single-layer model, for rehearsals.
STUB_MODEL = '''\
"""Stand-in for nanoGPT's model.py: the same interface with a minimal model."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, ids, targets):
        logits = self.head(self.embedding(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="model.py of a nanoGPT checkout  [default: a stand-in]")
    parser.add_argument("--data", type=Path, help="folder of stories  [default: the bundled stories]")
    parser.add_argument("--vocab", type=int, default=4096, help="vocabulary size")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit", help="folder of the kit, replaced if it exists")
    options = parser.parse_args()
    for path, requirement in ((options.nanogpt, "model.py of nanoGPT"), (options.data, "a folder with train.txt")):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist; expected {requirement}, or omit the option to use a stand-in")
    kit = options.out
    records = (kit / "records.jsonl").read_bytes() if (kit / "records.jsonl").exists() else None
    shutil.rmtree(kit, ignore_errors=True)
    (kit / "nanogpt").mkdir(parents=True)
    if records is not None:  # records of an earlier machine: finished steps are skipped
        (kit / "records.jsonl").write_bytes(records)
    model = options.nanogpt.read_text(encoding="utf-8") if options.nanogpt else STUB_MODEL
    (kit / "nanogpt" / "model.py").write_text(model, encoding="utf-8")
    prepare_stories(options.data, kit / "data", options.vocab)
    download_wheels(kit / "wheels")
    (kit / "commit").write_text(describe_commit() + "\n", encoding="utf-8")
    tree_bytes, kit_bytes = sum(map(file_size, list_tree_files())), sum(map(file_size, kit.rglob("*")))
    total_bytes = tree_bytes + kit_bytes
    print(f"{kit}: {kit_bytes / MIB:.1f} MiB; {total_bytes / MIB:.1f} of {MAX_KIT_BYTES // MIB} MiB with the tree")
    if total_bytes > MAX_KIT_BYTES:
        raise UserError(f"{kit} and the source tree exceed {MAX_KIT_BYTES // MIB} MiB; use a smaller --data")


def prepare_stories(data: Path | None, out: Path, vocab: int) -> None:
    tokenizer = f"bpe:{vocab}"
    if data is None:
        prepare("sample", out, tokenizer=tokenizer, progress=False)
        return
    train = [str(path) for name in ("train.txt", "train-more.txt") if (path := data / name).exists()]
    if not train or not (data / "valid.txt").exists():
        raise UserError(f"{data} must contain train.txt and valid.txt (stories separated by {END})")
    stories = [text.strip() for text in (data / "valid.txt").read_text(encoding="utf-8").split(END) if text.strip()]
    with tempfile.TemporaryDirectory() as folder:
        first_half = Path(folder) / "valid-first-half.txt"
        first_half.write_text("".join(f"{text}\n{END}\n" for text in stories[: len(stories) // 2]), encoding="utf-8")
        prepare(train, out, val=str(first_half), tokenizer=tokenizer, progress=False)


def download_wheels(folder: Path) -> None:
    constraint_lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line for line in constraint_lines if "==" in line}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    completed = subprocess.run(
        [*command, *(pinned[name] for name in WHEELS)], check=False, capture_output=True, text=True
    )
    if completed.returncode:
        raise UserError(f"pip download failed: {completed.stderr.strip().splitlines()[-1]}")


def describe_commit() -> str:
    completed = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return completed.stdout.strip() or "unknown"


def list_tree_files() -> list[Path]:
    """Return the files of the source tree that git does not ignore."""
    completed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [ROOT / name for name in completed.stdout.split("\0") if name]


def file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


if __name__ == "__main__":
    run_main(main)
