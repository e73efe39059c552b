"""The one file of a page: its parts put together, each at its place, with hashes of everything that may run."""

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.model_facts import (
    DATASETS,
    LIMITATIONS,
    PAPER_NAME,
    PAPER_URL,
    describe_data_source,
    describe_sizes,
    describe_training,
    find_dataset_repo,
)
from tinystories.single_page import hash_source, join_modules

PACKAGE = Path(tinystories.__file__).parent
PAGE = PACKAGE / "formats" / "html" / "page"
SERVER_PAGE = PACKAGE / "serve" / "page"  # whose style, texts and sampling this page shares
PROGRAM, PAGE_SCRIPT = "formats/html/page/worker.js", "formats/html/page/page.js"  # what the two scripts begin with
STYLE = [SERVER_PAGE / "style.css", PAGE / "page.css"]
CHUNK_BYTES = 3 << 20  # of weights in one element; a multiple of 3, so that its base64 needs no padding
DEFAULT_TITLE = "The storyteller"
LICENSE_LINE = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*([^\n]+)\n(?:.*\n)*?---\n")


def build_policy(scripts: list[str], style: str) -> str:
    """Return the content security policy: these scripts and this style, a worker of our own, nothing from anywhere."""
    hashes = " ".join(hash_source(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes} 'wasm-unsafe-eval'; style-src {hash_source(style)}; img-src data:;"
        " worker-src blob:; base-uri 'none'; form-action 'none'"
    )


def write_document(path: Path, model: ModelBundle, header: dict[str, Any], weights: bytearray) -> None:
    """Write the page with a model: `header` and `weights` as `model_data` makes them."""
    title, style = model.title or DEFAULT_TITLE, "\n".join(file.read_text(encoding="utf-8") for file in STYLE)
    program, page_script = join_modules(PACKAGE, PROGRAM), join_modules(PACKAGE, PAGE_SCRIPT)
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    parts = {
        "policy": build_policy([program, page_script], style),
        "title": html.escape(title),
        "version": html.escape(tinystories.__version__),
        "style": style,
        "card": render_card(model),
        "model": escape_json(header | {"title": title, "command": find_command(model)}),
        "program": program,
        "page": page_script,
    }
    before, after = (
        re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], half) for half in template.split("{{weights}}")
    )
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        file.writelines(render_weights(weights))
        file.write(after)


def render_weights(weights: bytearray) -> Iterator[str]:
    """Yield the elements with the weights in base64; the page empties each after it has read it."""
    for start in range(0, len(weights), CHUNK_BYTES):
        chunk = base64.b64encode(memoryview(weights)[start : start + CHUNK_BYTES]).decode()
        yield f'<script class="weights" type="text/plain">{chunk}</script>\n'


def escape_json(value: Any) -> str:
    """Return JSON that no HTML parser can read as a tag."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def find_command(model: ModelBundle) -> str:
    """Return the command that tells this model's stories; MODEL stands for its folder, which is private."""
    is_bundled = model.folder is not None and model.folder.resolve() == BUNDLED_MODEL.resolve()
    return "tinystories generate" if is_bundled else "tinystories generate MODEL"


def find_license(model: ModelBundle) -> str:
    """Return the license of the weights: as given, or as the front matter of the model directory's README.md says."""
    readme = model.folder / "README.md" if model.folder else None
    if model.license or readme is None or not readme.is_file():
        return model.license
    match = LICENSE_LINE.match(readme.read_text(encoding="utf-8", errors="replace"))
    return match[1].strip().strip("\"'") if match else ""


def render_card(model: ModelBundle) -> str:
    """Return the model card as HTML: sizes, training, where the data came from, license, limits."""
    rows = [*describe_sizes(model), *describe_training(model.provenance)]
    score = model.provenance.get("val_bits_per_byte")
    if isinstance(score, int | float):
        rows.append(("bits per byte of validation stories", f"{score:.4f}"))
    table = "".join(f"<tr><th scope=row>{html.escape(name)}<td>{html.escape(value)}" for name, value in rows)
    weights_license = find_license(model)
    license_text = html.escape(weights_license) if weights_license else "not stated; ask whoever made this model"
    return (
        f"<table>{table}</table>\n<p><b>Data.</b> {render_data_notice(model)}</p>\n"
        f"<p><b>License of the weights.</b> {license_text}.</p>\n<p><b>Limits.</b> {html.escape(LIMITATIONS)}</p>"
    )


def render_data_notice(model: ModelBundle) -> str:
    """Return a sentence on the data that the model was trained on, as HTML."""
    repo, name = find_dataset_repo(model.provenance), describe_data_source(model.provenance)
    if facts := DATASETS.get(repo):
        link = f'<a href="{PAPER_URL}">{PAPER_NAME}</a>'
        return f"Trained on {html.escape(repo)}: {facts.description} by {link}; license: {facts.license}."
    if model.provenance.get("data_source") == "sample":
        return "Trained on 172 short stories that come with the program; license: CC0-1.0."
    if name:
        return f"Trained on {html.escape(name)}; license: see source."
    return "Not recorded."
