"""Recording of compiled and sent statements, and the plans that PostgreSQL makes for them."""

from typing import Any, NamedTuple

import sqlalchemy as sa


class Sent(NamedTuple):
    """A statement as the driver gets it."""

    text: str
    parameters: Any


def sent_by(engine: sa.Engine) -> list[Sent]:
    """Return a list that collects each statement that the engine sends from now on."""
    sent: list[Sent] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append(Sent(statement, parameters))

    return sent


def compiled_by(engine: sa.Engine) -> list[Any]:
    """Return a list that collects each statement that the engine compiles from now on."""
    compiled: list[Any] = []
    dialect: Any = engine.dialect
    plain: Any = dialect.statement_compiler

    class Noting(plain):  # type: ignore[misc]
        def __init__(self, dialect: Any, statement: Any, *args: Any, **options: Any) -> None:
            compiled.append(statement)
            super().__init__(dialect, statement, *args, **options)

    dialect.statement_compiler = Noting
    return compiled


def explained(connection: sa.Connection, sent: Sent) -> str:
    """PostgreSQL's plan for a statement, which is not executed."""
    found = connection.exec_driver_sql(f"EXPLAIN (COSTS OFF) {sent.text}", sent.parameters)
    return "\n".join(found.scalars())
