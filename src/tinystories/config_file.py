"""Read settings from TOML files, presets and `--section.key value` flags, and write them as TOML.

Unknown names, wrong types and out-of-range values raise a `UserError` that names the setting. Reading needs only the
standard library.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tinystories.config import Config
from tinystories.errors import MAX_QUOTED_CHARS, UserError, quoted

T = TypeVar("T")

UNION_TYPES = (Union, UnionType)  # which of the two `int | Literal["auto"]` is depends on the Python version
MAX_TOML_CHARS = 10_000_000  # real files have a few thousand
PRESETS = ("nano", "small", "storyteller", "base", "seed-89m", "modern-89m")


def preset_path(name: str) -> Path:
    """Return the TOML file of a preset: inside an installed package, or in `configs/` of a checkout."""
    installed = Path(__file__).parent / "configs" / f"{name}.toml"
    return installed if installed.exists() else Path(__file__).parents[2] / "configs" / f"{name}.toml"


def load_config(file: str | Path | None, overrides: Mapping[str, str] | None = None) -> Config:
    """Load a TOML file or a preset, and apply overrides of the form `{"section.key": "value as text"}`."""
    settings: dict[str, Any] = read_toml(file) if file is not None else {}
    values = {name: parse_text(text, setting_type(name), name) for name, text in (overrides or {}).items()}
    where = str(file) if file is not None else "command line"
    return build_dataclass(Config, merge_overrides(settings, values, where), where)


def setting_type(dotted: str) -> Any:
    """Return the annotated type of the setting `section.key`. `UserError` if it does not exist."""
    section, _, key = dotted.partition(".")
    hints = get_type_hints(Config)
    if section not in hints or key not in get_type_hints(hints[section]):
        raise UserError(unknown_setting_message(dotted, setting_names()))
    return get_type_hints(hints[section])[key]


def merge_overrides(settings: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return TOML tables with `{"section.key": value}` applied; `where` names their file in error messages."""
    result = dict(settings)
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        table = result.get(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{where}: [{section}] must be a table of settings")
        result[section] = table | {key: value}
    return result


def read_toml(file: str | Path) -> dict[str, Any]:
    """Read a TOML file, or a preset by its name, as nested tables."""
    path = preset_path(str(file)) if str(file) in PRESETS else Path(file)
    try:
        with path.open(encoding="utf-8-sig") as stream:  # Windows editors put a byte order mark first
            text = stream.read(MAX_TOML_CHARS + 1)
        if len(text) > MAX_TOML_CHARS:
            raise ValueError("it is too large for a file of settings")
        return tomllib.loads(text)
    except FileNotFoundError:
        matches = difflib.get_close_matches(path.stem, PRESETS, n=1)
        hint = f"did you mean the preset {matches[0]}?" if matches else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"config {file} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, too deeply nested
        raise UserError(f"config {file} cannot be read: {error}") from None


def build_dataclass(cls: type[T], settings: object, where: str, prefix: str = "") -> T:
    """Build a frozen dataclass from plain values. `UserError` for an unknown name or a value of the wrong type.

    `where` names the file in error messages, `prefix` the section ("train.").
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: [{prefix.removesuffix('.')}] must be a table of settings")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            sections = get_type_hints(Config)
            known = [*sections, *setting_names()] if cls in (Config, *sections.values()) else list(hints)
            raise UserError(f"{where}: {unknown_setting_message(prefix + key, known)}")
        values[key] = validate(value, hints[key], where, prefix + key)
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def validate(value: Any, hint: Any, where: str, name: str) -> Any:
    """Return `value` converted to the annotated type (int to float, list to tuple). `UserError` if it does not fit."""
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, where, f"{name}.")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}: {name}={quoted(value)} must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in UNION_TYPES:  # a number or a keyword such as "auto"
        number, word = get_args(hint)
        return validate(value, word if isinstance(value, str) else number, where, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: {name} must be a list of strings")
        return tuple(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {name} must be a 64-bit integer")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name}={quoted(value)} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}: {name}={value} must be finite")
    return value


def parse_text(text: str, hint: Any, name: str) -> Any:
    """Parse the text of a flag as a value of the annotated type; lists are separated by `|`."""
    if hint is str or get_origin(hint) is Literal:
        return text
    if get_origin(hint) in UNION_TYPES:
        number, word = get_args(hint)
        if text in get_args(word):
            return text
        try:
            return parse_text(text, number, name)
        except UserError:
            raise UserError(f"--{name} {text!r}: expected a number or {' or '.join(get_args(word))}") from None
    if hint is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name} {text!r}: expected true or false")
        return words[text.lower()]
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split("|") if part.strip())
    try:
        return hint(text.replace("_", "")) if hint is int else hint(text)
    except ValueError:
        raise UserError(f"--{name} {text!r}: expected a value of type {hint.__name__}") from None


def setting_names() -> list[str]:
    """Return the names of all settings as `section.key`."""
    return [f"{section}.{key}" for section, kind in get_type_hints(Config).items() for key in get_type_hints(kind)]


def unknown_setting_message(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name[:MAX_QUOTED_CHARS], list(known), n=1, cutoff=0.5)
    display_name = name if name.isprintable() and len(name) <= MAX_QUOTED_CHARS else quoted(name)
    return f"unknown setting {display_name}" + (
        f"; did you mean {matches[0]}?" if matches else "; see tinystories train --help"
    )


def to_toml(config: Config) -> str:
    """Return the config as TOML text, which `load_config` reads back to an equal value."""
    import tomli_w  # part of the [train] extra: only training writes TOML

    return tomli_w.dumps(dataclasses.asdict(config))
