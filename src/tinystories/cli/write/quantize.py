"""`tinystories quantize` and `tinystories warmup`: do ahead of time what `generate` otherwise does on first use."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import PATH, model_argument, sampling_options
from tinystories.engine.engine_config import QUANTIZED_PRECISIONS
from tinystories.errors import UserError

if TYPE_CHECKING:
    from tinystories.checkpoint import ModelFiles
    from tinystories.weights.load import Precision


@click.command()
@model_argument()
@click.option(
    "--precision",
    type=click.Choice(QUANTIZED_PRECISIONS),
    multiple=True,
    default=["int8"],
    help="Weight precision; can be repeated.",
)
@click.option(
    "--shortlist",
    type=int,
    metavar="N",
    help="Also store the N most frequent ids in the stories of --data, for `generate --shortlist`.",
)
@click.option("--data", type=PATH, help="Folder written by `tinystories prepare`.")
@click.option("--out", type=PATH, metavar="DIR", help="Write a small model directory with int8 weights only.")
@sampling_options
def quantize(
    model: Path,
    precision: "tuple[Precision, ...]",
    shortlist: int | None,
    data: Path | None,
    out: Path | None,
    sampling: dict[str, Any],
) -> None:
    """Quantize the weights of MODEL for the CPU engine.

    Writes packed-int8.safetensors or packed-int4.safetensors into the folder of MODEL. `generate` does the same when it
    first needs one.

    With --out, MODEL is left as it is, and DIR becomes a model directory of a quarter of the size, with int8 weights
    only. Every command and engine can read it. Sampling options (--temperature and so on) become its defaults.

    With --shortlist, also write shortlist.json and print what it costs: `generate --shortlist` (in any precision of the
    CPU engine) computes the logits of these ids only and never generates another. `eval` always uses all ids.
    """
    from tinystories.checkpoint import read_model
    from tinystories.files import write_errors
    from tinystories.weights.load import load_or_quantize, quantized_path, write_int8_model
    from tinystories.weights.safetensors_file import SafetensorsFile

    if (shortlist is None) != (data is None):
        raise UserError("--shortlist N and --data DIR go together; give both or neither")
    if sampling and out is None:
        raise UserError(f"--{next(iter(sampling)).replace('_', '-')} sets a default of the model that --out writes")
    files = read_model(model, verify_weights=False)
    if out is not None:
        if (precision, shortlist) != (("int8",), None):
            raise UserError("--out is for int8 and all ids: leave out --precision and --shortlist")
        with write_errors(f"--out {out}"):
            if out.exists():
                raise UserError(f"--out {out} exists; choose another --out")
            write_int8_model(files, out, dataclasses.replace(files.sampling, **sampling))
        click.echo(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.1f} MB")
        return
    if shortlist is not None and data is not None:
        create_shortlist(files, shortlist, data)
    for name in precision:
        path = quantized_path(files, name)
        if not isinstance(load_or_quantize(files, name), SafetensorsFile):
            raise UserError(f"{path} could not be written; check free space and the permissions of the folder")
        sizes = path.stat().st_size / 1e6, 4 * files.config.n_params / 1e6
        click.echo(f"{path}: {sizes[0]:,.1f} MB ({sizes[1]:,.1f} MB in fp32)")


def create_shortlist(files: "ModelFiles", n: int, data: Path) -> None:
    """Write the shortlist of a model, and print how many tokens and stories it cannot express."""
    from tinystories.data.dataset import read_meta
    from tinystories.engine.cpu.shortlist import coverage_loss, most_frequent_ids, write_shortlist

    ids, coverage = most_frequent_ids(files, data, n)
    uncovered = coverage_loss(files, data, ids) if read_meta(data).splits["val"].stories else None
    path = write_shortlist(files, ids)
    click.echo(f"{path}: {n:,} of {files.config.vocab_size:,} ids, {coverage:.2%} of the training tokens")
    if uncovered:
        click.echo(
            f"not in it: {uncovered[0]:.2%} of the validation tokens; {uncovered[1]:.1%} of the stories need one"
        )


@click.command()
def warmup() -> None:
    """Compile the CPU engine for this machine, in all precisions, so that the first story starts at once.

    A wheel has machine code for most processors, and nothing is compiled. Otherwise this takes half a minute, once. The
    compiled code is stored in the user's cache folder, or in the folder named by the environment variable
    TINYSTORIES_CACHE.
    """
    from tinystories.engine.cpu import jit

    click.echo(f"ready: {jit.prepare()}")
