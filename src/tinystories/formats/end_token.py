"""Which of another program's tokens becomes END. The vocabulary does not change: one of its own tokens is renamed."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinystories.checkpoint import read_json
from tinystories.data.build_tokenizer import load_gpt2
from tinystories.data.tokenizer import END, Tokenizer, read_tokenizer_json, sanitize
from tinystories.errors import UserError, quoted
from tinystories.formats.tokenizer_conversion import TOKEN_FLAGS, parse_merges

log = logging.getLogger(__name__)

# What code that walks malformed JSON may raise.
MALFORMED_ERRORS = (TypeError, KeyError, AttributeError, ValueError, IndexError, RecursionError)
# Names of tokens that begin or end a text, for files that do not say which of their tokens do.
COMMON_NAMES = [END, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]"]
COMMON_NAMES += ["</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]"]
CONTROL_NAME = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # of vocabularies without a list of special tokens

Candidate = tuple[str, object]  # where a file names a token that begins or ends a text, and its id or name


def read_tokenizer_text(path: Path) -> str:
    """Return the JSON of a --tokenizer: GPT-2's if it is `gpt2`, otherwise a file or a folder that contains one."""
    return load_gpt2().json_text if str(path) == "gpt2" else read_tokenizer_json(path)


def read_candidates(folder: Path) -> Iterator[Candidate]:
    """Yield the tokens that a Hugging Face folder says begin or end a text, in order of preference.

    They are ids in config.json and generation_config.json, names in tokenizer_config.json and special_tokens_map.json.
    BOS comes first, because it is what precedes a text.
    """
    for name, keys in (
        ("config.json", ("bos_token_id", "eos_token_id")),
        ("generation_config.json", ("bos_token_id", "eos_token_id")),
        ("tokenizer_config.json", ("bos_token", "eos_token")),
        ("special_tokens_map.json", ("bos_token", "eos_token")),
    ):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        for key in keys:
            value = settings.get(key)
            if isinstance(value, list) and value:
                value = value[0]  # a model may end a text with any of several tokens
            if isinstance(value, dict):
                value = value.get("content")
            if value is not None:
                yield f"{key} of {name}", value


def adapt_tokenizer(text: str, candidates: Iterable[Candidate], vocab_size: int, where: str) -> Tokenizer:
    """Load another program's tokenizer.json (`text`) for a model of `vocab_size` ids; one of its tokens becomes END.

    That is the first of `candidates` which is a special token, else a special token of a common name. A candidate that
    is not a special token is skipped with a warning. Special tokens for which the model has no embedding are dropped:
    encoding a text never produces them. `UserError`, naming `where`, if no token can be END.
    """
    try:
        parts = json.loads(text)
        added_tokens = parts.get("added_tokens") or []
        parts["added_tokens"] = [t for t in added_tokens if t["id"] < vocab_size or not t["special"]]
        if dropped := [t["content"] for t in added_tokens if t["id"] >= vocab_size and t["special"]]:
            log.warning("%s: the model has no embedding of %s; left out", where, ", ".join(map(quoted, dropped[:5])))
        end_id = find_end_id(parts, candidates, where)
        has_room = max(list_token_names(parts), default=-1) + 1 < vocab_size
    except MALFORMED_ERRORS as error:
        raise UserError(f"{where} is not a Hugging Face tokenizer: {sanitize(error)}") from None
    if end_id is not None:
        return set_end_token(json.dumps(parts, ensure_ascii=False), end_id, where)
    if not has_room:
        raise UserError(
            f"{where}: no special token can end stories; set bos_token_id or eos_token_id in config.json to the id of"
            " the token that begins or ends a text"
        )
    log.warning("%s: no special token can end stories; %s is a new one, which the model has not learned", where, END)
    return Tokenizer(json.dumps(parts, ensure_ascii=False), where)


def find_end_id(parts: Mapping[str, Any], candidates: Iterable[Candidate], where: str) -> int | None:
    """Return the id of the token that becomes END (see `adapt_tokenizer`); None if there is none."""
    names = list_token_names(parts)
    ids = {name: i for i, name in names.items()}
    added_ids = {token["id"] for token in parts["added_tokens"]}
    merged = {part for left, right in parse_merges(parts["model"]) for part in (left, right, left + right)}

    def is_special(i: int) -> bool:
        is_control = i in added_ids or CONTROL_NAME.fullmatch(names.get(i, "")) is not None
        return i in names and is_control and names[i] not in merged

    skipped: list[str] = []
    for source, value in candidates:
        i = value if type(value) is int else ids.get(value, -1) if isinstance(value, str) else -1
        if is_special(i):
            if skipped:
                log.warning("%s: %s; %s, %s, ends stories instead", where, skipped[0], source, quoted(names[i]))
            return i
        skipped.append(f"{source} is {quoted(value)}, which is not a special token of the tokenizer")
    for name in COMMON_NAMES:
        if is_special(i := ids.get(name, -1)):
            if skipped:
                log.warning("%s: %s; %s ends stories instead", where, skipped[0], quoted(name))
            return i
    if skipped:
        log.warning("%s: %s", where, skipped[0])
    return None


def set_end_token(text: str, end_id: int, where: str) -> Tokenizer:
    """Load another program's tokenizer.json (`text`), renaming its token `end_id` to END.

    If another token is already called END, the two swap names. The post-processor, which adds special tokens around a
    text, is dropped. `UserError`, prefixed with `where`, if `text` is not a tokenizer or has no token `end_id`.
    """
    try:
        parts = json.loads(text)
        parts.setdefault("added_tokens", [])
        old_name = rename_end_token(parts, end_id)
        added_tokens = {token["id"]: token for token in parts["added_tokens"]}
        added_tokens[end_id] = added_tokens.get(end_id, dict.fromkeys(TOKEN_FLAGS, False)) | {
            "id": end_id,
            "content": END,
            "special": True,
        }
        parts["added_tokens"] = [added_tokens[i] for i in sorted(added_tokens)]
        parts["post_processor"] = None
        tokenizer = Tokenizer(json.dumps(parts, ensure_ascii=False), where)
    except MALFORMED_ERRORS as error:
        raise UserError(f"{where} is not a Hugging Face tokenizer: {sanitize(error)}") from None
    if old_name is None or tokenizer.end_id != end_id:
        raise UserError(f"{where}: token {end_id}, which should end stories, does not exist")
    return tokenizer


def rename_end_token(parts: dict[str, Any], end_id: int) -> str | None:
    """Swap the names of token `end_id` and of the token called END, in place, in a parsed tokenizer.json.

    Return the old name of `end_id`, or None if it does not exist. `ValueError` if merges produce it from text.
    """
    model, added_tokens = parts["model"], parts["added_tokens"]
    old_name = list_token_names(parts).get(end_id)
    if old_name in (None, END):
        return old_name
    if any(old_name in (left, right, left + right) for left, right in parse_merges(model)):
        raise ValueError(f"token {end_id} is {quoted(old_name)}, which occurs in ordinary text; it cannot end a story")
    renames = {old_name: END, END: old_name}
    for token in added_tokens:
        token["content"] = renames.get(token["content"], token["content"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renames.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renames.get(name, name): i for name, i in model["vocab"].items()}
    if "unk_token" in model:
        model["unk_token"] = renames.get(model["unk_token"], model["unk_token"])
    return old_name


def list_token_names(parts: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each id in a parsed tokenizer.json."""
    vocab = parts["model"]["vocab"]
    is_list = isinstance(vocab, list)  # Unigram: [piece, score] by id
    names = {i: pair[0] for i, pair in enumerate(vocab)} if is_list else {i: name for name, i in vocab.items()}
    return names | {token["id"]: token["content"] for token in parts["added_tokens"]}
