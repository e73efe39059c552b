"""`tinystories trace`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import json_option, model_argument

if TYPE_CHECKING:
    from tinystories.explain.text_trace import TextTrace

N_WORST = 5  # of the most surprising tokens are printed


@click.command()
@model_argument(bundled=True)
@click.option("--text", required=True, help="The text to look into.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the pictures.")
@click.option("--layer", type=click.IntRange(min=0), help="Layer of the head that is drawn large.")
@click.option(
    "--head",
    type=click.IntRange(min=0),
    help="Head that is drawn large.  [default: the one that attends most to other tokens than the first and itself]",
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    help="Tokens at the end of the text that the pictures with labels show.  [default: 40 for a head, 14 for the lens]",
)
@click.option("--window", is_flag=True, help="Trace the last tokens of a text that is longer than the context.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "int4"]),
    default="fp32",
    help="Weights as they are (fp32), or rounded as by the CPU engine.",
)
@json_option
def trace(
    model: Path,
    text: str,
    out: Path,
    layer: int | None,
    head: int | None,
    last: int | None,
    window: bool,
    precision: Any,
) -> dict[str, Any]:
    """Draw what MODEL, or the bundled storyteller, computes for a text (docs/trace.md).

    Writes to the folder: words.png (how much each token surprised the model), attention.png (all heads),
    attention-LAYER-HEAD.png (one head with labels), lens.png (what each layer would say next) and trace.json (the
    numbers). Layers and heads count from 0. Needs matplotlib, which is part of the extra [train].

    \b
    tinystories trace --text "Once upon a time, there was a cat." --out pictures
    """
    from tinystories import checkpoint
    from tinystories.engine.trace.model import TraceModel
    from tinystories.explain.pictures import check_matplotlib, save_pictures, select_head
    from tinystories.explain.text_trace import finite, trace_text
    from tinystories.files import write_errors, write_json
    from tinystories.generate.batching import check_text

    check_matplotlib()
    check_text(text, "the text")
    files = checkpoint.read_model(model)
    result = trace_text(TraceModel.load(files, precision), files.tokenizer(), text, window=window)
    layer, head = select_head(result, layer, head)
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    paths = save_pictures(result, out, layer=layer, head=head, last=last)
    write_json(out / "trace.json", result.as_dict() | {"attention": attention_as_dict(result, layer, head)})
    paths.append(out / "trace.json")
    for i in result.surprise_bits.argsort()[::-1][1 : N_WORST + 1].tolist():  # the first is NaN: it has none
        click.echo(f"{result.surprise_bits[i]:5.1f} bits  rank {result.ranks[i]:5,}  {result.labels[i]}")
    click.echo(f"{len(result.ids)} tokens, mean surprise {result.mean_bits:.2f} bits; wrote:")
    for path in paths:
        click.echo(f"  {path}")
    facts = {
        "tokens": len(result.ids),
        "mean_bits": finite(result.mean_bits),
        "bits_per_byte": finite(result.bits_per_byte),
    }
    return facts | {"layer": layer, "head": head, "files": [str(path) for path in paths]}


def attention_as_dict(result: "TextTrace", layer: int, head: int) -> dict[str, Any]:
    """Return the attention of one head; row i has the shares of tokens 0..i."""
    from tinystories.explain.text_trace import rounded

    rows = [row[: i + 1] for i, row in enumerate(rounded(result.layer_attention(layer)[head]))]
    return {"layer": layer, "head": head, "rows": rows}
