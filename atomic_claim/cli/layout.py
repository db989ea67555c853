"""Statements laid out for people: a clause a line, and a subquery indented."""

from __future__ import annotations

import re

# A word, and the white space before it.
TOKENS = re.compile(r"""(\s*)('(?:[^']|'')*'|"[^"]*"|`[^`]*`|[()]|[^\s'"`()]+)""")
CLAUSES = frozenset(
    ["SELECT", "FROM", "WHERE", "SET", "ORDER", "LIMIT", "FOR", "RETURNING", "UNION"]
)
JOIN_KINDS = frozenset(["LEFT", "RIGHT", "FULL", "INNER", "CROSS"])
STARTS = frozenset(["SELECT", "UPDATE", "WITH"])
WIDTH = 92


def laid_out(sql: str) -> str:
    """Return the same statement with lines broken and indented for reading."""
    # Databases differ in what a backslash means in a string, and so where it ends.
    if "\\" in sql:
        return sql
    tokens = TOKENS.findall(sql)
    words = [word for _, word in tokens]
    lines: list[str] = [""]
    blocks: list[bool] = []

    def begin_line() -> None:
        if lines[-1].strip():
            lines.append("")
        lines[-1] = "    " * sum(blocks)

    around = zip(["", *words], tokens, [*words[1:], ""], strict=False)
    for before, (gap, word), following in around:
        ends_block = word == ")" and bool(blocks) and blocks.pop()
        begins_clause = _begins_clause(before.upper(), word.upper(), following.upper())
        if ends_block or (begins_clause and (not blocks or blocks[-1])):
            begin_line()
        elif len(lines[-1]) + len(word) > WIDTH and gap and word != ")":
            lines.append("    " * (sum(blocks) + 1))
        if gap and lines[-1].strip():
            lines[-1] += " "
        lines[-1] += word
        if word == "(":
            blocks.append(following.upper() in STARTS)
            if blocks[-1]:
                begin_line()
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _begins_clause(before: str, word: str, following: str) -> bool:
    """Check whether a word begins a clause; a kind of join stays beside its JOIN."""
    if word == "JOIN":
        return before not in JOIN_KINDS
    return word in CLAUSES or (word in JOIN_KINDS and following == "JOIN")
