"""What the lab page may send: every field with its type and its range, checked before any work begins."""

from typing import Annotated

import msgspec
from msgspec import Meta

from tinystories.serve.requests import SamplingNumbers, TokenId

MAX_LAB_IDS = 32_768  # the number that a model takes, n_ctx, is checked afterwards
MAX_TOP = 40
MAX_POSITIONS = 64  # of the logit lens, at once
MAX_HEADS = 4096  # switched off at once
MAX_SPLIT_CHARS = 20_000  # of a text for several tokenizers

Ids = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_LAB_IDS)]
Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(max_length=255)]
Step = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Top = Annotated[int, Meta(ge=1, le=MAX_TOP)]


class TokensRequest(msgspec.Struct, kw_only=True):
    """A text, and ids that follow it."""

    text: str
    append: Annotated[list[TokenId], Meta(max_length=MAX_LAB_IDS)] = []


class IdsRequest(msgspec.Struct, kw_only=True):
    """1 to n_ctx ids; the first is END where a story begins."""

    ids: Ids


class NextRequest(SamplingNumbers, kw_only=True):
    """The token after some ids. `logits`: send them all, so that the page can apply settings itself."""

    ids: Ids
    top: Top = 12
    logits: bool = False


class StepRequest(SamplingNumbers, kw_only=True):
    """Draw the token after some ids with number `index` of the uniform numbers of a seed."""

    ids: Ids
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    index: Annotated[int, Meta(ge=0, le=MAX_LAB_IDS)]


class AttentionRequest(msgspec.Struct, kw_only=True):
    """Without a layer: thumbnails of all heads. With one: its heads, or one of them."""

    ids: Ids
    layer: Index | None = None
    head: Index | None = None


class LensRequest(msgspec.Struct, kw_only=True):
    """The logit lens of the positions `start` to `stop` - 1."""

    ids: Ids
    start: Index
    stop: Index
    top: Top = 5


class AblateRequest(msgspec.Struct, kw_only=True):
    """Pairs (layer, head) to switch off."""

    ids: Ids
    heads: Annotated[list[tuple[Index, Index]], Meta(max_length=MAX_HEADS)]


class Side(msgspec.Struct, kw_only=True):
    """A text and the model that reads it: by default the served one, otherwise the newest or a certain checkpoint of a
    run, or the model of --compare."""

    text: str = ""
    run: Name | None = None
    step: Step | None = None
    compare: bool = False


class CompareRequest(msgspec.Struct, kw_only=True):
    """Two sides, and how many of the likeliest next tokens of each."""

    a: Side
    b: Side
    top: Top = 10


class ScoreRunRequest(msgspec.Struct, kw_only=True):
    """A text for a checkpoint of a run, by default the newest."""

    text: str
    step: Step | None = None
    top: Top = 5


class QuizRequest(msgspec.Struct, kw_only=True):
    """A question of the quiz, from 0."""

    item: Index


class SplitRequest(msgspec.Struct, kw_only=True):
    """A text for the tokenizers, and another model whose tokenizer is shown, too."""

    text: Annotated[str, Meta(max_length=MAX_SPLIT_CHARS)]
    model: Side | None = None
