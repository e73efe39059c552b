"""The GPT model: token ids in, hidden states and logits out. Independent of files, text and devices."""

from tinystories.model.cache import KVCache
from tinystories.model.gpt import GPT

__all__ = ["GPT", "KVCache"]
