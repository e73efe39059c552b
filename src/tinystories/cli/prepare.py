"""`tinystories prepare`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import CONTEXT_SETTINGS, errors_option, json_option

if TYPE_CHECKING:
    from tinystories.data.prepare import PrepareReport


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; made whole or not at all."
)
@click.option(
    "--val", multiple=True, help="Validation source. Without it: the source's own, else 0.5 % held out by hash."
)
@click.option(
    "--tokenizer",
    default="gpt2",
    show_default=True,
    help="gpt2, bpe:N (of SOURCE), a tokenizer.json or a model.",
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of JSONL, CSV, parquet and Hub sources."
)
@errors_option
@click.option("--keep-duplicates", is_flag=True, help="Keep stories that occur more than once.")
@json_option
def prepare(
    source: tuple[str, ...],
    out: Path,
    val: tuple[str, ...],
    tokenizer: str,
    text_field: str,
    errors: Any,
    keep_duplicates: bool,
    as_json: bool,
) -> int:
    """Turn stories into token files to train on.

    \b
    SOURCE is one of
      sample              172 stories that come with the package
      tinystories         roneneldan/TinyStories (2.1M stories, 1.9 GB, downloaded)
      tinystories-v2      the GPT-4 stories of the same set
      tinystories-clean   karpathy/tinystories-gpt4-clean
      hf:OWNER/NAME       any set of the Hugging Face Hub
      FILE or FOLDER ...  .txt (<|endoftext|> between stories), .jsonl, .csv, .parquet

    Interrupted, it goes on where it stopped; run twice, it has nothing to do.
    """
    from tinystories.data.prepare import prepare as prepare_data

    try:
        report = prepare_data(
            list(source),
            out,
            val=list(val) or None,
            tokenizer=tokenizer,
            text_field=text_field,
            errors=errors,
            keep_duplicates=keep_duplicates,
        )
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on where it was", err=True)
        return 130
    print_prepare_report(report)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), default=str))
    return 0


def print_prepare_report(report: "PrepareReport") -> None:
    meta = report.meta
    for name, split in meta.splits.items():
        click.echo(
            f"{name:5}  {split.stories:>10,} stories  {split.tokens:>12,} tokens  {split.bytes / 1e6:>8.1f} MB of text"
        )
    dropped = [f"{meta.duplicates:,} duplicates", f"{meta.also_in_val:,} also in val", f"{meta.empty:,} empty"]
    click.echo(f"dropped: {', '.join(dropped)}; vocabulary: {meta.vocab_size:,} ids ({meta.tokenizer})")
    if report.up_to_date:
        click.echo(f"{report.out} is up to date: nothing to do")
    else:
        click.echo(f"wrote {report.out} in {report.seconds:.1f} s ({report.mb_per_s:.1f} MB/s)")
