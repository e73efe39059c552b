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
    from tinystories.generate.batching import Request, Story
    from tinystories.generate.storyteller import Storyteller


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument(bundled=True)
@click.option("--prompt", default="", help="Beginning of the story.  [default: none, the model starts]")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=400, show_default=True, help="Most tokens to generate."
)
@sampling_options
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same story.  [default: a new seed each time]")
@click.option("--num", type=click.IntRange(min=1), default=1, show_default=True, help="Number of stories.")
@click.option("--stop", multiple=True, help="End the story before this text; can be repeated.")
@click.option("--ignore-end", is_flag=True, help="Continue with a new story after <|endoftext|>, up to --max-tokens.")
@engine_option("Inference engine. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).")
@device_option
@precision_option
@threads_option
@click.option(
    "--shortlist", is_flag=True, help="Faster: generate only ids chosen by `tinystories quantize --shortlist`."
)
@click.option("--stream/--no-stream", default=True, show_default=True, help="Print text as it is generated.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write to FILE.txt or FILE.jsonl; an existing file is overwritten.",
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
    """Write stories with MODEL, or with the bundled storyteller.

    Sampling defaults come from the model (generation.json). The text goes to stdout, everything else to stderr.
    """
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.generate.storyteller import Storyteller

    if prompt.endswith(" "):
        click.echo("note: the prompt ends in a space; leave it out, since tokens start with their own space", err=True)
    engine_config = EngineConfig(
        engine=engine,
        device=device,
        precision=precision,
        n_slots=min(num, EngineConfig.n_slots),
        threads=threads,
        shortlist=shortlist,
    )
    storyteller = Storyteller.load(model, engine_config)
    request = storyteller.build_request(
        prompt,
        {"max_tokens": max_tokens, "seed": seed, "stop": stop, "ignore_end": ignore_end, **sampling},  # type: ignore[typeddict-item]
    )
    print_stories(storyteller, request, num, stream=stream, out=out)


def print_stories(storyteller: "Storyteller", request: "Request", num: int, *, stream: bool, out: Path | None) -> None:
    """Print `num` stories to stdout, write them to `out` if given, and report tokens/s on stderr.

    `request` is repeated for each story. With `stream`, text is printed as it is generated.
    """
    from tinystories.generate import output

    stories: list[Story] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.StoryWriter(out)) if out else None

        def on_story(story: "Story") -> None:
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
        events = stack.enter_context(contextlib.closing(storyteller.events(requests)))
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
