"""What tests do with an exported page in a browser."""

from pathlib import Path
from typing import Any

from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html.format import HTML

TIMEOUT_MS = 120_000
# Before the page's own program runs: count violations of the policy, and let a test hold the tokens of the newest story
# back, or deliver a message as the worker does. While tokens are held, the root element has the attribute data-held.
WATCH = """
window.violations = [];
addEventListener('securitypolicyviolation', ({ blockedURI, violatedDirective }) => {
  window.violations.push(`${violatedDirective}: ${blockedURI}`);
});
window.sent = [];
window.held = [];
window.allowed = Infinity;
const OriginalWorker = Worker;
window.Worker = class extends OriginalWorker {
  postMessage(message) {
    window.sent.push(message.kind);
    if (message.kind === 'tell') { window.newest = message.id; window.hold(); }
    super.postMessage(message);
  }
  set onmessage(receive) {
    window.deliver = (data) => receive({ data });
    super.onmessage = (event) => {
      if (event.data.text === undefined || event.data.id !== window.newest) receive(event);
      else if (window.allowed > 0) { window.allowed -= 1; receive(event); } else window.hold(() => receive(event));
    };
  }
};
window.hold = (...tokens) => {
  window.held = tokens.length ? [...window.held, ...tokens] : [];
  document.documentElement.toggleAttribute('data-held', window.held.length > 0);
};
window.allow = (n) => {
  window.allowed = n;
  while (window.held.length && window.allowed > 0) { window.allowed -= 1; window.held.shift()(); }
};
"""


def write_page(model: ModelBundle, path: Path) -> Path:
    """An export that is not run before it is kept: the tests here run it."""
    assert HTML.write is not None
    HTML.write(model, path, "int8")
    return path


def story_of(page: Any) -> str:
    return page.evaluate("document.querySelector('.words').innerText.replace(/\\s+/g, ' ').trim()")


def squeeze(text: str) -> str:
    return " ".join(text.split())


def tell(page: Any, seed: int | str = "", *, beginning: str = "", length: str = "long") -> str:
    """Tell a whole story, and return it."""
    page.get_by_label("How does the story begin?").fill(beginning)
    page.locator(".segments").get_by_text(length).click()
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Tell").click()
    page.get_by_role("button", name="Copy").wait_for()
    return story_of(page)


def start(page: Any, seed: int | str = "", *, beginning: str = "", n_tokens: int = 0) -> None:
    """Tell a long story of which only so many tokens come, until `window.allow` lets others through."""
    page.evaluate(f"window.allow({n_tokens})")
    page.get_by_label("How does the story begin?").fill(beginning)
    page.locator(".segments").get_by_text("long").click()
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Tell").click()
    page.locator("[data-held]").wait_for()


def finish(page: Any) -> str:
    """Let the rest of a story through, and return it."""
    page.evaluate("window.allow(Infinity)")
    page.get_by_role("button", name="Copy").wait_for()
    return story_of(page)


def settle(page: Any) -> None:
    """Return once the page has drawn what it knows."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


def bars_of(page: Any) -> list[int]:
    return [int(bar.get_attribute("data-id")) for bar in page.locator("button.bar").all()]


def wait_for_text(page: Any, text: str) -> None:
    """Wait until the pane shows what could come after a text."""
    page.locator(".tail", has_text=f"… {text} ▁").wait_for()
