"""A trace of a text: words, labels, HTML, JSON, pictures."""

import itertools
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import tinystories
from tinystories import TextTrace, UserError
from tinystories.checkpoint import BUNDLED_MODEL, read_model
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.engine.trace.model import TraceModel
from tinystories.explain import drawing, pictures
from tinystories.explain.text_trace import trace_text
from tinystories.explain.token_text import token_label, token_text
from tinystories.explain.words_html import SHADES, shade

ODD = "Tim's 🦊 & <b>\n\n$5 \x07é"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model() -> TraceModel:
    return TraceModel.load(read_model(BUNDLED_MODEL))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def story(model: TraceModel, tokenizer: Tokenizer) -> TextTrace:
    return trace_text(model, tokenizer, "Once upon a time, there was a dog. The dog")


def test_texts_and_labels_name_every_token(story: TextTrace) -> None:
    assert story.texts[:5] == (END, "Once", " upon", " a", " time")
    assert story.labels[:5] == ("END", "Once", "·upon", "·a", "·time")
    assert "".join(story.texts[1:]) == "Once upon a time, there was a dog. The dog"
    assert story.ids.shape == story.surprise_bits.shape == story.ranks.shape == (len(story.texts),)


@pytest.mark.parametrize(
    ("text", "label"), [(" dog", "·dog"), ("\n", "↵"), ("\t", "⇥"), ("é"[:1], "é"), ("\x07", "\\x07")], ids=repr
)
def test_labels_show_white_space_and_control_characters(tokenizer: Tokenizer, text: str, label: str) -> None:
    assert "".join(token_label(tokenizer, token) for token in tokenizer.encode(text)) in (label, "\\xc3\\xa9")


def test_labels_of_parts_of_a_character_and_of_special_ids(tokenizer: Tokenizer) -> None:
    assert "".join(token_label(tokenizer, token) for token in tokenizer.encode("🦊")) == "\\xf0\\x9f\\xa6\\x8a"
    assert token_text(tokenizer, tokenizer.encode("🦊")[0]) == "\N{REPLACEMENT CHARACTER}"
    assert token_label(tokenizer, tokenizer.end_id) == "END"
    assert token_label(tokenizer, 5000) == token_text(tokenizer, 5000) == "<5000>", "padding of the vocabulary"


def test_storyteller_traces_texts_and_ids() -> None:
    storyteller = tinystories.load(engine="cpu")
    text = "Lily had a red ball."
    trace = storyteller.trace(text)
    assert isinstance(trace, TextTrace)
    scores = storyteller.score(text)[:-1]  # without the END that closes a story
    assert [score.id for score in scores] == trace.ids[1:].tolist()
    bits = -np.array([score.logprob for score in scores]) / np.log(2)
    np.testing.assert_allclose(trace.surprise_bits[1:], bits, atol=0.3)  # int8 rounds activations
    assert trace.bits_per_byte == pytest.approx(trace.surprise_bits[1:].sum() / len(text))
    again = storyteller.trace(trace.ids)
    assert (again.hidden == trace.hidden).all()
    assert isinstance(trace.ablate([(0, 0)]), TextTrace)
    assert trace.ablate([(0, 0)]).labels == trace.labels


def test_texts_beyond_the_context_are_refused_or_cut(model: TraceModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"601 token ids .* 1 to 512 \(model.n_ctx\)"):
        trace_text(model, tokenizer, [423] * 601)
    assert len(trace_text(model, tokenizer, [423] * 601, window=True).ids) == 512


@pytest.mark.parametrize("ids", [[1.5], [[1, 2]], ["a"], [None]], ids=str)
def test_ids_that_are_not_integers_are_refused(model: TraceModel, tokenizer: Tokenizer, ids: list[object]) -> None:
    with pytest.raises(UserError, match="list of token ids"):
        trace_text(model, tokenizer, ids)  # type: ignore[arg-type]


class Chips(HTMLParser):
    """Collects tooltips and text; every tag must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "span", "br"}, tag
        if tag != "br":
            self.open.append(tag)
        if title := dict(attributes).get("title"):
            self.titles.append(title)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_notebooks_show_the_words_escaped(model: TraceModel, tokenizer: Tokenizer) -> None:
    trace = trace_text(model, tokenizer, ODD)
    chips = Chips()
    assert "&lt;<br>" in trace._repr_html_()
    assert "&amp;<br>" in trace._repr_html_()
    chips.feed(trace._repr_html_())
    chips.close()
    assert not chips.open
    assert len(chips.titles) == len(trace.ids)
    assert chips.titles[0] == "token 0, id 4095: given"
    assert f"rank {trace.ranks[3]}; most likely: " in chips.titles[3]
    for word in ("END", "Tim", "\\xf0", "&", "<", "$", "\\x07"):
        assert word in chips.text


def test_shades_are_the_same_for_all_who_see_and_their_text_is_readable() -> None:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    luminances = [luminance(color) for color in SHADES]
    assert luminances == sorted(luminances, reverse=True), "darker is more, also without color"
    for bits in [*np.arange(0, 12, 0.25).tolist(), float("nan")]:
        background, text = (luminance(color) for color in shade(bits))
        assert (max(background, text) + 0.05) / (min(background, text) + 0.05) > 4.5, bits


def test_json_holds_what_the_arrays_hold(story: TextTrace) -> None:
    data = json.loads(json.dumps(story.as_dict(top=2), allow_nan=False))
    assert data["tokens"][0] == {"id": 4095, "text": END, "surprise_bits": None, "rank": 0}
    assert data["tokens"][2]["surprise_bits"] == pytest.approx(story.surprise_bits[2], abs=1e-4)
    assert [stage["name"] for stage in data["stages"]] == ["embedding", *(f"layer {i}" for i in range(6))]
    assert data["stages"][-1]["top"][3][0]["text"] == " time"
    assert len(data["stages"][0]["top"][0]) == 2
    assert data["stages"][-1]["next_rank"] == [*story.ranks[1:].tolist(), 0]


def test_json_of_an_empty_text_has_no_nan(model: TraceModel, tokenizer: Tokenizer) -> None:
    data = json.loads(json.dumps(trace_text(model, tokenizer, "").as_dict(), allow_nan=False))
    assert data["mean_bits"] is data["bits_per_byte"] is None


@pytest.mark.extended
@pytest.mark.parametrize("text", ["", ODD, "Once upon a time there was a dog.\n" * 12], ids=["empty", "odd", "long"])
def test_pictures_of_any_text(model: TraceModel, tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    """Warnings are errors: matplotlib warns of characters that its font does not have."""
    trace = trace_text(model, tokenizer, text)
    paths = trace.save_pictures(tmp_path / "new" / "folder", layer=1, head=2)
    assert [path.name for path in paths] == ["words.png", "attention.png", "attention-1-2.png", "lens.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


@pytest.mark.parametrize(
    "text", ["The dog saw a cat, a very, very big cat.\n\nThen they ran home.", "x" * 200 + " y\n"]
)
def test_words_wrap_at_words_and_newlines(model: TraceModel, tokenizer: Tokenizer, text: str) -> None:
    trace = trace_text(model, tokenizer, text)
    lines = pictures.wrap_tokens(trace, 200)
    assert [i for line in lines for i, *_ in line] == list(range(len(trace.ids)))
    for line in lines:
        assert line[0][1] == 0
        assert all(x + width <= 200 for _, x, width in line)
        assert all(a[1] + a[2] < b[1] for a, b in itertools.pairwise(line)), "chips do not overlap"
    starts = [line[0][0] for line in lines[1:]]
    if "x" not in text:
        assert {trace.texts[i - 1] for i in starts if not trace.texts[i].startswith(" ")} == {"\n"}


def test_characters_without_a_glyph_are_named() -> None:
    assert drawing.drawable("é·↵ 🦊龍") == "é·↵ U+1F98AU+9F8D"


def test_head_to_draw_attends_most_to_others(story: TextTrace) -> None:
    layer, head = pictures.select_head(story, None, None)
    elsewhere = 1 - story.attention[:, :, 1:, 0] - story.attention.diagonal(axis1=2, axis2=3)[:, :, 1:]
    assert np.unravel_index(elsewhere.sum(-1).argmax(), (6, 6)) == (layer, head)
    assert pictures.select_head(story, 5, None) == (5, int(elsewhere[5].sum(-1).argmax()))
    assert pictures.select_head(story, None, 4) == (int(elsewhere[:, 4].sum(-1).argmax()), 4)
    assert pictures.select_head(story, 5, 4) == (5, 4)
    for layer, head in ((6, None), (None, 6), (-1, 0)):
        with pytest.raises(UserError, match="does not exist"):
            pictures.select_head(story, layer, head)


def test_thumbnails_keep_single_bright_cells() -> None:
    attention = np.zeros((250, 250), dtype=np.float32)
    attention[100, 37] = 0.9
    assert pictures.shrink(attention, 96).shape == (96, 96)
    assert pictures.shrink(attention, 96).max() == np.float32(0.9)
    assert pictures.shrink(attention, 300) is attention


def test_without_matplotlib_one_line_says_what_to_install(
    story: TextTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pictures need matplotlib.*pip install matplotlib"):
        story.save_pictures(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "span" in story._repr_html_(), "words need no matplotlib"


def test_storyteller_module_does_not_import_matplotlib(story: TextTrace) -> None:
    import subprocess

    program = (
        "import sys, tinystories.generate.storyteller, tinystories.explain.pictures; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert story.labels
