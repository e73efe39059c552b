"""The lab's page as one file: its modules joined, its style and a recording inside, and nothing to load."""

import base64
import hashlib
import html
import json
import posixpath
import re
import zlib
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "page"
# The forms of `import` and `export` that the modules of the page use.
IMPORT = re.compile(r"""\bimport\s*(?:(?P<default>\w+)|\{(?P<names>[^}]*)\})\s*from\s*["'](?P<path>[^"']+)["'];?""")
EXPORT_LIST = re.compile(r"""\bexport\s*\{(?P<names>[^}]*)\}(?:\s*from\s*["'](?P<path>[^"']+)["'])?;?""")
EXPORT_DEFAULT = re.compile(r"\bexport\s+default\s+")
EXPORT = re.compile(r"^export\s+(?:const|class|(?:async )?function\*?)\s+(?P<name>\w+)", re.MULTILINE)
STYLE_SHEET = re.compile(r'<link rel="stylesheet" href="/page/([^"]+)">')
RESIDUE = re.compile(r"^\s*(?:import|export)\b|\bimport\(", re.MULTILINE)


def build_page(recording: dict[str, Any]) -> str:
    """Return an HTML page that shows a recording. Its policy allows its own script and style, and no request at all."""
    script, style = join_modules("lab.js"), join_styles("lab.html")
    assert "</script" not in script, "would end the script early"
    icon = base64.b64encode((PAGE / "icon.svg").read_bytes()).decode()
    policy = (
        f"default-src 'none'; script-src '{source_hash(script)}'; style-src '{source_hash(style)}';"
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


def source_hash(text: str) -> str:
    """Return what a policy calls an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def join_styles(document: str) -> str:
    """Return the style sheets of a document of the page, in its order."""
    names = STYLE_SHEET.findall((PAGE / document).read_text(encoding="utf-8"))
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names)


def join_modules(entry: str) -> str:
    """Return a module of the page and all that it imports as one script: a function for each, in order of use."""
    parts: dict[str, str] = {}

    def add(path: str) -> None:
        if path in parts:
            return
        parts[path] = ""  # a cycle would meet the name before its code; the modules have none
        source = (PAGE / path).read_text(encoding="utf-8")
        for match in (*IMPORT.finditer(source), *EXPORT_LIST.finditer(source)):
            if match["path"]:
                add(resolve(path, match["path"]))
        del parts[path]
        parts[path] = wrap_module(path, source)

    add(entry)
    return "const modules = {};\n" + "\n".join(parts.values())


def resolve(importer: str, path: str) -> str:
    """Return the path below the page's folder of a module that another one imports."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(importer), path))


def wrap_module(path: str, source: str) -> str:
    """Return a module as a function that is called once; its exports are kept in `modules`."""
    exports: dict[str, str] = {}  # what is exported, by its name outside

    def import_names(match: re.Match[str]) -> str:
        names = f"{{ default: {match['default']} }}" if match["default"] else f"{{{rename(match['names'], ': ')}}}"
        return f"const {names} = modules[{json.dumps(resolve(path, match['path']))}];"

    def export_names(match: re.Match[str]) -> str:
        for item in filter(None, (part.strip() for part in match["names"].split(","))):
            inside, _, outside = item.partition(" as ")
            origin = f"modules[{json.dumps(resolve(path, match['path']))}]." if match["path"] else ""
            exports[outside.strip() or inside] = origin + inside.strip()
        return ""

    def export_one(match: re.Match[str]) -> str:
        exports[match["name"]] = match["name"]
        return match.group().removeprefix("export").lstrip()

    def export_default(_match: re.Match[str]) -> str:
        exports["default"] = "default_export"
        return "const default_export = "

    source = IMPORT.sub(import_names, source)
    source = EXPORT_LIST.sub(export_names, source)
    source = EXPORT_DEFAULT.sub(export_default, source)
    source = EXPORT.sub(export_one, source)
    assert not RESIDUE.search(source), f"{path} imports or exports in a form that `single_file` does not know"
    pairs = ", ".join(f"{outside}: {inside}" for outside, inside in exports.items())
    return f"(() => {{\n{source}\nmodules[{json.dumps(path)}] = {{ {pairs} }};\n}})();"


def rename(names: str, separator: str) -> str:
    """Return the names of an import with `separator` instead of `as`."""
    return re.sub(r"\s+as\s+", separator, names)
