"""What reads files: for each reader, the valid files it starts from and the ways in which the program reads them."""

import dataclasses
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from campaign.mutations import MUTATIONS
from campaign.program import TINY_MODEL
from campaign.seal import seal

# An action is a list of words: a command line, or "load" for tinystories.load and a few tokens, "process" for a
# command in a process of its own, or "same" for two folders of prepared data that must be equal. IN is the folder with
# the damaged file, OUT a path that does not exist, BASE the valid files.
Action = list[str]
Actions = Callable[[random.Random, Path, Path | None], list[Action]]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Starting points, by folder or file below the valid files, with the names of the files to damage."""

    bases: tuple[str, ...]  # folders
    targets: tuple[str, ...]  # glob patterns of the files that are damaged
    actions: Actions  # one way to read the folder or damaged file
    timeout: float = 20.0
    sealed: bool = True  # whether checksums are usually updated
    by_name: bool = False  # whether the user names the file itself: pipes and devices are then what was asked for


def words(text: str) -> Action:
    return text.split()


def choose(*options: str) -> Actions:
    """Return a choice of one option; an option is one or more command lines separated by ` ; `."""
    return lambda rng, *_: [words(part) for part in rng.choice(options).split(" ; ")]


def name_in(folder: Path, path: Path) -> str:
    """Return a path as the word of an action: the same in every work folder."""
    return str("IN" / path.relative_to(folder))


def read_import(pattern: str, more: str = "") -> Actions:
    """Import the file that matches `pattern` (empty: the folder), then load what was imported."""

    def actions(rng: random.Random, folder: Path, damaged: Path | None) -> list[Action]:
        sources = sorted(folder.glob(pattern)) if pattern else [folder]
        sources = [damaged] if damaged in sources else sources
        source = rng.choice(sources) if sources else folder / "gone"
        return [["import", name_in(folder, source), "--out", "OUT", *words(more)], words("load OUT fp32")]

    return actions


def read_texts(rng: random.Random, folder: Path, damaged: Path | None) -> list[Action]:
    path = name_in(folder, damaged or rng.choice(sorted(folder.iterdir())))
    prepare = ["prepare", path, "--tokenizer", "BASE/data/tokenizer.json", "--out", "OUT"]
    return rng.choice(
        [
            [prepare],
            [[*prepare, "--errors", "replace"], words("info OUT")],
            [["prepare", path, "--tokenizer", "bpe:270", "--out", "OUT"]],
            [["eval", "BASE/model", "--data", path, "--limit", "2", "--engine", "cpu"]],
        ]
    )


MODEL_ACTIONS = choose(
    *["load IN fp32"] * 3,
    *["load IN int8"] * 2,
    "load IN int4",
    "load IN torch",
    "info IN",
    "info IN --card",
    "info IN --json",
    "quantize IN --out OUT ; load OUT int8",
    "quantize IN --precision int4",
    "export IN --format gguf --out OUT",
    "eval IN --data BASE/data --limit 1 --engine cpu",
    "prepare BASE/text/a.txt --tokenizer IN --out OUT",
    "generate IN --max-tokens 3 --threads 1",
)
RESUME = "train --data BASE/data --out IN --resume --train.steps 4 --train.device cpu"
READERS = {
    "model": Reader(("model", "classic"), ("*.json", "*.safetensors"), MODEL_ACTIONS),
    "int8": Reader(("int8",), ("*.json", "packed-int8.safetensors"), MODEL_ACTIONS),
    "quantized": Reader(
        ("quantized",),
        ("packed-*.safetensors", "shortlist.json"),
        choose(
            "load IN int8", "load IN int4", "load IN shortlist", "quantize IN", "generate IN --max-tokens 3 --shortlist"
        ),
    ),
    "gguf": Reader(("gguf",), ("*.gguf",), read_import("*.gguf")),
    "llama2c": Reader(("llama2c",), ("*.bin", "*.json"), read_import("??.bin"), sealed=False),
    "llama2c-f32": Reader(("llama2c",), ("*.bin", "*.json"), read_import("f32.bin"), sealed=False),
    "pt": Reader(("pt",), ("*.pt",), read_import("*.pt", "--tokenizer BASE/classic/tokenizer.json"), sealed=False),
    "hf": Reader(("hf-qwen", "hf-llama", "hf-gpt2", "hf-sharded"), ("*.json", "*.safetensors"), read_import("")),
    "data": Reader(
        ("data",),
        ("*.json", "*.bin", "*.idx"),
        choose(
            "info IN",
            "eval BASE/model --data IN --limit 2 --engine cpu",
            f"train --data IN --out OUT {' '.join(TINY_MODEL)} --train.steps 1 --train.eval_every 99",
            "prepare sample --tokenizer bpe:300 --out IN",
            "quantize BASE/model --out OUT ; quantize OUT --shortlist 50 --data IN",
        ),
    ),
    "staging": Reader(
        ("staging",),
        ("out.draft/*", "out.draft/data/*"),
        choose("prepare IN/source --tokenizer bpe:270 --out IN/out ; same IN/out BASE/staging/straight"),
        sealed=False,
    ),
    "text": Reader(("text",), ("*",), read_texts, sealed=False, by_name=True),
    "tokenizer": Reader(
        ("data",),
        ("tokenizer.json",),
        choose("prepare BASE/text/a.txt --tokenizer IN/tokenizer.json --out OUT"),
        by_name=True,
    ),
    "toml": Reader(
        ("toml",),
        ("config.toml",),
        choose(
            "info --config IN/config.toml",
            "train --config IN/config.toml --print-config",
            "train --config IN/config.toml --print-config --model.n_layer 2 --optim.kind adamw",
        ),
        by_name=True,
    ),
    "run": Reader(
        ("run",),
        (
            "checkpoints/*/state/*",
            "checkpoints/step-0000004/*.*",
            "checkpoints/step-0000004/state/*",
            "*.json",
            "*.jsonl",
            "config.toml",
            "samples.md",
        ),
        choose(RESUME),
    ),
    "sweep": Reader(
        ("sweep",),
        ("sweep.db", "sweep.*b", "*.db", ".lock", "trial-*/metrics.jsonl", "best.toml"),
        choose(*["sweep --out IN --show"] * 4, "sweep --out IN --show --json", "sweep --out IN --resume --trials 2"),
        timeout=60.0,
    ),
    "kernels": Reader(
        ("kernels",), ("forward-*.o",), choose("process generate --max-tokens 2"), timeout=120.0, sealed=False
    ),
}


def make_input(name: str, seed: int, number: int, base: Path, folder: Path) -> tuple[list[str], list[Action]]:
    """Write damaged input `number` of a reader into `folder`; return what was done to it and how it is to be read."""
    reader, rng = READERS[name], random.Random(f"{name} {seed} {number}")
    shutil.copytree(base / rng.choice(reader.bases), folder, symlinks=True)
    log = []
    path = None
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = [path for pattern in reader.targets for path in sorted(folder.glob(pattern)) if path.is_file()]
        if paths:
            path = rng.choice(paths)
            log.append(f"{path.relative_to(folder)}: {damage(path, rng, paths, reader.by_name)}")
    if reader.sealed and rng.random() < 0.85:
        seal(folder)
    return log, reader.actions(rng, folder, path)


def damage(path: Path, rng: random.Random, others: list[Path], by_name: bool) -> str:
    """Damage one file in place; return the name of what was done."""
    if rng.random() < 0.04:
        return replace_file(path, rng, others, by_name)
    if path.suffix == ".db" and rng.random() < 0.6:
        try:
            return damage_database(path, rng)
        except (sqlite3.Error, IndexError):  # earlier damage left no table that SQLite can read
            return "database without effect"
    mutation = rng.choice(MUTATIONS.get(path.suffix, MUTATIONS[".bin"]))
    path.chmod(0o644)
    data = path.read_bytes()
    try:
        path.write_bytes(mutation(data, rng))
    except (IndexError, KeyError, ValueError):  # earlier damage left nothing that this one could change
        return f"{mutation.__name__} without effect"
    return mutation.__name__


def replace_file(path: Path, rng: random.Random, others: list[Path], by_name: bool) -> str:
    """Replace a file by another file, or by something that is not a file."""
    kind = rng.choice(
        ["missing", "folder", "loop", "dangling link", "other file", *([] if by_name else ["fifo", "device"])]
    )
    content = rng.choice(others).read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "other file":
        path.write_bytes(content)
    return kind


def damage_database(path: Path, rng: random.Random) -> str:
    """Replace a value, or delete the rows of a table, in an SQLite database."""
    with sqlite3.connect(path) as connection:
        tables = [
            row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        table = rng.choice(tables)
        columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
        column = rng.choice(columns)
        value = rng.choice([None, -1, 2**62, "", "x", "{}", "[]", '{"a":', b"\xff", "NaN", 1e308, "\x1b[31m", "null"])
        try:
            if rng.random() < 0.2:
                connection.execute(f'DELETE FROM "{table}"')
                return f"rows of {table} deleted"
            connection.execute(f'UPDATE "{table}" SET "{column}" = ?', (value,))
        except sqlite3.Error:
            return f"{table}.{column} refused {value!r}"
    connection.close()
    return f"{table}.{column} = {value!r}"
