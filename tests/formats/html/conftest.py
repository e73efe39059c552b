"""A model to export; and exported pages in Debian's chromium, opened from disk with the network off."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import TIMEOUT_MS, WATCH, write_page
from format_helpers import Build
from page_helpers import OWN_SETTINGS

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.formats.bundle import ModelBundle


@pytest.fixture
def model(portable: Build) -> ModelBundle:
    return dataclasses.replace(portable("qwen3", True), sampling=OWN_SETTINGS)


@pytest.fixture(scope="session")
def bundled_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(ModelBundle.read(BUNDLED_MODEL), tmp_path_factory.mktemp("page") / "the story.html")


@pytest.fixture(scope="session")
def storyteller() -> tinystories.Storyteller:
    return tinystories.load(engine="cpu", threads=1)


@pytest.fixture
def open_file(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file, with the network off. Afterwards it has asked for nothing but itself and its worker, not violated
    its policy, and written no errors to the console."""
    contexts, pages = [], []

    def start(path: Path, fragment: str = "", **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1000, "height": 900}, "offline": True} | options))
        context.set_default_timeout(TIMEOUT_MS)
        context.add_init_script(WATCH)
        contexts.append(context)
        page = context.new_page()
        requests: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message) or dialog.dismiss())
        pages.append((page, path.as_uri(), requests, errors))
        page.goto(path.as_uri() + fragment)
        return page

    yield start
    for page, address, requests, errors in pages:
        assert page.evaluate("window.violations") == []
        assert [url for url in requests if not url.startswith((address, "blob:", "data:"))] == []
        assert errors == []
    for context in contexts:
        context.close()
