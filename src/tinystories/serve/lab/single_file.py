"""The lab's page as one file: its modules joined, its style and a recording inside, and nothing to load."""

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

from tinystories.single_page import hash_source, join_modules

PAGE = Path(__file__).parents[1] / "page"
STYLE_SHEET = re.compile(r'<link rel="stylesheet" href="/page/([^"]+)">')


def build_page(recording: dict[str, Any]) -> str:
    """Return an HTML page that shows a recording. Its policy allows its own script and style, and no request at all."""
    script, style = join_modules(PAGE, "lab.js"), join_styles("lab.html")
    icon = base64.b64encode((PAGE / "icon.svg").read_bytes()).decode()
    policy = (
        f"default-src 'none'; script-src {hash_source(script)}; style-src {hash_source(style)};"
        " img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = zlib.compress(json.dumps(recording, allow_nan=False, separators=(",", ":")).encode(), 9)
    title = html.escape(f"The lab: {recording['text'][:60]}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:image/svg+xml;base64,{icon}">
<style>{style}</style>
</head>
<body class="laboratory">
<div id="app"></div>
<noscript><p class="noscript">This page works with JavaScript, which is switched off in this browser.</p></noscript>
<script id="recording" type="application/octet-stream">\
{base64.b64encode(data).decode()}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def join_styles(document: str) -> str:
    """Return the style sheets of a document of the page, in its order."""
    names = STYLE_SHEET.findall((PAGE / document).read_text(encoding="utf-8"))
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names)
