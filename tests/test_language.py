"""One spelling, and numbers as people write them, wherever a user reads: pages, settings, docstrings, messages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BRITISH = re.compile(
    r"\b(colou?red?|colours?|centred|neighbours?|behaviours?|gr[e]y|licence|favour\w*|modell\w+|travell\w+|labelled|catalogue"
    r"|\w*(?:initial|normal|recogn|synchron|optim|minim|maxim|summar|organ|regular|general|linear|vector|emphas)is"
    r"(?:e|es|ed|ing|er|ation))\b",
    re.IGNORECASE,
)
AMERICAN = {"color", "colored"}
NUMBER = re.compile(r"(?<![\w.\]\)/}\-:'\"])\.\d+\b(?!\w)")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
SETTINGS = [*(ROOT / "lightning_ebm" / "recipes").rglob("*.yaml")]
MODULES = [p for part in ("lightning_ebm", "lightning_ebm_cli") for p in (ROOT / part).rglob("*.py")]


def texts(path):
    """What is read: the whole of a page; strings of a module, docstrings among them."""
    if path.suffix != ".py":
        return path.read_text()
    tree = ast.parse(path.read_text())
    formats = {id(part) for node in ast.walk(tree) if isinstance(node, ast.FormattedValue) for part in ast.walk(node)}
    words = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in formats]
    return "\n".join(word for word in words if isinstance(word, str))


@pytest.mark.parametrize("path", [*PAGES, *SETTINGS, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_american_spelling_and_numbers_with_their_zero(path):
    text = texts(path)
    assert [w for w in BRITISH.findall(text) if w.lower() not in AMERICAN] == []
    assert NUMBER.findall(text) == []
