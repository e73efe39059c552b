"""ES modules joined into one script."""

from pathlib import Path

import pytest

from tinystories.single_page import hash_source, join_modules, wrap_module


def test_a_source_is_named_as_policies_name_it() -> None:
    assert hash_source("alert('Hello, world.');") == "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='"


def test_each_module_comes_once_and_after_those_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.js").write_text("import { b } from './sub/b.js';\nimport { c } from './c.js';\nb(c);")
    (tmp_path / "sub" / "b.js").write_text("import { c } from '../c.js';\nexport const b = c;")
    (tmp_path / "c.js").write_text("export const c = 1;")
    script = join_modules(tmp_path, "a.js")
    assert script.startswith("'use strict';")
    places = [script.index(f'modules["{path}"] = ') for path in ("c.js", "sub/b.js", "a.js")]
    assert places == sorted(places)
    assert script.count("const c = 1;") == 1


def test_what_is_imported_later_is_in_the_script_too(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("const load = () => import('./b.js');")
    (tmp_path / "b.js").write_text("import { c } from './c.js';\nexport const b = c;")
    (tmp_path / "c.js").write_text("export const c = 1;")
    script = join_modules(tmp_path, "a.js")
    places = [script.index(f'modules["{path}"] = ') for path in ("c.js", "b.js", "a.js")]
    assert places == sorted(places)
    assert 'const load = () => Promise.resolve(modules["b.js"]);' in script


@pytest.mark.parametrize("text", ["</SCRIPT>", "<!--"])
def test_what_would_end_the_element_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.js").write_text(f"const text = '{text}';")
    with pytest.raises(AssertionError, match="inside a page"):
        join_modules(tmp_path, "a.js")


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("import { a, b as c } from './x.js';\nc(a);", 'const { a, b: c } = modules["sub/x.js"];\nc(a);'),
        ("import x from '../y.mjs';\nx();", 'const { default: x } = modules["y.mjs"];\nx();'),
        ('import{a as b}from"./x.js";b()', 'const {a: b} = modules["sub/x.js"];b()'),
        ("export const a = 1;\nexport function b() {}", "const a = 1;\nfunction b() {}"),
        ("export async function* a() {}", "async function* a() {}"),
        ("const a = 1;export{a as b, a};", "const a = 1;"),
        ("const x = await import('./x.js');", 'const x = await Promise.resolve(modules["sub/x.js"]);'),
        ("export default function () {}", "const default_export = function () {}"),
    ],
)
def test_imports_and_exports_become_constants(source: str, result: str) -> None:
    assert result in wrap_module("sub/main.js", source)


def test_exports_are_kept_by_their_names_outside() -> None:
    wrapped = wrap_module("x.js", "const a = 1;\nexport class B {}\nexport{a as c};export default a;")
    assert 'modules["x.js"] = { c: a, default: default_export, B: B };' in wrapped


def test_what_is_exported_from_another_module_is_that_of_the_other() -> None:
    wrapped = wrap_module("x.js", "export { a, b as c } from './y.js';\nexport const d = 1;")
    assert 'modules["x.js"] = { a: modules["y.js"].a, c: modules["y.js"].b, d: d };' in wrapped
    assert "from" not in wrapped


@pytest.mark.parametrize("source", ["export * from './x.js';", "import './x.js';", "const x = import(name);"])
def test_other_forms_of_import_are_refused(source: str) -> None:
    with pytest.raises(AssertionError, match="imports or exports"):
        wrap_module("x.js", source)
