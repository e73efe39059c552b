"""Many stories to ids at once: gigatoken where it is known to give the same ids, else `tokenizers`."""

import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import END, Tokenizer

log = logging.getLogger(__name__)

Encoded = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
Encode = Callable[[Sequence[bytes]], Encoded]

SLICE = 1024  # stories per call of `tokenizers`, whose results take 100 bytes a token

# Characters outside of these blocks are left to `tokenizers`: gigatoken splits by Unicode 17, tiktoken and `tokenizers`
# by 16, so that letters and digits new in 17 end words differently. In these blocks the three agree on every character.
UNSURE = re.compile(
    "[^\0-\u052f\u2000-\u2bff\u3000-\u9fff\uac00-\ud7a3\ufe00-\ufe0f\uff00-\uffef\U0001f000-\U0001faff]"
)

PROBES = (
    f"a {END} b{END}",
    "don't  I'LL 'tis   \n\n \t x\r\ny\x00z \x1c\x85\xa0\u2028\u3000 end \n",
    "naïve café Ⅷ ½ ² ١٢٣ 你好，世界 \U0001f600\u200d\U0001f525 e\u0301 \ufffd\ufeff\U0010ffff",
    "zz" * 40 + " " * 30 + "\n" * 9 + "0123456789" * 3 + "!?" * 20,
)


def bulk_encoder(tokenizer: Tokenizer, examples: Sequence[bytes]) -> Encode:
    """A function from UTF-8 stories to (the ids of all in a row, the number of ids of each), using all cores.

    The one place where the fast library is chosen: only for GPT-2's kind of tokenizer, and only if it gives the ids
    of `tokenizers` for the probes and the examples.
    """
    fast = gigatoken_encoder(tokenizer)
    if isinstance(fast, str):
        log.info("tokenising with `tokenizers`, which is slower: %s", fast)
        return tokenizers_encoder(tokenizer)
    exact = tokenizers_encoder(tokenizer)
    texts = [text for text in (*(probe.encode() for probe in PROBES), *examples) if is_sure(text)]
    (ids, counts), (exact_ids, exact_counts) = fast(texts), exact(texts)
    if not (np.array_equal(ids, exact_ids) and np.array_equal(counts, exact_counts)):
        log.warning("tokenising with `tokenizers`, which is slower: gigatoken gives other ids here")
        return exact
    log.info("tokenising with gigatoken")
    return lambda stories: mixed(stories, fast, exact)


def is_sure(story: bytes) -> bool:
    return story.isascii() or UNSURE.search(story.decode()) is None


def mixed(stories: Sequence[bytes], fast: Encode, exact: Encode) -> Encoded:
    """The sure stories by `fast`, the others by `exact`, in the order of the stories."""
    sure = np.fromiter(map(is_sure, stories), bool, len(stories))
    if sure.all():
        return fast(stories)
    counts = np.empty(len(stories), np.int64)
    parts = [fast(list(itertools.compress(stories, sure))), exact(list(itertools.compress(stories, ~sure)))]
    counts[sure], counts[~sure] = parts[0][1], parts[1][1]
    ids = np.empty(counts.sum(), np.uint32)
    of_sure = np.repeat(sure, counts)
    ids[of_sure], ids[~of_sure] = parts[0][0], parts[1][0]
    return ids, counts


def tokenizers_encoder(tokenizer: Tokenizer) -> Encode:
    def encode(stories: Sequence[bytes]) -> Encoded:
        ids = [np.empty(0, np.uint32)]
        counts: list[int] = []
        for start in range(0, len(stories), SLICE):
            rows = tokenizer.encode_batch([story.decode() for story in stories[start : start + SLICE]])
            counts.extend(map(len, rows))
            ids.extend(np.array(row, np.uint32) for row in rows)
        return np.concatenate(ids), np.array(counts, np.int64)

    return encode


def gigatoken_encoder(tokenizer: Tokenizer) -> Encode | str:
    """The fast encoder, or why there is none."""
    parts = tokenizer.parts
    model, pre = parts["model"], parts["pre_tokenizer"]
    plain_model = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    if not (tokenizer.lossless and plain_model and pre.get("use_regex", True)):
        return "gigatoken was verified for byte-level BPE with GPT-2's split only"
    if not all(token["special"] for token in parts["added_tokens"]):
        return "the tokenizer has added tokens that stand for ordinary text"
    try:
        import awkward  # type: ignore[import-untyped]
        import gigatoken
    except ImportError:
        return "gigatoken is not installed (pip install 'tinystories-gpt[train]')"
    # Without its special tokens, so that one written in a story is text; ids stay what the model says.
    backend = gigatoken.Tokenizer.from_json(json.dumps({**parts, "added_tokens": [], "post_processor": None}))

    def encode(stories: Sequence[bytes]) -> Encoded:
        if not stories:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        rows = backend.encode_batch(list(stories))
        return np.asarray(awkward.flatten(rows)), np.asarray(awkward.num(rows))

    return encode
