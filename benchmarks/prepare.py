"""Speed and memory of `prepare` with GPT-2's tokenizer, against simple loops over tiktoken and `tokenizers`.

Builds large files of real stories, shuffled and repeated. Each run is a separate process, timed from its start until
the bytes are on disk (fsync). One run on the largest file measures the peak memory of the process and its children;
then the three programs are timed interleaved. The competitors read a slice of the file (they are slower) and write
16-bit ids, without validation split, index, resume, checksums or positions of invalid bytes. Prints a table, then one
JSON line. Needs tiktoken's vocabulary (TIKTOKEN_CACHE_DIR).

    python benchmarks/prepare.py                                   1,000 MB, then 3 runs each on 500 MB
    python benchmarks/prepare.py --megabytes 20 --runs 1 --slice 10 --memory-megabytes 40
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from script import run_main

from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END

OUR_SCRIPT = """
from tinystories.data.prepare import prepare
prepare({source!r}, {out!r}, tokenizer="gpt2", keep_duplicates=True, progress=False)
"""

COMPETITOR_SCRIPT = """
import os
import numpy as np
{load}
with open({source!r}, encoding="utf-8") as file, open({out!r}, "wb") as out:
    rest = ""
    while chunk := file.read(8 << 20):
        *texts, rest = (rest + chunk).split({end!r})
        for ids in encode([text.strip() for text in texts]):
            out.write(np.array([50256, *ids], np.uint16).tobytes())
    out.flush()
    os.fsync(out.fileno())
"""

LOADER_SNIPPETS = {
    "tiktoken": """
import tiktoken
encoding = tiktoken.get_encoding("gpt2")
encode = lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
""",
    "tokenizers": """
import tokenizers
backend = tokenizers.Tokenizer.from_file({tokenizer!r})
backend.encode_special_tokens = True
def encode(texts):
    for start in range(0, len(texts), 1000):
        yield from (row.ids for row in backend.encode_batch_fast(texts[start : start + 1000]))
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/train.txt", help="stories to repeat")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--slice", type=int, default=50, help="megabytes that the competitors read")
    parser.add_argument(
        "--memory-megabytes", type=int, default=1000, help="file size for the peak memory; 0: do not measure it"
    )
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        folder = Path(name)
        texts = list(iter_stories(options.data))
        sizes = {"ours": options.megabytes, "tiktoken": options.slice, "tokenizers": options.slice}
        files = {size: write_repeated(folder / f"{size}.txt", texts, size) for size in {*sizes.values()}}
        memory_megabytes = options.memory_megabytes
        peak = (
            measure_process("ours", write_repeated(folder / "memory.txt", texts, memory_megabytes), folder)[1]
            if memory_megabytes
            else None
        )
        if not memory_megabytes:
            # Warms the page cache and writes the tokenizer.json that `tokenizers` needs.
            measure_process("ours", files[options.slice], folder)
        rates: dict[str, list[float]] = {name: [] for name in sizes}
        for _ in range(options.runs):
            for name, size in sizes.items():
                seconds, _ = measure_process(name, files[size], folder)
                rates[name].append(files[size].stat().st_size / 1e6 / seconds)
    report(options, rates, sizes, peak)


def write_repeated(path: Path, texts: list[str], megabytes: int) -> Path:
    """Write a file of about that size: all stories in random order, repeatedly."""
    order, size = random.Random(1), 0
    texts = list(texts)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while size < megabytes * 10**6:
            order.shuffle(texts)
            for text in texts:
                size += file.write(f"{text}\n{END}\n")
                if size >= megabytes * 10**6:
                    break
    return path


def measure_process(name: str, source: Path, folder: Path) -> tuple[float, float]:
    """Run one process; return its seconds, and the peak resident megabytes of it and its children."""
    out, tokenizer = folder / f"{name}-out", folder / "tokenizer.json"
    if name == "ours":
        code = OUR_SCRIPT.format(source=str(source), out=str(out))
    else:
        load = LOADER_SNIPPETS[name].format(tokenizer=str(tokenizer))
        code = COMPETITOR_SCRIPT.format(load=load, source=str(source), out=str(out), end=END)
    start_time = time.perf_counter()
    process = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process))
        time.sleep(0.02)
    seconds = time.perf_counter() - start_time
    if process.returncode != 0:
        raise SystemExit(f"{name} failed")
    if name == "ours":
        (out / "tokenizer.json").replace(tokenizer)
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    return seconds, peak / 1e6


def resident_bytes(process: psutil.Popen) -> int:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.Error:  # the process has just exited
        pass
    return total


def report(
    options: argparse.Namespace, rates: dict[str, list[float]], sizes: dict[str, int], peak: float | None
) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians["ours"] / median for name, median in medians.items() if name != "ours"}
    print(f"{'':12}{'MB':>6}{'MB/s':>8}{'min':>8}{'max':>8}{'ours is':>10}")
    for name, values in rates.items():
        ratio = f"{ratios[name]:9.1f}x" if name in ratios else ""
        print(f"{name:12}{sizes[name]:6}{medians[name]:8.1f}{min(values):8.1f}{max(values):8.1f}{ratio}")
    if peak is not None:
        print(f"peak memory over {options.memory_megabytes} MB: {peak:.0f} MB")
    measurements = {
        "mb_per_s": medians,
        "ratios": ratios,
        "rates": rates,
        "peak_mb": peak,
        "versions": {name: version(name) for name in ("gigatoken", "tiktoken", "tokenizers", "numpy")},
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({"benchmark": "prepare", **vars(options), **measurements}))


if __name__ == "__main__":
    run_main(main)
