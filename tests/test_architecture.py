"""The map in ARCHITECTURE.md is the code's, and the code keeps the shape that it promises."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import homegptd

PACKAGE = Path(homegptd.__file__).parent
ROOT = PACKAGE.parent
DOCUMENT = PACKAGE / "ARCHITECTURE.md"

MOST_LINES = 400
EXCUSED = {
    "core/story.py": "one sentence for each phase and event; nobody reads it in parts",
}

_ENTRY = re.compile(r"^- `([\w/]+\.py)`: \S", re.MULTILINE)
_QUOTED = re.compile(r"`([^`\n]+)`")
_DOTTED = re.compile(r"homegptd(\.\w+)+")
_PATH = re.compile(r"(?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|json|yaml)")


def modules() -> set[str]:
    found = PACKAGE.rglob("*.py")
    return {str(path.relative_to(PACKAGE)) for path in found if path.name != "__init__.py"}


def quoted(document: Path) -> list[str]:
    return _QUOTED.findall(document.read_text())


def test_the_map_names_every_module_and_no_other() -> None:
    mapped = _ENTRY.findall(DOCUMENT.read_text())
    assert sorted(mapped) == sorted(modules())


def test_every_dotted_name_in_the_document_exists() -> None:
    names = [text for text in quoted(DOCUMENT) if _DOTTED.fullmatch(text)]
    assert names
    for name in names:
        pkgutil.resolve_name(name)


def test_every_path_in_the_document_exists() -> None:
    paths = [text for text in quoted(DOCUMENT) if _PATH.fullmatch(text)]
    assert paths
    lost = [path for path in paths if not any((at / path).exists() for at in (PACKAGE, ROOT))]
    assert lost == []


def test_a_file_can_be_read_at_one_sitting() -> None:
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in modules()}
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert set(long) == set(EXCUSED), f"longer than {MOST_LINES} lines: {long}"


@pytest.mark.parametrize("package", sorted(path.name for path in PACKAGE.glob("*/")))
def test_each_package_says_what_it_is(package: str) -> None:
    init = PACKAGE / package / "__init__.py"
    if package != "__pycache__":
        assert ast.get_docstring(ast.parse(init.read_text()))


def test_each_module_says_what_it_is() -> None:
    silent = [n for n in modules() if not ast.get_docstring(ast.parse((PACKAGE / n).read_text()))]
    assert silent == []


def test_the_package_itself_imports_nothing() -> None:
    """The CLI reads it at every start, for the version alone."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_other_documents_name_no_file_that_is_not_there() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    ours = ("homegptd/", "docs/", "etc/", "tests/", "bench/", "systemd/", "quadlet/", ".ci/")
    links = re.compile(r"\]\(([^)#:\s]+)[^)]*\)")
    for document in documents:
        named = [text for text in quoted(document) if text.startswith(ours) and " " not in text]
        lost = [text for text in named if not (ROOT / text).exists()]
        linked = links.findall(document.read_text())
        lost += [link for link in linked if not (document.parent / link).exists()]
        assert lost == [], document.name
