"""A figure of the lab, saved in every form that it has buttons for."""

import contextlib
import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SVG = "{http://www.w3.org/2000/svg}"


@contextlib.contextmanager
def saved(page: Any, tools: Any, name: str, tmp_path: Path) -> Iterator[Path]:
    """Press a button that saves a file; yield where it is."""
    with page.expect_download() as download:
        tools.get_by_role("button", name=name, exact=True).click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    yield path


def run_python(code: str) -> dict[str, Any]:
    """Run the lines that a figure copies; return their variables, and what they print."""
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, variables)  # noqa: S102
    return variables | {"printed": printed.getvalue()}


def save_figure(
    page: Any, name: str, tmp_path: Path, *, has_picture: bool = True, n_texts: int = 5
) -> tuple[Any, list[list[str]], dict[str, Any]]:
    """Save a figure as SVG, PNG, CSV and JSON, and run its Python; return JSON, rows, and the Python's variables."""
    tools = page.locator(f"[data-figure='{name}']")
    tools.wait_for()
    if has_picture:
        with saved(page, tools, "SVG", tmp_path) as path:
            root = ElementTree.parse(path).getroot()
            assert root.tag == f"{SVG}svg"
            assert {(one.tail or "").strip() for one in root.iter()} == {""}, "no text is beside the elements"
            assert len(root.findall(f".//{SVG}text")) >= n_texts, "what is written in it is text"
            width, height = int(root.attrib["width"]), int(root.attrib["height"])
        with saved(page, tools, "PNG", tmp_path) as path:
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG")
            assert [int.from_bytes(data[i : i + 4], "big") for i in (16, 20)] == [2 * width, 2 * height]
            assert len(data) > 3000, "not an empty picture"
    else:
        assert tools.get_by_role("button", name="SVG", exact=True).count() == 0
    with saved(page, tools, "CSV", tmp_path) as path:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    with saved(page, tools, "JSON", tmp_path) as path:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    tools.get_by_role("button", name="Copy as Python").click()
    tools.get_by_text("Copied.").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    assert tools.locator("pre").inner_text().strip() == code.strip()
    return numbers, rows, run_python(code)
