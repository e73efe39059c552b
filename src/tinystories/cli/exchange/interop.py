"""`tinystories export`, `import` and `push`: convert to and from the formats of other programs; upload to the Hub."""

import dataclasses
import shlex
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS, model_argument
from tinystories.errors import UserError

force_option = click.option(
    "--force", is_flag=True, help="Replace an existing file, or the directory of an earlier export or import."
)


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument(bundled=True)
@click.option(
    "--format",
    "name",
    required=True,
    type=click.Choice(["hf", "gguf", "llama2c", "onnx", "html"]),
    help="hf: a folder for transformers, CTranslate2, vLLM; gguf: llama.cpp, Ollama; llama2c: llama2.c;"
    " onnx: ONNX Runtime; html: one file that tells stories in a browser.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write (hf: a folder).")
@click.option(
    "--precision",
    default="",
    show_default=False,
    help="Weight precision. gguf: f32, f16, q8_0, q4_0; llama2c: f32, q8_0; hf, onnx: f32; html: int8."
    "  [default: the first]",
)
@click.option(
    "--title", default="", show_default=False, help="html: the title of the page.  [default: The storyteller]"
)
@click.option(
    "--license",
    default="",
    show_default=False,
    help="html: license of the weights, for the model card on the page.  [default: that of the model's README.md]",
)
@click.option(
    "--require-check", is_flag=True, help="html: keep no page that could not be run here; needs Node.js or Chromium."
)
@force_option
def export(
    model: Path, name: str, out: Path, precision: str, title: str, license: str, require_check: bool, force: bool
) -> None:
    """Export MODEL, or the bundled storyteller, to the format of another program, or to a page.

    The file is read back and its logits are compared with the model's, or it is run and its ids are; it is kept only if
    they agree. docs/interop.md lists which models fit which format and how to use the files.

    \b
      tinystories export runs/small --format gguf --precision q8_0 --out stories.gguf
      tinystories export runs/small --format hf --out stories-hf
      tinystories export runs/small --format html --out story.html --title "Stories for Ada"
    """
    from tinystories.formats.bundle import ModelBundle
    from tinystories.formats.exports import export
    from tinystories.formats.registry import FORMATS

    if name != "html" and (title or license):
        raise UserError("--title and --license are for --format html; other formats have no place for them")
    bundle = dataclasses.replace(ModelBundle.read(model), title=title, license=license)
    result = export(bundle, name, out, precision=precision, force=force, require_check=require_check)
    for path in result.paths:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        click.echo(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")
    click.echo(result.report)
    click.echo(FORMATS[name].next_steps(out))


@click.command("import", context_settings=CONTEXT_SETTINGS)
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model directory to write.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json, llama2.c's tokenizer.bin, or gpt2. Required if SOURCE has none; replaces its own otherwise.",
)
@force_option
def import_(source: str, out: Path, tokenizer: Path | None, force: bool) -> None:
    """Convert another program's model to a model directory.

    SOURCE is a Hugging Face folder (gpt2, gpt_neo, llama, qwen3), hf:OWNER/NAME[@REVISION] on the Hub, a GGUF file, a
    llama2.c checkpoint (.bin), or a state dict of the original program (.pt).

    \b
      tinystories import stories15M.bin --tokenizer tokenizer.bin --out models/15m
      tinystories import hf:roneneldan/TinyStories-33M --out models/paper
    """
    from tinystories.formats.imports import import_to_directory
    from tinystories.hub import client

    config = import_to_directory(source, out, tokenizer, force=force, download=client.download).config
    click.echo(
        f"{out}: {config.architecture}, {config.n_params:,} parameters, {config.n_layer} layers x {config.n_embd},"
        f" context {config.n_ctx}, {config.vocab_size:,} ids"
    )
    click.echo(f'next: tinystories generate {shlex.quote(str(out))} --prompt "Once upon a time"')


@click.command(context_settings=CONTEXT_SETTINGS)
@model_argument()
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private/--public", default=True, show_default=True, help="Visibility of a new repository.")
@click.option("--message", default="", show_default=False, help="Commit message.")
@click.option(
    "--license",
    default="",
    show_default=False,
    help="License of the weights, for the model card: mit, apache-2.0, cc0-1.0, ...",
)
def push(model: Path, repository: str, private: bool, message: str, license: str) -> None:
    """Upload MODEL to the Hugging Face Hub as OWNER/NAME, in one commit.

    Uploaded: weights, config with provenance, tokenizer, sampling defaults, and a model card generated from them as
    README.md (preview: tinystories info MODEL --card). Not uploaded: quantized weights, checkpoints, training state,
    samples and logs. An existing model card is replaced; the old one stays in the repository's history.

    Needs huggingface_hub and a token with write access, in HF_TOKEN or from `hf auth login`. To publish the format of
    another program, export first and upload the folder: hf upload OWNER/NAME DIR

    \b
      tinystories push runs/small me/small-stories
      tinystories generate hf:me/small-stories --prompt "Once upon a time"
    """
    from tinystories.hub import client as hub

    hub.check_pushable(repository)
    files = hub.collect_files(model, repository, license)
    for name, file in files.items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        click.echo(f"{name}: {size / 1e6:,.3f} MB")
    url = hub.push(files, repository, private=private, message=message)
    click.echo(f"pushed: {url}")
    click.echo(f'next: tinystories generate hf:{repository} --prompt "Once upon a time"')
