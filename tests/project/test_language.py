"""Docstrings begin as a reader of the field expects, and avoid unusual phrases."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.once

REPOSITORY: Final = Path(__file__).parent.parent.parent
SOURCES: Final = sorted(
    path
    for folder in ("atomic_claim", "examples", "tests")
    for path in (REPOSITORY / folder).rglob("*.py")
)
FIRST_WORDS: Final = {
    "What",
    "Whether",
    "Who",
    "Whoever",
    "Those",
    "So",
    "Nobody",
    "Somebody",
}
PHRASES: Final = [
    "nobody",
    "somebody",
    "whoever",
    "what others",
    "whose turn",
    "without our hearing",
    "hangs on",
    "so many",
    "anew",
    "of which",
    "the driver's own",
    "is theirs",
    "be it",
    "for ever",
    "former life",
    "the very",
    "to the letter",
    "cannot be had",
    "loose on",
]
BANNED: Final = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
OWNERS: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# What users read: comments, messages and help texts with the code, checks, guides.
TEXTS: Final = sorted(
    path
    for pattern in (
        "atomic_claim/**/*.py",
        "atomic_claim/**/*.toml",
        "examples/**/*.py",
        "examples/**/*.md",
        "*.md",
    )
    for path in REPOSITORY.glob(pattern)
)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield each docstring of a module with the qualified name of its owner."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, OWNERS) and (doc := ast.get_docstring(node)):
            yield name or "<module>", doc
        for child in ast.iter_child_nodes(node):
            own = getattr(child, "name", "") if isinstance(child, ast.stmt) else ""
            yield from walk(child, ".".join(filter(None, [name, own])))

    yield from walk(ast.parse(source), "")


def offends(doc: str) -> bool:
    """Return True if a docstring begins with a refused word or has a refused phrase."""
    first = doc.split(maxsplit=1)[0].strip(".,:;")
    return first in FIRST_WORDS or BANNED.search(doc) is not None


def offenders() -> list[str]:
    """Return the docstrings that offend, as `path name`, in the order of the sources."""
    return [
        f"{path.relative_to(REPOSITORY)} {name}"
        for path in SOURCES
        for name, doc in docstrings(path.read_text(encoding="utf-8"))
        if offends(doc)
    ]


def test_docstrings_are_plain() -> None:
    """No docstring begins with a refused word or has a refused phrase."""
    assert offenders() == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_texts_are_plain(path: Path) -> None:
    """No comment, message, help text or guide has a refused phrase."""
    # A phrase may go on in the next line of a comment or a string.
    text = re.sub(r"[\s\"'#]+", " ", path.read_text(encoding="utf-8"))
    assert [
        text[max(0, found.start() - 40) : found.end() + 40] for found in BANNED.finditer(text)
    ] == []


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the rows.", False),
        ("What is returned.", True),
        ("So: a list.", True),
        ("Whatever the caller gave.", False),
        ("Return rows that\nnobody holds.", True),
        ("Return the number\nof which half is free.", True),
        ("Renew the lease.", False),
    ],
)
def test_offences_are_seen(doc: str, expected: bool) -> None:
    """The twin: a refused first word and a refused phrase are seen wherever they stand."""
    assert offends(doc) is expected


def test_owners_are_named() -> None:
    """A docstring is named by all that it stands in."""
    source = textwrap.dedent(
        '''
        """A."""
        class C:
            """B."""
            def f(self):
                """D."""
                def g():
                    """E."""
        '''
    )
    assert dict(docstrings(source)) == {"<module>": "A.", "C": "B.", "C.f": "D.", "C.f.g": "E."}
