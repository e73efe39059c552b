"""How good the storyteller is: bits per byte of its quantized weights, and statistics of 200 generated stories.

Scores the model on all validation stories as it is shipped (with --precision: in other precisions). Then generates 200
stories with its default settings, seeds 0 to 199, half of them without a prompt, and counts: how many end within 400
tokens, loop (6 words three times), copy (13 consecutive words of a training story), have the same opening, and which
names occur; next to the same statistics of 200 validation stories. Prints a table and one JSON line; --out writes the
stories to a file.

    python benchmarks/storyteller.py --train stories/train.txt --val stories/valid.txt
    python benchmarks/storyteller.py runs/mine --train stories/train.txt --val stories/valid.txt --sweep

`--sweep` instead generates 200 stories for each combination of temperature, min-p and repetition penalty, and scores
them with --judge, an independently trained model: good settings match the validation stories in bits per byte and
diversity.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

from script import run_main
from text_statistics import NgramIndex, measure_diversity

from tinystories import load
from tinystories.config import SamplingConfig
from tinystories.data.source.resolve import iter_stories
from tinystories.evaluate.bits import encode_stories, evaluate_bits_per_byte
from tinystories.evaluate.report import evaluate_model
from tinystories.generate.batching import Request, Story, generate_all
from tinystories.generate.storyteller import Storyteller

N_STORIES = 200
MAX_TOKENS = 400
OPENINGS = (
    "Once upon a time",
    "One day, a little girl named",
    "There was a big",
    "Tom and his mom",
    "The little dog",
    "In a small house by the sea",
    "Lily wanted to",
    "It was a sunny day",
    "The old tree",
    "Ben and Mia",
)
TEMPERATURES, MIN_PS, PENALTIES = (0.6, 0.7, 0.8, 0.9, 1.0), (0.0, 0.05, 0.1), (1.0, 1.1, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None, help="model directory  [default: the bundled storyteller]")
    parser.add_argument("--train", required=True, help="training stories (files or a folder)")
    parser.add_argument("--val", required=True, help="validation stories")
    parser.add_argument(
        "--precision", default="auto", help="CPU engine precisions, comma-separated: int8 (auto), int4, fp32"
    )
    parser.add_argument("--out", type=Path, help="file for the 200 stories, one JSON object per line")
    parser.add_argument("--sweep", action="store_true", help="compare sampling settings instead")
    parser.add_argument("--judge", help="another model directory, for --sweep")
    parser.add_argument(
        "--sampling", default="{}", metavar="JSON", help="other settings, such as '{\"repetition_window\": 64}'"
    )
    options = parser.parse_args()
    precisions = options.precision.split(",")
    storyteller = load(options.model, engine="cpu", precision=precisions[0])
    val = list(iter_stories(options.val, split="val"))
    seen = NgramIndex(iter_stories(options.train))
    if options.sweep:
        sweep(storyteller, options.judge, val, seen)
        return
    output: dict[str, Any] = {"benchmark": "storyteller", "machine": f"{platform.machine()} {platform.system()}"}
    output["bits_per_byte"] = {name: score_model(options.model, name, options.val) for name in precisions}
    sampling = dataclasses.replace(storyteller.settings, **json.loads(options.sampling))
    generated, seconds = generate_stories(storyteller, sampling)
    our_stats, reference_stats = (
        measure_stories([story.text for story in generated], seen),
        measure_stories(sample_evenly(val), seen),
    )
    our_stats["ended"] = sum(story.stop_reason == "end" for story in generated) / len(generated)
    print(f"\n{len(generated)} stories in {seconds:.0f} s, {sampling}")
    print(f"{'':20} {'ours':>9} {'val':>9}")
    for name, value in our_stats.items():
        print(f"{name:20} {value:9.4g} {reference_stats.get(name, 1.0):9.4g}")
    if options.out:
        options.out.write_text("".join(json.dumps(story.as_dict()) + "\n" for story in generated), encoding="utf-8")
    print(
        json.dumps(
            output | {"sampling": dataclasses.asdict(sampling), "ours": our_stats, "validation": reference_stats}
        )
    )


def score_model(model: str | None, precision: str, val: str) -> float:
    storyteller = load(model, engine="cpu", precision=precision)
    report = evaluate_model(storyteller, val)
    low, high = report.interval
    print(
        f"{precision}: {report.bits_per_byte:.4f} bits per byte on {report.stories:,} stories ({low:.4f} to {high:.4f})"
    )
    return report.bits_per_byte


def generate_stories(storyteller: Storyteller, sampling: SamplingConfig) -> tuple[list[Story], float]:
    """Generate stories with seeds 0 to 199: even ones without a prompt, odd ones cycling through OPENINGS."""
    requests = (
        Request(
            prompt=OPENINGS[seed // 2 % len(OPENINGS)] if seed % 2 else "",
            settings=sampling,
            seed=seed,
            max_tokens=MAX_TOKENS,
        )
        for seed in range(N_STORIES)
    )
    start_time = time.perf_counter()
    return list(generate_all(storyteller.engine, storyteller.tokenizer, requests)), time.perf_counter() - start_time


def sample_evenly(val: list[str]) -> list[str]:
    """Return `N_STORIES` evenly spaced validation stories."""
    return [val[i * len(val) // N_STORIES] for i in range(min(N_STORIES, len(val)))]


def measure_stories(texts: list[str], seen: NgramIndex) -> dict[str, float]:
    return {"copied": seen.copied_fraction(texts)} | dataclasses.asdict(measure_diversity(texts))


def sweep(storyteller: Storyteller, judge: str | None, val: list[str], seen: NgramIndex) -> None:
    judge_model = load(judge, engine="cpu", precision="fp32") if judge else storyteller
    reference_bits = evaluate_bits_per_byte(
        judge_model.engine, encode_stories(sample_evenly(val), judge_model.tokenizer)
    ).bits_per_byte
    reference_stats = measure_stories(sample_evenly(val), seen)
    names = [
        "words",
        "looping",
        "copied",
        "distinct_openings",
        "names",
        "commonest_name",
        "late_names",
        "distinct_trigrams",
    ]
    print(f"{'settings':24} {'judged':>7} {'ended':>6} " + " ".join(f"{name[:9]:>9}" for name in names))
    print(
        f"{'validation stories':24} {reference_bits:7.4f} {1:6.3f} "
        + " ".join(f"{reference_stats[name]:9.4g}" for name in names)
    )
    results: list[dict[str, Any]] = []
    for temperature, min_p, penalty in itertools.product(TEMPERATURES, MIN_PS, PENALTIES):
        sampling = SamplingConfig(temperature=temperature, min_p=min_p, repetition_penalty=penalty)
        generated, _ = generate_stories(storyteller, sampling)
        texts = [story.text for story in generated]
        stats = measure_stories(texts, seen)
        stats["ended"] = sum(story.stop_reason == "end" for story in generated) / len(generated)
        stats["judged"] = evaluate_bits_per_byte(
            judge_model.engine, encode_stories(texts, judge_model.tokenizer)
        ).bits_per_byte
        label = f"{temperature:g}, min-p {min_p:g}, penalty {penalty:g}"
        print(
            f"{label:24} {stats['judged']:7.4f} {stats['ended']:6.3f} "
            + " ".join(f"{stats[name]:9.4g}" for name in names),
            flush=True,
        )
        results.append(dataclasses.asdict(sampling) | stats)
    print(
        json.dumps(
            {
                "benchmark": "storyteller sweep",
                "validation": reference_stats | {"judged": reference_bits},
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
