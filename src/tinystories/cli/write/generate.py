"""`tinystories generate`."""

import contextlib
import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import FILE, engine_options, model_argument, sampling_options

if TYPE_CHECKING:
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.generate.batching import Request, Story
    from tinystories.generate.storyteller import Storyteller

STOP_REASONS = {"end": "ended by itself", "stop": "stopped at --stop", "length": "cut at --max-tokens"}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def parse_stop(_context: click.Context, _option: click.Parameter, stop: tuple[str, ...]) -> tuple[str, ...]:
    r"""Replace the escapes \n, \t and \\ in the values of --stop; a shell passes them on as two characters."""
    return tuple(re.sub(r"\\[nt\\]", lambda escape: ESCAPES[escape[0]], text) for text in stop)


@click.command()
@model_argument(bundled=True)
@click.option(
    "--prompt", default="", show_default=False, help="Beginning of the story.  [default: none, the model starts]"
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=400, help="Most tokens to generate.")
@sampling_options
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same story.  [default: a new seed each time]")
@click.option("--num", type=click.IntRange(min=1), default=1, help="Number of stories.")
@click.option(
    "--stop",
    multiple=True,
    callback=parse_stop,
    help=r"End the story before this text; can be repeated. \n is a newline (as is $'\n' in bash), \t a tab, \\ a"
    " backslash.",
)
@click.option("--ignore-end", is_flag=True, help="Continue with a new story after <|endoftext|>, up to --max-tokens.")
@engine_options(
    "Inference engine. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).",
    "Precision. cpu: int8 (auto), int8-a8 (int8 weights, 8-bit activations: faster prompts and batches), int4 or fp32;"
    " torch: bf16 if the hardware supports it, else fp32 (auto).",
)
@click.option(
    "--shortlist", is_flag=True, help="Faster: generate only ids chosen by `tinystories quantize --shortlist`."
)
@click.option("--stream/--no-stream", default=True, help="Print text as it is generated.")
@click.option("--out", type=FILE, help="Also write to FILE.txt or FILE.jsonl; an existing file is overwritten.")
def generate(
    model: Path,
    prompt: str,
    num: int,
    engine_config: "EngineConfig",
    shortlist: bool,
    stream: bool,
    out: Path | None,
    sampling: dict[str, Any],
    **options: Any,
) -> None:
    """Write stories with MODEL, or with the bundled storyteller.

    Sampling defaults come from the model (generation.json). The text goes to stdout, everything else to stderr.
    """
    from tinystories.generate.storyteller import Storyteller

    if prompt.endswith(" "):
        click.echo("note: the prompt ends in a space; leave it out, since tokens start with their own space", err=True)
    n_slots = min(num, engine_config.n_slots)
    storyteller = Storyteller.load(model, dataclasses.replace(engine_config, n_slots=n_slots, shortlist=shortlist))
    request = storyteller.build_request(prompt, options | sampling)  # type: ignore[arg-type]
    print_stories(storyteller, request, num, stream=stream, out=out)


def print_stories(storyteller: "Storyteller", request: "Request", num: int, *, stream: bool, out: Path | None) -> None:
    """Print `num` stories to stdout, write them to `out` if given, and report tokens/s on stderr.

    `request` is repeated for each story. With `stream`, text is printed as it is generated.
    """
    from tinystories.generate.output import STORY_SEPARATOR, StoryWriter, reorder

    stories: list[Story] = []
    requests = (dataclasses.replace(request, number=number) for number in range(num))
    opening = request.prompt if stream else ""  # of a story on the screen; without `stream`, its text has the prompt
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(StoryWriter(out)) if out else None
        started_at = time.perf_counter()
        events = stack.enter_context(contextlib.closing(storyteller.events(requests)))
        click.echo(opening, nl=False)
        stack.callback(click.echo)  # the last newline, also after an interrupt
        for item in reorder(events):
            if isinstance(item, str):
                if stream:
                    click.echo(item, nl=False)
                continue
            stories.append(item)
            if writer:
                writer.write(item)
            if not stream:
                click.echo(item.text, nl=False)
            if len(stories) < num:
                click.echo(STORY_SEPARATOR + opening, nl=False)
    tokens, seconds = sum(story.n_generated for story in stories), time.perf_counter() - started_at
    ended = sum(story.stop_reason == "end" for story in stories)
    summary = STOP_REASONS[stories[0].stop_reason] if num == 1 else f"{ended} of {num} ended by themselves"
    click.echo(f"[{tokens} tokens, {tokens / seconds:.0f} tokens/s, seed {request.seed}; {summary}]", err=True)
