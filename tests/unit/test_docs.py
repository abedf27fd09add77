"""Every place in the code that a page names exists, and every page that it links to."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("megatron_croc", "tests", "tools", "benchmarks", "examples")

PLACE = re.compile(
    rf"(?P<file>[\w./-]+\.(?:py|md|sh|yaml)|(?:{'|'.join(ROOMS)})/[\w/-]*)?(?:::(?P<name>\w+))?"
)
"""`file` or `folder`, `file::name`, or `::name` for the file named last."""


@cache
def files_called(name: str) -> list[Path]:
    return [path for room in ROOMS for path in (ROOT / room).rglob(name)]


def find_files(name: str, page: Path) -> list[Path]:
    """A path from the root, the package or the page's folder; a bare name may stand anywhere."""
    folders = (ROOT, ROOT / "megatron_croc", page.parent)
    found = [folder / name for folder in folders if (folder / name).exists()]
    return found or ([] if "/" in name else files_called(name))


@cache
def names_in(path: Path) -> set[str]:
    """Functions, classes and variables that a module defines, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def places(text: str) -> list[tuple[str | None, str | None]]:
    """(file, name) of everything between backticks that is a place; blocks of code are left out."""
    text = re.sub(r"^```.*?^```$|^ {4}[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=[/_])\n", "", text)  # a path may go over the end of a line
    found = (PLACE.fullmatch(quoted) for quoted in re.findall(r"`([^`]+)`", text))
    return [(m["file"], m["name"]) for m in found if m and (m["file"] or m["name"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_exists(page: Path):
    missing, latest = [], None
    for file, name in places(page.read_text()):
        latest = file or latest
        assert latest is not None, f"{name}: no file is named before it"
        found = find_files(latest, page)
        is_code = latest.endswith(".py")
        if is_code and not any(name is None or name in names_in(path) for path in found):
            missing.append(f"{latest}::{name}" if name else latest)
        elif not is_code and "/" in latest and not found and latest.split("/")[0] in ROOMS:
            missing.append(latest)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    text = re.sub(r"`[^`]*`", "", page.read_text())
    links = re.findall(r"\]\((?!\w+://)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_wrong_place_is_found():
    page = PAGES[0]
    text = "see `ops/x.py::f`, `::g`\n    `a.py` in a block\n`word`, `run b.py`, `ops/\nc.py`"
    assert places(text) == [("ops/x.py", "f"), (None, "g"), ("ops/c.py", None)]
    assert find_files("config/run.py", page) == [ROOT / "megatron_croc" / "config" / "run.py"]
    assert "RunConfig" in names_in(ROOT / "megatron_croc" / "config" / "run.py")
    assert find_files("config/gone.py", page) == []
    assert "no_such_name" not in names_in(ROOT / "megatron_croc" / "config" / "run.py")
