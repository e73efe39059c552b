"""The words of a trace as HTML: each token shaded by its surprise, the number below it, details on hover."""

import html
import math
from typing import TYPE_CHECKING

from tinystories.explain.token_text import token_text

if TYPE_CHECKING:
    from tinystories.explain.text_trace import TextTrace

MAX_BITS = 10.0  # surprise of the darkest shade
# Shades from no surprise to MAX_BITS, in equal steps: ColorBrewer's YlOrBr, which color-blind people can read too.
SHADES = ("#ffffe5", "#fff7bc", "#fee391", "#fec44f", "#fe9929", "#ec7014", "#cc4c02", "#993404", "#662506")
N_ALTERNATIVES = 4  # in the tooltip of a token


def shade(bits: float) -> tuple[str, str]:
    """Return the colors of the background and of the text for a surprise in bits; gray if it is NaN."""
    if math.isnan(bits):
        return "#e0e0e0", "#000000"
    position = min(max(bits / MAX_BITS, 0.0), 1.0) * (len(SHADES) - 1)
    low, high = SHADES[int(position)], SHADES[min(int(position) + 1, len(SHADES) - 1)]
    mix = position - int(position)
    channels = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    red, green, blue = (round(a + (b - a) * mix) for a, b in channels)
    return f"#{red:02x}{green:02x}{blue:02x}", text_color(red / 255, green / 255, blue / 255)


def text_color(red: float, green: float, blue: float) -> str:
    """Return black or white, which has the higher contrast to a background (WCAG 2); channels are 0..1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def words_to_html(trace: "TextTrace") -> str:
    """Return the tokens of a trace as an HTML fragment without scripts; its colors do not depend on the page's."""
    rows = [
        '<div style="font-family:sans-serif;line-height:2.6;background:#ffffff;color:#000000;padding:0.5em">',
        '<div style="font-size:80%;line-height:1.5">Surprise in bits (1 bit: probability 50 %; 10 bits: 0.1 %): ',
        "".join(chip(f"{bits}", bits, "") for bits in (0, 2, 4, 6, 8, 10)),
        f" mean {trace.mean_bits:.2f}</div>",
    ]
    for i, (text, bits) in enumerate(zip(trace.texts, trace.surprise_bits.tolist(), strict=True)):
        label = trace.labels[i].removeprefix("·") or "·"
        rows.append(chip(label, bits, describe(trace, i), has_space=text.startswith(" ")))
        if text.endswith("\n"):
            rows.append("<br>")
    return "".join([*rows, "</div>"])


def describe(trace: "TextTrace", i: int) -> str:
    """Return the tooltip of token i: id, probability, rank, and what the model found most likely."""
    token = f"token {i}, id {trace.ids[i]}"
    if i == 0:
        return f"{token}: given"
    predictions = trace.predictions
    likely = zip(predictions.top_ids[0, i - 1], predictions.top_probs[0, i - 1], strict=True)
    guesses = [f"{token_text(trace.tokenizer, int(guess))!r} {prob:.1%}" for guess, prob in likely][:N_ALTERNATIVES]
    probability = f"probability {predictions.next_probs[0, i - 1]:.2%}, rank {trace.ranks[i]}"
    return f"{token}: {probability}; most likely: {', '.join(guesses)}"


def chip(label: str, bits: float, tooltip: str, *, has_space: bool = False) -> str:
    """Return one token: its label, with the surprise below it."""
    background, color = shade(bits)
    number = "" if math.isnan(bits) or not tooltip else f"{bits:.1f}"
    margin = "0.35em" if has_space else "1px"
    return (
        f'<span title="{html.escape(tooltip)}" style="display:inline-block;line-height:1.1;text-align:center;'
        f"vertical-align:top;background:{background};color:{color};margin:2px 0 2px {margin};padding:2px 3px;"
        f'border-radius:3px">{html.escape(label)}<br><span style="font-size:65%">{number}&nbsp;</span></span>'
    )
