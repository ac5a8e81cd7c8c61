"""Names and sentences that docs/style.md bans do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("hyperscale", "benchmarks", "examples", "tests")
CODE = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = {ROOT / "docs" / "style.md", ROOT / "docs" / "log.md"}
"""The page of bans with its examples, and the dated log."""

NAMES = {"asked", "beside", "found", "given", "made", "said", "seen", "taken", "told", "unsayable", "wanted"}
"""No variable, argument, attribute, function or class has one of these as its whole name."""
PARTS = {"refusal", "refusals", "refuse", "refused", "refuses", "told", "unsayable"}
"""Nor has it one of these among the words of its name."""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every name that the code gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield node.lineno, name


def phrases() -> dict[str, re.Pattern[str]]:
    """Return the banned phrases of docs/style.md: the first column of its table of phrases."""
    page = (ROOT / "docs" / "style.md").read_text(encoding="utf-8")
    table = page.partition("## Phrases\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    alone = r"(?<![\w-])(?<!there )%s(?![\w-])"
    return {cell: re.compile(alone % re.escape(cell), flags=re.IGNORECASE) for cell in cells}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring, message and comment of a module, or of a page's paragraphs."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    for number, line in enumerate(text.splitlines(), 1):
        yield number, line.partition("  # ")[2] or (line.strip() if line.lstrip().startswith("#") else "")


def test_names_say_what_a_value_is():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in CODE
        for line, name in names(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_").lower() in NAMES or PARTS & set(name.lower().split("_"))
    ]
    assert not wrong, "docs/style.md, Names:\n" + "\n".join(wrong)


def test_no_banned_phrase_is_used():
    banned = phrases()
    assert len(banned) >= 15
    modules = [path for path in CODE if path.is_relative_to(ROOT / "hyperscale")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {phrase}"
        for path in (*modules, *(page for page in PAGES if page not in HISTORY))
        for line, text in texts(path)
        for phrase, pattern in banned.items()
        if pattern.search(text)
    ]
    assert not wrong, "docs/style.md, Phrases:\n" + "\n".join(wrong)


def test_a_banned_phrase_is_found_in_a_sentence():
    multiple, folder = phrases()["is no multiple of"], phrases()["is no folder"]
    assert multiple.search("batch_size 5 is no multiple of 4")
    assert folder.search("runs/a is no folder here")
    assert not folder.search("there is no folder runs/a")


@pytest.mark.parametrize(
    ("code", "name"),
    [("found = 1", "found"), ("def f(given): ...", "given"), ("def refuse_all(): ...", "refuse_all")],
)
def test_every_kind_of_name_is_read(code: str, name: str):
    assert name in [text for _, text in names(ast.parse(code))]
