"""Model cards for the Hugging Face Hub, built from the provenance in a model's config.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from tinystories.data.source.hub import HubSource, parse_hub_name
from tinystories.data.source.resolve import get_named_sources
from tinystories.data.text_loss import describe_loss
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle

PAPER = "[Eldan and Li 2023](https://arxiv.org/abs/2305.07759)"
DATASET_LICENSES = {
    "roneneldan/TinyStories": f"synthetic English stories for small children by {PAPER}; licence: CDLA-Sharing-1.0",
    "karpathy/tinystories-gpt4-clean": f"a cleaned part of TinyStories by {PAPER}; licence: see source",
}

BITS_PER_BYTE_NOTE = (
    "Bits per byte are what it takes on average to write down a byte of a story that the model has not seen, by its"
    " predictions; less is better, and models of different vocabularies can be compared by them."
)
INTENDED_USE = "For play, teaching and research on small language models: it writes {what}, or goes on with one."
LIMITATIONS = (
    "It is small. Its stories may be incoherent, contradict themselves or repeat their training data; it knows next to"
    " nothing of the world, follows no instructions, and is not fit to give advice. Nothing filters what it writes:"
    " read a story before a child does."
)


def build_model_card(model: ModelBundle, repo: str = "OWNER/NAME", license: str = "") -> str:
    """Return the README.md of `repo`: YAML front matter and Markdown. Facts missing from provenance are omitted.

    `license`: license of the weights, by the Hub's identifier (mit, apache-2.0, cc0-1.0, ...); "" omits it.
    """
    provenance, config = model.provenance, model.config
    dataset = find_dataset_repo(provenance)
    is_english = dataset in DATASET_LICENSES or provenance.get("data_source") == "sample"
    text_kind = "short English stories for small children" if is_english else "short texts like those it was trained on"
    sections = [
        render_front_matter(dataset, license, is_english),
        f"# A storyteller of {config.n_params / 1e6:,.1f} million parameters",
        "A small language model that writes stories, made with TinyStories GPT (the Python package `tinystories-gpt`).",
        "## The model\n\n" + render_table(describe_sizes(model)),
    ]
    if training_rows := list(describe_training(provenance)):
        sections.append("## Training\n\n" + render_table(training_rows))
    if dataset in DATASET_LICENSES:
        sections.append(f"The data: {DATASET_LICENSES[dataset]}.")
    elif provenance.get("data_source") == "sample":
        sections.append("The data: 172 short stories that come with the package; licence: CC0-1.0.")
    elif describe_data_source(provenance):
        sections.append("The data's licence: see source.")
    if isinstance(bits_per_byte := provenance.get("val_bits_per_byte"), int | float):
        sections.append(
            f"## Score\n\n**{bits_per_byte:.4f} bits per byte** on {format_story_count(provenance)}validation stories."
            f" {describe_score(provenance)}"
        )
    sections += [
        f"## Use\n\n{INTENDED_USE.format(what=text_kind)}",
        render_usage(model, repo),
        f"## Limits\n\n{LIMITATIONS}",
    ]
    return "\n\n".join(sections) + "\n"


def render_front_matter(dataset: str, license: str, is_english: bool) -> str:
    """Return the YAML front matter that the Hub reads. Strings are escaped as JSON, which is valid YAML."""
    lines = ["language: en"] if is_english else []
    if license:
        lines.append(f"license: {json.dumps(license)}")
    lines += ["library_name: tinystories", "pipeline_tag: text-generation", "tags:", "- tinystories", "- stories"]
    if dataset:
        lines += ["datasets:", f"- {json.dumps(dataset)}"]
    return "\n".join(["---", *lines, "---"])


def find_dataset_repo(provenance: Mapping[str, Any]) -> str:
    """Return OWNER/NAME of the training data on the Hub, or "" if provenance names none."""
    name = str(provenance.get("data_source", ""))
    source = get_named_sources().get(name)
    if source is None and name.startswith("hf:"):
        try:
            return parse_hub_name(name)[0]
        except UserError:
            return ""
    return source.repo if isinstance(source, HubSource) else ""


def describe_data_source(provenance: Mapping[str, Any]) -> str:
    """Return the name of the training data. Folders of local files are private and are left out."""
    name = str(provenance.get("data_source", ""))
    if find_dataset_repo(provenance):
        return name
    return " ".join(PurePath(part).name for part in name.replace("\\", "/").split())


def describe_sizes(model: ModelBundle) -> Iterator[tuple[str, str]]:
    """Yield table rows (label, value) with the model's sizes."""
    config = model.config
    yield "architecture", config.architecture
    yield "parameters", f"{config.n_params:,}"
    yield "layers x width", f"{config.n_layer} x {config.n_embd}"
    yield "heads", f"{config.n_head}" + (f", {config.kv_heads} of keys and values" * (config.kv_heads < config.n_head))
    yield "context", f"{config.n_ctx} tokens"
    yield "vocabulary", f"{config.vocab_size:,} ids"


def describe_training(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield table rows (label, value) for the facts that provenance records."""
    for label, key in (
        ("data", "data_source"),
        ("revision of the data", "data_revision"),
        ("SHA-256 of the training tokens", "data_sha256"),
        ("tokenizer", "tokenizer"),
        ("tokens seen", "tokens_seen"),
        ("passes over the data", "epochs"),
        ("optimizer steps", "step"),
        ("seconds of training", "train_seconds"),
        ("seed", "seed"),
        ("tinystories-gpt", "code_version"),
        ("torch", "torch"),
    ):
        value = describe_data_source(provenance) if key == "data_source" else provenance.get(key, "")
        if isinstance(value, int | float):
            yield label, f"{value:,}"
        elif value:
            yield label, sanitize(PurePath(str(value)).name if key == "tokenizer" else value)


def format_story_count(provenance: Mapping[str, Any]) -> str:
    count = provenance.get("val_stories")
    return f"{count:,} " if isinstance(count, int) else ""


def describe_score(provenance: Mapping[str, Any]) -> str:
    """Return what bits per byte are, or why those of this model cannot be compared with others."""
    lost_text = provenance.get("val_lost_text")
    if isinstance(lost_text, float) and lost_text:
        return f"This is {describe_loss(lost_text)}."
    return BITS_PER_BYTE_NOTE


def render_usage(model: ModelBundle, repo: str) -> str:
    sampling = model.sampling
    return f"""```
pip install "tinystories-gpt[export]"
tinystories generate hf:{repo} --prompt "Once upon a time"
```

```python
import tinystories

story = tinystories.load("hf:{repo}").generate("Once upon a time")
print(story.text)
```

Unless told otherwise it samples at temperature {sampling.temperature:g}, with top-k {sampling.top_k}, top-p \
{sampling.top_p:g} and min-p {sampling.min_p:g}."""


def render_table(rows: Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value.replace('|', '/')} |" for label, value in rows)])
