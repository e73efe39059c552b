"""`tinystories export`, `import` and `push`: to the files of other programs, from them, and to the Hub."""

import shlex
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS, model_argument

force_option = click.option(
    "--force", is_flag=True, help="Replace what is there: a file, or a directory of an earlier export or import."
)


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument(bundled=True)
@click.option(
    "--format",
    "name",
    required=True,
    type=click.Choice(["hf", "gguf", "llama2c", "onnx"]),
    help="hf: a folder for transformers, CTranslate2, vLLM; gguf: llama.cpp, Ollama; llama2c: llama2.c;"
    " onnx: ONNX Runtime.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write; for hf a folder.")
@click.option(
    "--precision",
    default="",
    help="Of the weights. gguf: f32, f16, q8_0, q4_0; llama2c: f32, q8_0; hf, onnx: f32.  [default: f32]",
)
@force_option
def export(model: Path, name: str, out: Path, precision: str, force: bool) -> None:
    """Write MODEL, or the bundled storyteller, in the format of another program.

    The file is read back and must say what the model says, or nothing is kept. Which models fit which format, and what
    to do with the files, is in docs/interop.md.

    \b
      tinystories export runs/small --format gguf --precision q8_0 --out stories.gguf
      tinystories export runs/small --format hf --out stories-hf
    """
    from tinystories.interop.exports import FORMATS, export
    from tinystories.interop.model_bundle import ModelBundle

    result = export(ModelBundle.read(model), name, out, precision=precision, force=force)
    for path in result.paths:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        click.echo(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    click.echo(
        f"read back: over {result.n_ids} ids of a story, logits differ by at most {result.max_difference:.2g}"
        f" (divergence {result.kl_divergence:.2g} nats)"
    )
    click.echo(FORMATS[name].next_steps(out))


@click.command("import", context_settings=CONTEXT_SETTINGS)
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model directory to write.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json, or llama2.c's tokenizer.bin, where SOURCE brings none; in place of its own where it does.",
)
@force_option
def import_(source: str, out: Path, tokenizer: Path | None, force: bool) -> None:
    """Make a model directory of another program's model.

    SOURCE is a Hugging Face folder (gpt2, gpt_neo, llama, qwen3), hf:OWNER/NAME[@REVISION] on their Hub, a GGUF file, a
    llama2.c checkpoint (.bin), or a state dict of the original program (.pt).

    \b
      tinystories import stories15M.bin --tokenizer tokenizer.bin --out models/15m
      tinystories import hf:roneneldan/TinyStories-33M --out models/paper
    """
    from tinystories.interop.imports import import_to_directory

    config = import_to_directory(source, out, tokenizer, force=force).config
    click.echo(
        f"{out}: {config.architecture}, {config.n_params:,} parameters, {config.n_layer} layers x {config.n_embd},"
        f" context {config.n_ctx}, {config.vocab_size:,} ids"
    )
    click.echo(f'next: tinystories generate {shlex.quote(str(out))} --prompt "Once upon a time"')


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument()
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private/--public", default=True, show_default=True, help="Who may see a repository that is new.")
@click.option("--message", default="", help="Of the commit.")
@click.option("--license", default="", help="Of the weights, for the model card: mit, apache-2.0, cc0-1.0 ...")
def push(model: Path, repository: str, private: bool, message: str, license: str) -> None:
    """Upload MODEL to the Hugging Face Hub as OWNER/NAME, one commit.

    Goes up: the weights, the config with its provenance, the tokenizer, the sampling defaults, and a model card made of
    them as README.md (see it first: tinystories info MODEL --card). Stays here: packed weights, checkpoints, the state
    of training, samples and logs. A card that is there already is replaced; its history keeps it.

    Needs huggingface_hub, and a token that may write in HF_TOKEN or by `hf auth login`. For a repository of the formats
    of other programs, export first and upload the folder: hf upload OWNER/NAME DIR

    \b
      tinystories push runs/small me/small-stories
      tinystories generate hf:me/small-stories --prompt "Once upon a time"
    """
    from tinystories.interop import hub

    hub.check_pushable(repository)
    files = hub.collect_files(model, repository, license)
    for name, file in files.items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        click.echo(f"{name}: {size / 1e6:,.3f} MB")
    url = hub.push(files, repository, private=private, message=message)
    click.echo(f"pushed: {url}")
    click.echo(f'next: tinystories generate hf:{repository} --prompt "Once upon a time"')
