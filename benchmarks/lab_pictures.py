"""The pictures of the lab in docs/images: light, dark and on a phone. Needs what `benchmarks/lab_page.py` needs.

python benchmarks/lab_pictures.py [--runs DIR]

`--runs` names a folder with two runs, nano and nano-dropout, whose curves `lab-training` shows; without it, that one
is left out.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from lab_page import serving
from script import run_main

from tinystories.errors import UserError

TEXT = 'Lily had a red ball. Tom took the ball. Lily was sad. She said to Tom: "Give me the'
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1200, "height": 800}}
# Name: the state in the fragment, options of the browser, what shows that the page is complete, height (0: the screen).
PICTURES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "lab-words": ("p=words&c=35", DESK, "aside .choices button >> nth=3", 0),
    "lab-next": ("p=next", DESK, "button.bar >> nth=9", 1420),
    "lab-attention": ("p=attention&l=4&h=1", DESK, ".arcs path", 0),
    "lab-inside-dark": ("p=inside", DESK | {"color_scheme": "dark"}, ".chart circle", 0),
    "lab-next-phone": ("p=next", PHONE, "button.bar >> nth=9", 0),
    "lab-attention-phone": ("p=attention&l=4&h=1", PHONE | {"color_scheme": "dark"}, ".arcs path", 0),
    "lab-training": ("p=training&run=nano&with=nano-dropout&at=60", DESK, ".reading .token", 1490),
    "lab-experiments-dark": (
        "p=experiments&t=Once+upon+a+time,+there+was+a+little+boy+named"
        "&t2=Once+upon+a+time,+there+was+a+little+girl+named",
        DESK | {"color_scheme": "dark"},
        ".duel li >> nth=9",
        1310,
    ),
    "lab-quiz-phone": ("p=experiments&e=quiz&quiz=33&qi=1", PHONE, ".quiz .tools", 1330),
    "lab-tour": ("", DESK | {"viewport": {"width": 1200, "height": 540}}, ".guesses button", 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"pictures (default: all of {', '.join(PICTURES)})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images", help="folder")
    parser.add_argument("--runs", type=Path, help="folder of the runs that lab-training shows")
    options = parser.parse_args()
    if unknown := set(options.names) - PICTURES.keys():
        raise UserError(f"unknown picture {min(unknown)}; use {', '.join(PICTURES)}")
    executable = shutil.which("chromium")
    if executable is None:
        raise UserError("the pictures need chromium; run: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    names = options.names or [name for name in PICTURES if name != "lab-training" or options.runs]
    with serving([] if options.runs is None else ["--runs", str(options.runs)]) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name in names:
            take(browser, url, name, options.out / f"{name}.png")
            print(f"wrote {options.out / name}.png")
        browser.close()


def take(browser: Any, url: str, name: str, path: Path) -> None:
    """Take one picture."""
    state, settings, ready, height = PICTURES[name]
    context = browser.new_context(**settings, reduced_motion="reduce")
    page = context.new_page()
    text = "" if "&t=" in state else f"&t={quote_plus(TEXT)}"
    page.goto(f"{url}/lab#{state}{text}" if state else f"{url}/lab")
    page.locator(ready).first.wait_for(state="attached")
    if name == "lab-next":  # two paths, and a draw
        for key in "21rr12r ":
            text = page.locator(".bars").get_attribute("data-text")
            page.keyboard.press(key)
            while page.locator(".bars").get_attribute("data-text") in ("", text):
                page.wait_for_timeout(20)
        page.get_by_text("of the line from 0 to 1").wait_for()
    if name != "lab-training":  # which goes on listening
        page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)  # canvases are drawn after their data has come
    if height:
        page.set_viewport_size({"width": settings["viewport"]["width"], "height": height})
        page.wait_for_timeout(500)  # charts follow the size
    page.screenshot(path=path)
    context.close()


if __name__ == "__main__":
    run_main(main)
