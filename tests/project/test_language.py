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
]
BANNED: Final = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
OWNERS: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Docstrings that offend today, as `path name`. The list only shrinks.
ALLOWED: Final = REPOSITORY / "tests" / "language_allowed.txt"


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
    """No docstring offends that did not when the check began, and the list has no other entry."""
    allowed = ALLOWED.read_text(encoding="utf-8").splitlines()
    found = offenders()
    assert set(found) - set(allowed) == set()
    assert set(allowed) - set(found) == set(), "no longer offends: remove the entry"
    assert len(allowed) == len(set(allowed))


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
