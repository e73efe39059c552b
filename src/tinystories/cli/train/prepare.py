"""`tinystories prepare`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import CONTEXT_SETTINGS, errors_option, json_option

if TYPE_CHECKING:
    from tinystories.data.prepare import PrepareReport


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it appears only when complete."
)
@click.option(
    "--val", multiple=True, help="Validation source.  [default: the source's own, else 0.5 % held out by hash]"
)
@click.option(
    "--tokenizer",
    default="gpt2",
    show_default=True,
    help="gpt2, bpe:N (trained on SOURCE), a tokenizer.json, or a model directory.",
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of JSONL, CSV, Parquet and Hub sources."
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
) -> dict[str, Any] | int:
    """Tokenize stories into files to train on.

    \b
    SOURCE is one of
      sample              172 stories bundled with the package
      tinystories         roneneldan/TinyStories (2.1M stories, 1.9 GB, downloaded)
      tinystories-v2      the GPT-4 stories of the same dataset
      tinystories-clean   karpathy/tinystories-gpt4-clean
      hf:OWNER/NAME       any dataset on the Hugging Face Hub
      FILE or FOLDER ...  .txt (<|endoftext|> between stories), .jsonl, .csv, .parquet; .gz, .bz2 and .xz of text
      -                   standard input: .txt, or .jsonl if it starts with {

    After an interrupt, the same command continues where it stopped; once the data is complete, it does nothing.
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
        click.echo("stopped; run the same command again to continue", err=True)
        return 130
    click.echo(describe_preparation(report))
    return dataclasses.asdict(report)


def describe_preparation(report: "PrepareReport") -> str:
    """Return, in a few lines, the size of each split, what was dropped and why, and how long it took."""
    meta = report.meta
    lines = [
        f"{name:5}  {split.stories:>10,} stories  {split.tokens:>12,} tokens  {split.bytes / 1e6:>8.1f} MB of text"
        for name, split in meta.splits.items()
    ]
    dropped = [f"{meta.duplicates:,} duplicates", f"{meta.also_in_val:,} also in val", f"{meta.empty:,} empty"]
    lines.append(f"dropped: {', '.join(dropped)}; vocabulary: {meta.vocab_size:,} ids ({meta.tokenizer})")
    if report.up_to_date:
        lines.append(f"{report.out} is up to date: nothing to do")
    else:
        lines.append(f"wrote {report.out} in {report.seconds:.1f} s ({report.mb_per_s:.1f} MB/s)")
    return "\n".join(lines)
