"""What config.json records of a model, in words: for model cards and for pages."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from tinystories.data.source.hub import HubSource, parse_hub_name
from tinystories.data.source.resolve import get_named_sources
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle

PAPER_NAME, PAPER_URL = "Eldan and Li 2023", "https://arxiv.org/abs/2305.07759"
LIMITATIONS = (
    "It is small. Its stories may be incoherent, contradict themselves or repeat their training data; it knows next to"
    " nothing of the world, follows no instructions, and is not fit to give advice. Nothing filters what it writes:"
    " read a story before a child does."
)


class DatasetFacts(NamedTuple):
    """What a data set is, by the paper of PAPER_NAME, and its license."""

    description: str
    license: str


DATASETS = {
    "roneneldan/TinyStories": DatasetFacts("synthetic English stories for small children", "CDLA-Sharing-1.0"),
    "karpathy/tinystories-gpt4-clean": DatasetFacts("a cleaned part of TinyStories", "see source"),
}


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
