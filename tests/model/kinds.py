"""The types that columns of job tables have, with values in ascending order and unreadable ones."""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

ALL: Final = frozenset({"sqlite", "postgresql", "mysql", "mariadb"})
ON_SERVERS: Final = ALL - {"sqlite"}
INNODB: Final = frozenset({"mysql", "mariadb"})
# Stands for an exception without a message, whose type is stored then.
NO_MESSAGE: Final = "(no message)"
SPENT: Final = "all attempts are spent"
DAY: Final = datetime(2024, 5, 1, 12)  # noqa: DTZ001 - for columns without a zone


class Place(enum.Enum):
    """An enum of keys."""

    A = "first"
    B = "second"
    C = "third"
    D = "fourth"
    E = "fifth"
    F = "sixth"
    G = "seventh"
    H = "eighth"


class Status(enum.Enum):
    """An enum of states, whose names and values differ."""

    WAITING = "waiting job"
    RETRY = "retry job"
    RUNNING = "running job"
    DONE = "done job"
    FAILED = "failed job"
    PAUSED = "paused job"


class Prefixed(sa.TypeDecorator[str]):
    """Text that is stored with a prefix."""

    impl = sa.String(40)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Add the prefix."""
        return None if value is None else f"p:{value}"

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Take it off."""
        return None if value is None else value.removeprefix("p:")


class BinaryUuid(sa.TypeDecorator[uuid.UUID]):
    """A UUID in 16 bytes."""

    impl = sa.LargeBinary(16)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """Use BINARY(16), which may be a key, where there is one."""
        is_innodb = dialect.name in INNODB
        return dialect.type_descriptor(mysql.BINARY(16) if is_innodb else sa.LargeBinary(16))

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return the bytes."""
        return None if value is None else value.bytes

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Return the UUID."""
        return None if value is None else uuid.UUID(bytes=bytes(value))


class JsonText(sa.TypeDecorator[Any]):
    """JSON in a text column, as many models have it."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Dump it."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """Load it."""
        return None if value is None else json.loads(value)


@dataclass(frozen=True)
class Kind:
    """A type of columns.

    Attributes:
        make: makes the type.
        values: at least eight values, in the order that the database gives them.
        tokens: the values of a state, by token.
        bad: by database, an SQL literal that the column holds and that cannot be read.
        on: the databases that have it.
    """

    make: Callable[[], sa.types.TypeEngine[Any]]
    values: tuple[Any, ...] = ()
    tokens: Mapping[str, Any] = field(default_factory=dict)
    bad: Mapping[str, str] = field(default_factory=dict)
    on: frozenset[str] = ALL

    def value(self, place: int) -> Any:
        """Return the value at a place."""
        return self.values[place % len(self.values)]


def _status(*values: Any) -> dict[str, Any]:
    names = ("free", "retry", "claimed", "done", "failed", "paused")
    return dict(zip(names, values, strict=True))


def error_text(kind: str, text: str, *, plain: bool = False) -> str:
    """Return what a column of a kind holds of an error; `plain` where not all characters fit."""
    text = "ValueError" if text == NO_MESSAGE else text.replace("\0", r"\x00")
    stored = text.encode("ascii" if plain else "utf-8", "backslashreplace")
    most = 255 if plain else 65_535
    if len(stored) > most:
        stored = stored[: most - 3] + b"..."
    text = stored.decode("utf-8", "ignore")
    length = getattr(KINDS[kind].make(), "length", None) or len(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def everywhere(text: str) -> dict[str, str]:
    """Return the same content for each database."""
    return dict.fromkeys(ALL, text)


KEYS: Final[dict[str, Kind]] = {
    "integer": Kind(sa.Integer, tuple(range(1, 33))),
    "bigint": Kind(sa.BigInteger, tuple(2**60 + n for n in range(32))),
    "string": Kind(lambda: sa.String(40), tuple(f"it's {n:02} % :a" for n in range(32))),
    "prefixed": Kind(Prefixed, tuple(f"k{n:02}" for n in range(32))),
    "uuid": Kind(sa.Uuid, tuple(uuid.UUID(int=2**124 + n) for n in range(32))),
    "uuid text": Kind(
        lambda: sa.Uuid(native_uuid=False),
        tuple(uuid.UUID(int=2**124 + n) for n in range(32)),
        bad=everywhere("'zz'"),
    ),
    "uuid binary": Kind(BinaryUuid, tuple(uuid.UUID(int=2**124 + n) for n in range(32))),
    "enum": Kind(lambda: sa.Enum(Place, name="place"), tuple(Place)),
    "date": Kind(
        sa.Date,
        tuple(date(2024, 1, 1) + timedelta(days=n) for n in range(32)),
        bad={"postgresql": "'infinity'", "sqlite": "'soon'"},
    ),
    "time": Kind(sa.Time, tuple(time(1, n) for n in range(32))),
    "numeric": Kind(
        lambda: sa.Numeric(20, 2),
        tuple(Decimal(n) + Decimal("0.25") for n in range(32)),
        bad={"sqlite": "'much'"},
    ),
}
STATES: Final[dict[str, Kind]] = {
    "flag": Kind(sa.Boolean, tokens={"free": False, "claimed": True}),
    "inverted flag": Kind(sa.Boolean, tokens={"free": True, "claimed": False}),
    "status": Kind(
        lambda: sa.String(20),
        tokens=_status("waiting", "retry", "running", "done", "failed", "paused"),
    ),
    "prefixed status": Kind(
        Prefixed, tokens=_status("waiting", "retry", "running", "done", "failed", "paused")
    ),
    "char": Kind(lambda: sa.CHAR(1), tokens=_status("w", "t", "r", "d", "f", "p")),
    "number": Kind(sa.SmallInteger, tokens=_status(0, 4, 1, 2, 3, 5)),
    "status enum": Kind(lambda: sa.Enum(Status, name="status"), tokens=_status(*Status)),
    "text enum": Kind(
        lambda: sa.Enum(Status, native_enum=False, length=20), tokens=_status(*Status)
    ),
    "domain": Kind(
        lambda: postgresql.DOMAIN("job_status", sa.String(20)),
        tokens=_status("waiting", "retry", "running", "done", "failed", "paused"),
        on=frozenset({"postgresql"}),
    ),
    "bit": Kind(lambda: mysql.BIT(1), tokens={"free": 0, "claimed": 1}, on=INNODB),
    "time state": Kind(
        lambda: sa.DateTime().with_variant(mysql.DATETIME(fsp=6), *INNODB),
        tokens={"free": None, "claimed": "NOW"},
    ),
}
ROLES: Final[dict[str, Kind]] = {
    "instant": Kind(
        lambda: sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *INNODB),
        tuple(datetime(2024, 5, 1, 12, n, tzinfo=UTC) for n in range(32)),
        bad={"postgresql": "'infinity'", "sqlite": "'soon'"},
    ),
    "naive": Kind(
        lambda: sa.DateTime().with_variant(mysql.DATETIME(fsp=6), *INNODB),
        tuple(DAY + timedelta(minutes=n) for n in range(32)),
        bad={"postgresql": "'infinity'", "sqlite": "'soon'"},
    ),
    "timestamp": Kind(
        lambda: sa.TIMESTAMP().with_variant(mysql.TIMESTAMP(fsp=6), *INNODB),
        tuple(DAY + timedelta(minutes=n) for n in range(32)),
    ),
    "text": Kind(sa.Text, tuple(f"text {n:02}" for n in range(32))),
    "long string": Kind(lambda: sa.String(64), tuple(f"text {n:02}" for n in range(32))),
    "short string": Kind(lambda: sa.String(12), tuple(f"s{n:02}" for n in range(32))),
    "small": Kind(sa.SmallInteger, tuple(range(32))),
    "json": Kind(sa.JSON, tuple({"n": n} for n in range(32))),
    "json text": Kind(JsonText, tuple({"n": n} for n in range(32)), bad=everywhere("'{half'")),
    "member": Kind(
        lambda: sa.Enum(Place, native_enum=False, length=20), tuple(Place), bad=everywhere("'Z'")
    ),
    "boolean": Kind(sa.Boolean, (False, True)),
    "array": Kind(lambda: postgresql.ARRAY(sa.Text), (["a"], ["b"]), on=frozenset({"postgresql"})),
}
KINDS: Final = KEYS | STATES | ROLES
