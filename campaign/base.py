"""Valid files of every kind, made once per work folder; the campaign damages copies of them."""

import csv
import json
import shutil
import signal
import sys
from pathlib import Path

from campaign.program import TINY_MODEL, run, run_or_fail

STORIES = [
    f"Once upon a time, there was a cat number {n}. The cat sat on mat {n % 7}. It was happy." for n in range(90)
]
CLASSIC = (
    "--model.architecture classic --model.qk_norm false --model.n_head 1 --model.n_embd 64 --model.tied false".split()
)


def build(work: Path) -> Path:
    """Return the folder of valid files, after making it if it is not there yet. Takes a minute or two."""
    base = work / "base"
    if base.exists():
        for name in ("model", "classic", "llama-run"):  # commands quantize the models that they read
            for path in (base / name).glob("packed-*"):
                path.unlink()
        return base
    print(f"making valid files in {base} (once; a minute or two)", file=sys.stderr)
    draft = work / "base.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    run_or_fail(work, "warmup")
    write_texts(draft / "text")
    run_or_fail(draft, "prepare", "sample", "--tokenizer", "bpe:300", "--out", "data")
    train(draft, "run", *TINY_MODEL)
    train(draft, "llama-run", *TINY_MODEL, "--model.qk_norm", "false", "--model.n_kv_head", "1")
    train(draft, "classic-run", *TINY_MODEL, *CLASSIC)
    copy_model(draft / "run", draft / "model")
    copy_model(draft / "classic-run", draft / "classic")
    run_or_fail(draft, "quantize", "model", "--out", "int8")
    copy_model(draft / "run", draft / "quantized")
    run_or_fail(
        draft,
        "quantize",
        "quantized",
        "--precision",
        "int8",
        "--precision",
        "int4",
        "--shortlist",
        "80",
        "--data",
        "data",
    )
    export_all(draft)
    write_state_dicts(draft)
    shard(draft / "hf-qwen", draft / "hf-sharded")
    interrupt_preparation(draft / "staging")
    (draft / "toml").mkdir()
    shutil.copy(draft / "run" / "config.toml", draft / "toml" / "config.toml")
    run_or_fail(
        draft, "sweep", "--data", "data", "--out", "sweep", "--trials", "2", *TINY_MODEL, "--train.steps", "2",
        "--optim.learning_rate", "1e-3:1e-2:log",
    )  # fmt: skip
    (draft / "kernels").mkdir()
    for path in (work / "cache").iterdir():
        shutil.copy(path, draft / "kernels")
    draft.rename(base)
    return base


def train(folder: Path, out: str, *settings: str) -> None:
    """Train for a few steps, with two checkpoints."""
    steps = "--train.steps 4 --train.checkpoint_every 2 --train.eval_every 4".split()
    run_or_fail(folder, "train", "--data", "data", "--out", out, *settings, *steps)


def copy_model(run: Path, out: Path) -> None:
    out.mkdir()
    for name in ("config.json", "generation.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(run / name, out / name)


def write_texts(folder: Path) -> None:
    """Write the same stories in every text format."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{story}\n<|endoftext|>\n" for story in STORIES))
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": story}) + "\n" for story in STORIES))
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([n, story] for n, story in enumerate(STORIES))])
    table = pa.table({"id": range(len(STORIES)), "text": STORIES})
    parquet.write_table(table, folder / "a.parquet", row_group_size=40)
    parquet.write_table(table, folder / "b.parquet", row_group_size=40, compression="none", use_dictionary=False)
    with ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)


def interrupt_preparation(folder: Path) -> None:
    """Prepare stories in several files: to the end as `straight`, and interrupted in the middle as `out`."""
    (folder / "source").mkdir(parents=True)
    for n in range(0, len(STORIES), 15):
        text = "".join(f"{story}\n<|endoftext|>\n" for story in STORIES[n : n + 15])
        (folder / "source" / f"{n:02}.txt").write_text(text)
    prepare = ["prepare", "source", "--tokenizer", "bpe:270", "--out"]
    run_or_fail(folder, *prepare, "straight")
    code, stderr = run(folder, *prepare, "out", plant="interrupted")
    if code != 128 + signal.SIGINT or not (folder / "out.draft" / "journal.json").exists():
        raise SystemExit(f"campaign: an interrupted preparation ended with {code}:\n{stderr}")


def export_all(folder: Path) -> None:
    """Export the models in every format that can be imported."""
    exports = (
        ("run", "gguf", "f32", "gguf/f32.gguf"),
        ("run", "gguf", "f16", "gguf/f16.gguf"),
        ("run", "gguf", "q8_0", "gguf/q8.gguf"),
        ("llama-run", "gguf", "q4_0", "gguf/q4.gguf"),
        ("llama-run", "llama2c", "f32", "llama2c/f32.bin"),
        ("llama-run", "llama2c", "q8_0", "llama2c/q8.bin"),
        ("run", "hf", "", "hf-qwen"),
        ("llama-run", "hf", "", "hf-llama"),
        ("classic-run", "hf", "", "hf-gpt2"),
    )
    for model, name, precision, out in exports:
        (folder / out).parent.mkdir(exist_ok=True)
        run_or_fail(folder, "export", model, "--format", name, "--precision", precision, "--out", out)


def write_state_dicts(folder: Path) -> None:
    """Write the classic model as a .pt file: plain, and as a checkpoint with sizes as nanoGPT stores them."""
    import torch
    from safetensors.torch import load_file

    (folder / "pt").mkdir()
    state = load_file(folder / "classic" / "model.safetensors")
    torch.save(state, folder / "pt" / "plain.pt")
    torch.save({"model": state, "model_args": {"n_head": 1, "block_size": 64}}, folder / "pt" / "sizes.pt")
    shutil.copy(folder / "classic" / "tokenizer.json", folder / "pt" / "tokenizer.json")


def shard(source: Path, out: Path) -> None:
    """Write a transformers folder again with its weights in two files and an index."""
    from safetensors.numpy import load_file, save_file

    out.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    files = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, out / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
