"""The model: tokens in, hidden states and logits out. Knows nothing of files, text or devices."""

from tinystories.model.cache import KVCache
from tinystories.model.gpt import GPT

__all__ = ["GPT", "KVCache"]
