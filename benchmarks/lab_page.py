"""How fast the lab's page is: first paint, from a key to the bars, from a slider to the bars, and its size.

Starts `tinystories serve` with a model and drives Debian's chromium; times are taken in the page, from the key's own
time stamp to the frame that shows the answer. Prints medians, and the middle half of the measurements. Needs the extra
[serve] and playwright (`make test-browser` installs it).

    python benchmarks/lab_page.py
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

from script import run_main

from tinystories.errors import UserError

SENTENCE = "Lily had a red ball. Tom took the ball and ran to the park. "
# Times from an event to the frame in which a selector has what was waited for. `done` is JavaScript.
WATCH = """(selector) => {
  window.times = [];
  let start = null;
  for (const name of ['keydown', 'input']) {
    addEventListener(name, (event) => { start ??= event.timeStamp; }, { capture: true });
  }
  const seen = () => {
    const one = document.querySelector(selector);
    return one && (one.dataset.text ?? one.textContent);
  };
  let before = seen();
  new MutationObserver(() => {
    const now = seen();
    if (start === null || !now || now === before) return;
    before = now;
    const began = start;
    start = null;
    requestAnimationFrame(() => setTimeout(() => window.times.push(performance.now() - began)));
  }).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
}"""
BUDGETS = {"first paint of /lab": 500, "first paint of /": 500, "key to bars": 150, "slider to bars": 150}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="model directory (default: the bundled storyteller)")
    parser.add_argument("--tokens", type=int, default=256, help="length of the text")
    parser.add_argument("--keys", type=int, default=40, help="keys pressed for each measurement")
    parser.add_argument("--loads", type=int, default=15, help="times that a page is loaded")
    options = parser.parse_args()
    executable = shutil.which("chromium")
    if executable is None:
        raise UserError("this benchmark needs chromium; run: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("this benchmark needs playwright; run: pip install playwright") from None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    with serving(options.model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        results: dict[str, list[float]] = {}
        for path in ("/lab", "/"):
            results[f"first paint of {path}"] = [load_page(browser, url + path)[0] for _ in range(options.loads)]
        sizes = {path: load_page(browser, url + path)[1:] for path in ("/lab", "/")}
        text = text_of(options.tokens)
        results["key to bars"], requests = type_keys(browser, url, "next", ".bars", text, options.keys)
        results |= {f"  of it: {name}": times for name, times in requests.items()}
        results["key to words"] = type_keys(browser, url, "words", ".total", text, options.keys)[0]
        results["slider to bars"] = move_slider(browser, url, text, options.keys)
        browser.close()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}"
    print(f"{machine}; {options.tokens} tokens")
    for name, times in results.items():
        low, _, high = quantiles(times, n=4)
        budget = f"  (at most {BUDGETS[name]} ms)" if name in BUDGETS else ""
        print(f"{name:28} {median(times):7.1f} ms   {low:.1f} to {high:.1f}{budget}")
    for path, (n_bytes, n_sent) in sizes.items():
        print(
            f"{path + ' with all it loads':28} {n_bytes / 1000:7.1f} kB  (at most 250 kB), {n_sent / 1000:.1f} kB sent"
        )
    medians = {name.strip(): round(median(times), 1) for name, times in results.items()}
    print(json.dumps(medians | {"bytes": sizes["/lab"][0], "bytes_sent": sizes["/lab"][1]}))


@contextlib.contextmanager
def serving(model: list[str]) -> Iterator[str]:
    """Yield the URL of a server that runs inside the block."""
    command = [sys.executable, "-m", "tinystories", "serve", *model, "--port", "0", "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise UserError("the server did not start; run it by hand: tinystories serve")
        yield url
        process.terminate()


def text_of(n_tokens: int) -> str:
    """A text of about so many tokens of the bundled tokenizer, END included."""
    from tinystories.checkpoint import BUNDLED_MODEL
    from tinystories.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    ids = tokenizer.encode(SENTENCE * (n_tokens // 10 + 1))
    return tokenizer.decode(ids[: n_tokens - 1])


def load_page(browser: Any, url: str) -> tuple[float, int, int]:
    """First contentful paint (ms) of a page without anything in the cache; bytes of all that it loaded, and as sent."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.locator("h1").wait_for()
    page.wait_for_load_state("networkidle")
    paint, n_bytes, n_sent = page.evaluate(
        """() => [performance.getEntriesByName('first-contentful-paint')[0].startTime,
            ...['decodedBodySize', 'encodedBodySize'].map((size) =>
                [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
                    .filter((one) => !one.name.includes('/lab/api')).reduce((sum, one) => sum + one[size], 0))]"""
    )
    context.close()
    return paint, n_bytes, n_sent


def open_pane(browser: Any, url: str, pane: str, text: str, selector: str) -> Any:
    """Open a pane of the lab with a text, wait for its figure and watch what the selector selects."""
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.goto(f"{url}/lab#p={pane}&t=A")
    ready = {"next": "button.bar", "words": ".total b >> nth=2"}[pane]
    page.locator(ready).first.wait_for()
    page.get_by_label("Your text").fill(text)
    page.locator(ready).first.wait_for()
    page.wait_for_load_state("networkidle")
    page.evaluate(WATCH, selector)
    return page


def type_keys(
    browser: Any, url: str, pane: str, selector: str, text: str, n_keys: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Times (ms) from a key to the new figure, and those of the requests among them."""
    page = open_pane(browser, url, pane, text, selector)
    page.get_by_label("Your text").focus()
    page.keyboard.press("Control+End")
    page.evaluate("performance.clearResourceTimings()")
    for i in range(n_keys):
        page.keyboard.press(" the big dog"[i % 12])
        wait_for_count(page, i + 1)
    requests = page.evaluate(
        """() => performance.getEntriesByType('resource').filter((one) => one.name.includes('/lab/api'))
            .map((one) => [one.name.split('/').at(-1), one.duration])"""
    )
    times = page.evaluate("times")
    page.context.close()
    names = sorted({name for name, _ in requests})
    return times, {f"request {name}": [ms for one, ms in requests if one == name] for name in names}


def move_slider(browser: Any, url: str, text: str, n_moves: int) -> list[float]:
    """Times (ms) from a move of the temperature to the new bars."""
    page = open_pane(browser, url, "next", text, "output[for=temp]")  # drawn with the bars
    slider = page.get_by_role("slider", name="Temperature")
    slider.focus()
    page.evaluate("times.length = 0")
    for i in range(n_moves):
        page.keyboard.press("ArrowRight" if i % 20 < 10 else "ArrowLeft")
        wait_for_count(page, i + 1)
    times: list[float] = page.evaluate("times")
    page.context.close()
    return times


def wait_for_count(page: Any, n: int) -> None:
    """Wait until so many times were taken."""
    for _ in range(3000):
        if page.evaluate("times.length") >= n:
            return
        page.wait_for_timeout(10)
    raise UserError(f"the page did not answer key {n} within 30 seconds")


if __name__ == "__main__":
    run_main(main)
