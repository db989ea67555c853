"""Statements laid out for people: a clause a line, and a subquery indented."""

from __future__ import annotations

import re

TOKENS = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|[()]|\s+|[^\s'"`()]+""")
CLAUSES = frozenset(
    ["SELECT", "FROM", "JOIN", "WHERE", "SET", "ORDER", "LIMIT", "FOR", "RETURNING", "UNION"]
)
STARTS = frozenset(["SELECT", "UPDATE", "WITH"])
WIDTH = 92


def laid_out(sql: str) -> str:
    """Return the same statement with lines broken and indented for reading."""
    # Databases differ in what a backslash means in a string, and so where it ends.
    if "\\" in sql:
        return sql
    words = [word for word in TOKENS.findall(sql) if not word.isspace()]
    gaps = _gaps(sql)
    lines: list[str] = [""]
    blocks: list[bool] = []

    def begin_line() -> None:
        if lines[-1].strip():
            lines.append("    " * sum(blocks))
        else:
            lines[-1] = "    " * sum(blocks)

    for place, word in enumerate(words):
        following = words[place + 1].upper() if place + 1 < len(words) else ""
        ends_block = word == ")" and bool(blocks) and blocks.pop()
        if ends_block or (word.upper() in CLAUSES and (not blocks or blocks[-1])):
            begin_line()
        elif len(lines[-1]) + len(word) > WIDTH and gaps[place] and word != ")":
            lines.append("    " * (sum(blocks) + 1))
        if gaps[place] and lines[-1].strip():
            lines[-1] += " "
        lines[-1] += word
        if word == "(":
            blocks.append(following in STARTS)
            if blocks[-1]:
                begin_line()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _gaps(sql: str) -> list[bool]:
    """Return for each token whether white space precedes it."""
    found: list[bool] = []
    gap = False
    for token in TOKENS.findall(sql):
        if token.isspace():
            gap = True
        else:
            found.append(gap)
            gap = False
    return found
