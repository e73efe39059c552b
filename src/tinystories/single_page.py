"""Web pages in one file: ES modules joined into one script, and what a content security policy calls a script.

A page that is opened from disk cannot import files, and a policy with hashes allows no others.
"""

import base64
import hashlib
import json
import posixpath
import re
from pathlib import Path

# The forms of `import` and `export` that the modules of the pages use.
IMPORT = re.compile(r"""\bimport\s*(?:(?P<default>\w+)|\{(?P<names>[^}]*)\})\s*from\s*["'](?P<path>[^"']+)["'];?""")
EXPORT_LIST = re.compile(r"""\bexport\s*\{(?P<names>[^}]*)\}(?:\s*from\s*["'](?P<path>[^"']+)["'])?;?""")
EXPORT_DEFAULT = re.compile(r"\bexport\s+default\s+")
EXPORT = re.compile(r"^export\s+(?:const|class|(?:async )?function\*?)\s+(?P<name>\w+)", re.MULTILINE)
IMPORT_LATER = re.compile(r"""\bimport\(["'](?P<path>[^"']+)["']\)""")
RESIDUE = re.compile(r"^\s*(?:import|export)\b|\bimport\(", re.MULTILINE)
TAG = re.compile(r"</script|<!--", re.IGNORECASE)  # would end the script element, or change how it ends


def hash_source(text: str) -> str:
    """Return the source expression of an inline script or style in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def join_modules(root: Path, entry: str) -> str:
    """Return a module below a folder, and all that it imports, as one script: a function for each, in order of use.

    What it imports later, by `import()`, is in the script, too. `entry` is its path below `root`, as are the names of
    all modules in the script's table `modules`. The script runs as a module, as a classic script and in a worker.
    """
    parts: dict[str, str] = {}

    def add(path: str) -> None:
        if path in parts:
            return
        parts[path] = ""  # a cycle would meet the name before its code; the modules have none
        source = (root / path).read_text(encoding="utf-8")
        for match in (*IMPORT.finditer(source), *IMPORT_LATER.finditer(source), *EXPORT_LIST.finditer(source)):
            if match["path"]:
                add(resolve(path, match["path"]))
        del parts[path]
        parts[path] = wrap_module(path, source)

    add(entry)
    script = "'use strict';\nconst modules = {};\n" + "\n".join(parts.values())
    assert not TAG.search(script), f"{entry} could not be inside a page"
    return script


def resolve(importer: str, path: str) -> str:
    """Return the path below the root of a module that another one imports."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(importer), path))


def wrap_module(path: str, source: str) -> str:
    """Return a module as a function that is called once; its exports are kept in `modules`."""
    exports: dict[str, str] = {}  # what is exported, by its name outside

    def import_names(match: re.Match[str]) -> str:
        names = f"{{ default: {match['default']} }}" if match["default"] else f"{{{rename(match['names'], ': ')}}}"
        return f"const {names} = modules[{json.dumps(resolve(path, match['path']))}];"

    def import_later(match: re.Match[str]) -> str:
        return f"Promise.resolve(modules[{json.dumps(resolve(path, match['path']))}])"

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
    source = IMPORT_LATER.sub(import_later, source)
    source = EXPORT_LIST.sub(export_names, source)
    source = EXPORT_DEFAULT.sub(export_default, source)
    source = EXPORT.sub(export_one, source)
    assert not RESIDUE.search(source), f"{path} imports or exports in a form that `single_page` does not know"
    pairs = ", ".join(f"{outside}: {inside}" for outside, inside in exports.items())
    return f"(() => {{\n{source}\nmodules[{json.dumps(path)}] = {{ {pairs} }};\n}})();"


def rename(names: str, separator: str) -> str:
    """Return the names of an import with `separator` instead of `as`."""
    return re.sub(r"\s+as\s+", separator, names)
