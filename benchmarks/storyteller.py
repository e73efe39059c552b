"""How good the storyteller is: bits per byte of its packed weights, and what 200 of its stories are like.

Scores the model on all validation stories as it is shipped (and, with --precision, as others would run it). Then tells
200 stories with its own settings, seeds 0 to 199, half of them without an opening, and counts: how many end by
themselves within 400 tokens, loop (6 words three times), copy (13 words in a row that stand in the training stories),
begin alike, and which names occur; the same counts of 200 validation stories stand beside. Prints a table and one JSON
line; --out keeps the stories.

    python benchmarks/storyteller.py --train stories/train.txt --val stories/valid.txt
    python benchmarks/storyteller.py runs/mine --train stories/train.txt --val stories/valid.txt --sweep

`--sweep` tells 200 stories at each of several temperatures, min-p and repetition penalties instead, and lets --judge, a
model trained apart, say how likely they are: settings are good where its bits per byte and the variety are those of the
validation stories.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

from program import as_program

from tinystories import load
from tinystories.config import SamplingConfig
from tinystories.data.sources import stories
from tinystories.evaluate.bits import bits_per_byte, encoded
from tinystories.evaluate.report import evaluate_model
from tinystories.evaluate.stories import Seen, variety
from tinystories.generate.stories import Request, Story, tell
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
    parser.add_argument("--train", required=True, help="stories it learned from (files or a folder)")
    parser.add_argument("--val", required=True, help="stories it has not seen")
    parser.add_argument("--precision", default="auto", help="of the CPU engine: int8 (auto), int4, fp32; with commas")
    parser.add_argument("--out", type=Path, help="file for the 200 stories, one JSON object a line")
    parser.add_argument("--sweep", action="store_true", help="compare sampling settings instead")
    parser.add_argument("--judge", help="another model directory, for --sweep")
    options = parser.parse_args()
    precisions = options.precision.split(",")
    teller = load(options.model, engine="cpu", precision=precisions[0])
    val = list(stories(options.val, split="val"))
    seen = Seen(stories(options.train))
    if options.sweep:
        sweep(teller, options.judge, val, seen)
        return
    facts: dict[str, Any] = {"benchmark": "storyteller", "machine": f"{platform.machine()} {platform.system()}"}
    facts["bits_per_byte"] = {precision: score(options.model, precision, options.val) for precision in precisions}
    told, seconds = tell_all(teller, teller.settings)
    ours, theirs = counted([story.text for story in told], seen), counted(sample_of(val), seen)
    ours["ended"] = sum(story.stop_reason == "end" for story in told) / len(told)
    print(f"\n{len(told)} stories in {seconds:.0f} s, {teller.settings}")
    print(f"{'':20} {'ours':>9} {'val':>9}")
    for name, value in ours.items():
        print(f"{name:20} {value:9.4g} {theirs.get(name, 1.0):9.4g}")
    if options.out:
        options.out.write_text("".join(json.dumps(story.as_dict()) + "\n" for story in told), encoding="utf-8")
    print(json.dumps(facts | {"sampling": dataclasses.asdict(teller.settings), "ours": ours, "validation": theirs}))


def score(model: str | None, precision: str, val: str) -> float:
    teller = load(model, engine="cpu", precision=precision)
    found = evaluate_model(teller, val)
    low, high = found.interval
    print(
        f"{precision}: {found.bits_per_byte:.4f} bits per byte on {found.stories:,} stories ({low:.4f} to {high:.4f})"
    )
    return found.bits_per_byte


def tell_all(teller: Storyteller, sampling: SamplingConfig) -> tuple[list[Story], float]:
    """Seeds 0 to 199: every second one without an opening, the others by turns with one of OPENINGS."""
    requests = (
        Request(
            prompt=OPENINGS[seed // 2 % len(OPENINGS)] if seed % 2 else "",
            settings=sampling,
            seed=seed,
            max_tokens=MAX_TOKENS,
        )
        for seed in range(N_STORIES)
    )
    began = time.perf_counter()
    return list(tell(teller.engine, teller.tokenizer, requests)), time.perf_counter() - began


def sample_of(val: list[str]) -> list[str]:
    """As many validation stories, evenly spaced."""
    return [val[i * len(val) // N_STORIES] for i in range(min(N_STORIES, len(val)))]


def counted(texts: list[str], seen: Seen) -> dict[str, float]:
    return {"copied": seen.copied(texts)} | dataclasses.asdict(variety(texts))


def sweep(teller: Storyteller, judge: str | None, val: list[str], seen: Seen) -> None:
    judging = load(judge, engine="cpu", precision="fp32") if judge else teller
    own = bits_per_byte(judging.engine, encoded(sample_of(val), judging.tokenizer)).bits_per_byte
    theirs = counted(sample_of(val), seen)
    names = ["words", "looping", "copied", "distinct_openings", "names", "commonest_name", "distinct_trigrams"]
    print(f"{'settings':24} {'judged':>7} {'ended':>6} " + " ".join(f"{name[:9]:>9}" for name in names))
    print(f"{'validation stories':24} {own:7.4f} {1:6.3f} " + " ".join(f"{theirs[name]:9.4g}" for name in names))
    results: list[dict[str, Any]] = []
    for temperature, min_p, penalty in itertools.product(TEMPERATURES, MIN_PS, PENALTIES):
        sampling = SamplingConfig(temperature=temperature, min_p=min_p, repetition_penalty=penalty)
        told, _ = tell_all(teller, sampling)
        texts = [story.text for story in told]
        found = counted(texts, seen)
        found["ended"] = sum(story.stop_reason == "end" for story in told) / len(told)
        found["judged"] = bits_per_byte(judging.engine, encoded(texts, judging.tokenizer)).bits_per_byte
        label = f"{temperature:g}, min-p {min_p:g}, penalty {penalty:g}"
        print(
            f"{label:24} {found['judged']:7.4f} {found['ended']:6.3f} "
            + " ".join(f"{found[name]:9.4g}" for name in names),
            flush=True,
        )
        results.append(dataclasses.asdict(sampling) | found)
    print(json.dumps({"benchmark": "storyteller sweep", "validation": theirs | {"judged": own}, "results": results}))


if __name__ == "__main__":
    as_program(main)
