"""Model cards for the Hugging Face Hub, built from the provenance in a model's config.json."""

import json
from collections.abc import Mapping
from typing import Any

from tinystories.data.text_loss import describe_loss
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

BITS_PER_BYTE_NOTE = (
    "Bits per byte are what it takes on average to write down a byte of a story that the model has not seen, by its"
    " predictions; less is better, and models of different vocabularies can be compared by them."
)
INTENDED_USE = "For play, teaching and research on small language models: it writes {what}, or goes on with one."


def build_model_card(model: ModelBundle, repo: str = "OWNER/NAME", license: str = "") -> str:
    """Return the README.md of `repo`: YAML front matter and Markdown. Facts missing from provenance are omitted.

    `license`: license of the weights, by the Hub's identifier (mit, apache-2.0, cc0-1.0, ...); "" omits it.
    """
    provenance, config = model.provenance, model.config
    dataset = find_dataset_repo(provenance)
    is_english = dataset in DATASETS or provenance.get("data_source") == "sample"
    text_kind = "short English stories for small children" if is_english else "short texts like those it was trained on"
    sections = [
        render_front_matter(dataset, license, is_english),
        f"# A storyteller of {config.n_params / 1e6:,.1f} million parameters",
        "A small language model that writes stories, made with TinyStories GPT (the Python package `tinystories-gpt`).",
        "## The model\n\n" + render_table(describe_sizes(model)),
    ]
    if training_rows := list(describe_training(provenance)):
        sections.append("## Training\n\n" + render_table(training_rows))
    if dataset in DATASETS:
        description, data_license = DATASETS[dataset]
        sections.append(f"The data: {description} by [{PAPER_NAME}]({PAPER_URL}); licence: {data_license}.")
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
