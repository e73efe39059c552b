"""`tinystories generate`."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinystories.cli.common import (
    CONTEXT_SETTINGS,
    device_option,
    engine_option,
    model_argument,
    precision_option,
    sampling_options,
    threads_option,
)

if TYPE_CHECKING:
    from tinystories.generate.batching import Request
    from tinystories.generate.storyteller import Storyteller


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument(bundled=True)
@click.option("--prompt", default="", help="How the story begins.  [default: the model begins]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=400, show_default=True, help="Longest continuation.")
@sampling_options
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same story.  [default: a new one each time]")
@click.option("--num", type=click.IntRange(min=1), default=1, show_default=True, help="How many stories.")
@click.option("--stop", multiple=True, help="End the story before this text; may be repeated.")
@click.option("--ignore-end", is_flag=True, help="Go on with a new story after <|endoftext|>, up to --max-tokens.")
@engine_option("What computes: cpu needs no torch and starts at once; auto is cpu but where CUDA is at hand.")
@device_option
@precision_option
@threads_option
@click.option("--shortlist", is_flag=True, help="Write only ids that `tinystories pack --shortlist` chose: faster.")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Show text as it is made.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="FILE.txt or FILE.jsonl to (over)write too.",
)
def generate(
    model: Path,
    prompt: str,
    max_tokens: int,
    seed: int | None,
    num: int,
    stop: tuple[str, ...],
    ignore_end: bool,
    engine: str,
    device: str,
    precision: str,
    threads: int | None,
    shortlist: bool,
    stream: bool,
    out: Path | None,
    **sampling: float | int | None,
) -> None:
    """Write stories with MODEL, or with the storyteller that comes with the package.

    Sampling defaults are the model's own (generation.json). Text goes to standard output, all else to standard error.
    """
    from tinystories.generate.storyteller import N_SLOTS, Storyteller

    if prompt.endswith(" "):
        click.echo("note: the prompt ends in a space, which belongs to the next word: better without", err=True)
    storyteller = Storyteller.load(
        model,
        engine=engine,
        device=device,
        precision=precision,
        n_slots=min(num, N_SLOTS),
        threads=threads,
        shortlist=shortlist,
    )
    request = storyteller.build_request(
        prompt,
        {"max_tokens": max_tokens, "seed": seed, "stop": stop, "ignore_end": ignore_end, **sampling},  # type: ignore[typeddict-item]
    )
    print_stories(storyteller, request, num, stream=stream, out=out)


def print_stories(storyteller: "Storyteller", request: "Request", num: int, *, stream: bool, out: Path | None) -> None:
    """Write stories to standard output and, where asked, to a file; says how fast on standard error."""
    from tinystories.generate import output
    from tinystories.generate.batching import Story
    from tinystories.generate.batching import stream_all as events_of

    stories: list[Story] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.StoryWriter(out)) if out else None

        def on_story(story: Story) -> None:
            if file:
                file.write(story)
            if not stream:
                click.echo(story.text, nl=False)
            stories.append(story)
            print_prompt(len(stories))

        def print_prompt(number: int) -> None:
            if number < num:
                click.echo((output.STORY_SEPARATOR if number else "") + (request.prompt if stream else ""), nl=False)

        started_at = time.perf_counter()
        requests = (dataclasses.replace(request, number=number) for number in range(num))
        events = stack.enter_context(contextlib.closing(events_of(storyteller.engine, storyteller.tokenizer, requests)))
        print_prompt(0)
        try:
            for piece in output.reorder(events, on_story):
                if stream:
                    click.echo(piece, nl=False)
        finally:
            click.echo()
    tokens, seconds = sum(story.n_generated for story in stories), time.perf_counter() - started_at
    reasons = {"end": "ended by itself", "stop": "stopped at --stop", "length": "cut at --max-tokens"}
    summary = (
        reasons[stories[0].stop_reason]
        if num == 1
        else f"{sum(s.stop_reason == 'end' for s in stories)} of {num} ended by themselves"
    )
    click.echo(f"[{tokens} tokens, {tokens / seconds:.0f} tokens/s, seed {request.seed}; {summary}]", err=True)
