"""The model card: what a model's page on the Hugging Face Hub says, from what its config.json records."""

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from tinystories.data.hub import HubSource, repository
from tinystories.data.sources import named_sources
from tinystories.data.tokenizer import one_line
from tinystories.errors import UserError
from tinystories.interop.portable import Portable

PAPER = "[Eldan and Li 2023](https://arxiv.org/abs/2305.07759)"
LICENCES = {
    "roneneldan/TinyStories": f"synthetic English stories for small children by {PAPER}; licence: CDLA-Sharing-1.0",
    "karpathy/tinystories-gpt4-clean": f"a cleaned part of TinyStories by {PAPER}; licence: see source",
}

BITS = (
    "Bits per byte are what it takes on average to write down a byte of a story that the model has not seen, by its"
    " predictions; less is better, and models of different vocabularies can be compared by them."
)
USE = "For play, teaching and research on small language models: it writes {what}, or goes on with one."
LIMITS = (
    "It is small. Its stories may be incoherent, contradict themselves or repeat their training data; it knows next to"
    " nothing of the world, follows no instructions, and is not fit to give advice. Nothing filters what it writes:"
    " read a story before a child does."
)


def card(model: Portable, repo: str = "OWNER/NAME", license: str = "") -> str:
    """Markdown with YAML in front, for the README.md of `repo`. What the model's provenance does not tell is left out.

    `license`: of the weights, as the Hub names it (mit, apache-2.0, cc0-1.0 ...); empty: nothing is said.
    """
    facts, config = model.provenance, model.config
    dataset = dataset_of(facts)
    english = dataset in LICENCES or facts.get("data_source") == "sample"
    what = "short English stories for small children" if english else "short texts like those it was trained on"
    sections = [
        front(dataset, license, english),
        f"# A storyteller of {config.n_params / 1e6:,.1f} million parameters",
        "A small language model that writes stories, made with TinyStories GPT (the Python package `tinystories-gpt`).",
        "## The model\n\n" + table(sizes(model)),
    ]
    if rows := list(training(facts)):
        sections.append("## Training\n\n" + table(rows))
    if dataset in LICENCES:
        sections.append(f"The data: {LICENCES[dataset]}.")
    elif facts.get("data_source") == "sample":
        sections.append("The data: 172 short stories that come with the package; licence: CC0-1.0.")
    elif source_of(facts):
        sections.append("The data's licence: see source.")
    if isinstance(bits := facts.get("val_bits_per_byte"), int | float):
        sections.append(f"## Score\n\n**{bits:.4f} bits per byte** on {stories(facts)}validation stories. {BITS}")
    sections += [f"## Use\n\n{USE.format(what=what)}", usage(model, repo), f"## Limits\n\n{LIMITS}"]
    return "\n\n".join(sections) + "\n"


def front(dataset: str, license: str, english: bool) -> str:
    """YAML that the Hub reads; JSON strings are YAML strings."""
    lines = ["language: en"] if english else []
    if license:
        lines.append(f"license: {json.dumps(license)}")
    lines += ["library_name: tinystories", "pipeline_tag: text-generation", "tags:", "- tinystories", "- stories"]
    if dataset:
        lines += ["datasets:", f"- {json.dumps(dataset)}"]
    return "\n".join(["---", *lines, "---"])


def dataset_of(facts: Mapping[str, Any]) -> str:
    """OWNER/NAME of the data set on the Hub that provenance names, else nothing."""
    name = str(facts.get("data_source", ""))
    known = named_sources().get(name)
    if known is None and name.startswith("hf:"):
        try:
            return repository(name)[0]
        except UserError:
            return ""
    return known.repo if isinstance(known, HubSource) else ""


def source_of(facts: Mapping[str, Any]) -> str:
    """The name of the data; of local files without their folders, which are nobody's business."""
    name = str(facts.get("data_source", ""))
    if dataset_of(facts):
        return name
    return " ".join(PurePath(part).name for part in name.replace("\\", "/").split())


def sizes(model: Portable) -> Iterator[tuple[str, str]]:
    config = model.config
    yield "architecture", config.architecture
    yield "parameters", f"{config.n_params:,}"
    yield "layers x width", f"{config.n_layer} x {config.n_embd}"
    yield "heads", f"{config.n_head}" + (f", {config.kv_heads} of keys and values" * (config.kv_heads < config.n_head))
    yield "context", f"{config.n_ctx} tokens"
    yield "vocabulary", f"{config.vocab_size:,} ids"


def training(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for label, name in (
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
        value = source_of(facts) if name == "data_source" else facts.get(name, "")
        if isinstance(value, int | float):
            yield label, f"{value:,}"
        elif value:
            yield label, one_line(PurePath(value).name if name == "tokenizer" else value)


def stories(facts: Mapping[str, Any]) -> str:
    count = facts.get("val_stories")
    return f"{count:,} " if isinstance(count, int) else ""


def usage(model: Portable, repo: str) -> str:
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


def table(rows: Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value.replace('|', '/')} |" for label, value in rows)])
