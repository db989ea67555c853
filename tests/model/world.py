"""The tables, classes, engines and rows of a scenario in a database."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, deferred, registry, relationship, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool

from tests.databases import Database, end_connection
from tests.model.kinds import INNODB, KINDS
from tests.model.scenario import Actor, Bind, Fault, Row, Scenario

STYLES: Final[dict[str, Callable[[str], str]]] = {
    "plain": str,
    "spaces": lambda label: f"the {label}",
    "quotes": lambda label: f'it\'s "{label}"',
    "percent": lambda label: f"100%{label}",
    "colon": lambda label: f":{label}:x",
    "upper": str.title,
    "parentheses": lambda label: f"{label}(1)",
    "reserved": lambda label: {
        "state": "group",
        "group": "having",
        "lease": "select",
        "due": "where",
    }.get(label, label),
}
# Names by which each role is inferred.
CONVENTIONAL: Final = {
    "flag": "processing",
    "inverted flag": "visible",
    "time state": "locked_at",
    "due": "run_at",
    "lease": "lease_until",
    "worker": "worker_id",
    "token": "claim_token",
    "attempts": "attempts",
    "error": "last_error",
    "order": "created_at",
    "done_at": "completed_at",
    "failed_at": "failed_at",
}
# Values of the state that no row has: the name of a column, and what hardly a type can hold.
NAME_OF: Final = "the name of "
UNFIT: Final = {"too long": "x" * 300, "too large": 2**70, "a list": ("free",)}
SCHEMA: Final = "other_schema"
HOUR: Final = timedelta(hours=1)
ON_LOOP: Final = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}


class HookError(Exception):
    """Raised by a listener of the application's."""


class Base:
    """A mapped job."""


def name(label: str, scenario: Scenario) -> str:
    """Return the name of a column."""
    if scenario.table.names == "conventional":
        return CONVENTIONAL.get(scenario.table.state.kind if label == "state" else label, label)
    return STYLES[scenario.table.names](label)


class Schema:
    """The tables and classes of a scenario, for one kind of database.

    Attributes:
        table: the job table.
        columns: its columns by label; the scenario's, and `ident`, `note`, `touched`, `hook`.
        target: what is claimed from: the table, or the mapped class.
    """

    def __init__(self, scenario: Scenario, database: str) -> None:
        self.scenario = scenario
        self.database = database
        self.metadata = sa.MetaData()
        self.registry = registry(metadata=self.metadata)
        spec = scenario.table
        self.columns: dict[str, sa.Column[Any]] = {}
        for column in spec.columns:
            self._add(column.label, KINDS[column.kind].make(), column.nullable, column.moved)
        self._add("ident", sa.Integer(), nullable=False)
        self._add("note", sa.String(50))
        self._add("touched", sa.Integer(), nullable=False, server_default="0")
        self._add("hook", sa.Integer(), nullable=False, server_default="0")
        if "version" in scenario.mapping:
            self._add("version", sa.Integer(), nullable=False, server_default="1")
        if self.is_polymorphic:
            self._add("identity", sa.String(10), nullable=False, server_default="base")
        keys = [column.label for column in spec.keys] + (["state"] if spec.state_in_key else [])
        options: dict[str, Any] = {}
        if spec.partitioned:
            options["postgresql_partition_by"] = f'LIST ("{self.columns["state"].name}")'
        self.table = sa.Table(
            name("jobs", scenario),
            self.metadata,
            *self.columns.values(),
            sa.PrimaryKeyConstraint(*(self.columns[label] for label in keys)),
            schema=SCHEMA if spec.schema else None,
            **options,
        )
        self.key = [self.columns[label] for label in keys]
        if spec.index == "state":
            sa.Index("jobs_by_state", self.columns["state"])
        if spec.index == "one":
            running = self.columns["state"] == sa.literal(
                self.token("claimed"), literal_execute=True
            )
            where = {f"{kind}_where": running for kind in ("postgresql", "sqlite")}
            sa.Index("one_runs", self.columns["state"], unique=True, **where)
        self.lines: sa.Table | None = None
        self.subs: sa.Table | None = None
        # By thread, what a listener to the loading of entities does.
        self.loading: dict[int, Callable[[], None]] = {}
        self.target: Any = self.table if scenario.mapping[0] == "table" else self._mapped()

    @property
    def is_polymorphic(self) -> bool:
        """Return True if the mapped class has a subclass."""
        return self.scenario.mapping[0] in {"joined", "single"}

    def token(self, token: str) -> Any:
        """Return the state's value for a token."""
        if token.startswith(NAME_OF):
            return self.columns[token.removeprefix(NAME_OF)].name
        if token in UNFIT:
            return UNFIT[token]
        return None if token == "null" else KINDS[self.scenario.table.state.kind].tokens[token]

    def _add(
        self, label: str, type_: Any, nullable: bool = True, moved: bool = False, **options: Any
    ) -> None:
        if moved:
            options["server_onupdate"] = sa.FetchedValue()
            options["server_default"] = sa.text(
                "CURRENT_TIMESTAMP(6) ON UPDATE CURRENT_TIMESTAMP(6)"
            )
            type_ = mysql.TIMESTAMP(fsp=6)
        self.columns[label] = sa.Column(
            name(label, self.scenario), type_, nullable=nullable, autoincrement=False, **options
        )

    def _mapped(self) -> Any:
        mapping = self.scenario.mapping
        cls = type("Job", (Base,), {})
        properties: dict[str, Any] = dict(self.columns.items())
        options: dict[str, Any] = {}
        if "deferred" in mapping:
            properties["note"] = deferred(self.columns["note"])
        if "version" in mapping:
            options["version_id_col"] = self.columns["version"]
        if self.is_polymorphic:
            options |= {"polymorphic_on": self.columns["identity"], "polymorphic_identity": "base"}
        if "selectin" in mapping:
            self.lines = self._child("lines")
            line = type("Line", (), {})
            self.registry.map_imperatively(line, self.lines)
            properties["lines"] = relationship(line, lazy="selectin")
        self.registry.map_imperatively(cls, self.table, properties=properties, **options)
        if self.is_polymorphic:
            sub = type("SubJob", (cls,), {})
            if mapping[0] == "joined":
                self.subs = self._child("subs", joins=True)
                self.registry.map_imperatively(
                    sub, self.subs, inherits=cls, polymorphic_identity="sub"
                )
            else:
                self.registry.map_imperatively(sub, inherits=cls, polymorphic_identity="sub")
        sa.event.listen(cls, "load", self._loaded, propagate=True)
        return cls

    def _loaded(self, *_: Any) -> None:
        self.loading.get(threading.get_ident(), lambda: None)()

    def _child(self, label: str, *, joins: bool = False) -> sa.Table:
        """Create a table of rows that belong to a job."""
        (key,) = self.key
        own = [] if joins else [sa.Column("number", sa.Integer, primary_key=True)]
        refers = sa.Column(
            "job", key.type, sa.ForeignKey(key), primary_key=joins, autoincrement=False
        )
        return sa.Table(label, self.metadata, *own, refers, sa.Column("detail", sa.String(20)))

    def create(self, connection: sa.Connection) -> None:
        """Create the tables, and what stands beside them."""
        if self.scenario.table.schema:
            connection.execute(sa.schema.CreateSchema(SCHEMA, if_not_exists=True))
        self.metadata.create_all(connection)
        quoted = connection.dialect.identifier_preparer
        if self.scenario.table.partitioned:
            # PostgreSQL's: free rows in one partition, all others in another.
            table = quoted.format_table(self.table)
            value = sa.literal(self.token("free"), self.columns["state"].type)
            text = value.compile(connection, compile_kwargs={"literal_binds": True})
            connection.exec_driver_sql(
                f"CREATE TABLE jobs_free PARTITION OF {table} FOR VALUES IN ({text})"
            )
            connection.exec_driver_sql(f"CREATE TABLE jobs_rest PARTITION OF {table} DEFAULT")

    def drop(self, connection: sa.Connection) -> None:
        """Drop all that was created."""
        self.metadata.drop_all(connection)
        if self.database == "postgresql":
            connection.exec_driver_sql("DROP FUNCTION IF EXISTS on_update() CASCADE")
            connection.exec_driver_sql("DROP DOMAIN IF EXISTS job_status CASCADE")

    def close(self) -> None:
        """Forget the classes."""
        self.registry.dispose()

    def add_trigger(self, connection: sa.Connection) -> None:
        """Create the trigger that acts on each UPDATE."""
        kind, quote = self.scenario.table.trigger, connection.dialect.identifier_preparer
        if kind is None:
            return
        table = quote.format_table(self.table)
        state, hook, touched, ident = (
            quote.quote(self.columns[label].name) for label in ("state", "hook", "touched", "ident")
        )
        if connection.dialect.name == "postgresql":
            body = {
                "touch": f"NEW.{touched} := OLD.{touched} + 1; RETURN NEW;",
                "veto": f"IF OLD.{hook} = 1 THEN RETURN NULL; END IF; RETURN NEW;",
                "refuse": f"IF OLD.{hook} = 1 THEN RAISE 'refused' USING ERRCODE = '23514'; "
                "END IF; RETURN NEW;",
                "rewrite": f"IF OLD.{hook} = 1 THEN NEW.{state} := OLD.{state}; END IF; "
                "RETURN NEW;",
            }[kind]
            statements = [
                (
                    f"CREATE FUNCTION on_update() RETURNS trigger LANGUAGE plpgsql AS "
                    f"$$ BEGIN {body} END $$"
                ),
                (
                    f"CREATE TRIGGER on_update BEFORE UPDATE ON {table} "
                    f"FOR EACH ROW EXECUTE FUNCTION on_update()"
                ),
            ]
        elif connection.dialect.name in INNODB:
            body = {
                "touch": f"SET NEW.{touched} = OLD.{touched} + 1",
                "refuse": f"IF OLD.{hook} = 1 THEN SIGNAL SQLSTATE '45000'; END IF",
                "rewrite": f"SET NEW.{state} = IF(OLD.{hook} = 1, OLD.{state}, NEW.{state})",
            }[kind]
            statements = [f"CREATE TRIGGER on_update BEFORE UPDATE ON {table} FOR EACH ROW {body}"]
        else:
            when, body = {
                "touch": (
                    f"AFTER UPDATE OF {state} ON {table}",
                    f"UPDATE {table} SET {touched} = {touched} + 1 WHERE {ident} = NEW.{ident}",
                ),
                "veto": (f"BEFORE UPDATE ON {table} WHEN OLD.{hook} = 1", "SELECT RAISE(IGNORE)"),
                "refuse": (
                    f"BEFORE UPDATE ON {table} WHEN OLD.{hook} = 1",
                    "SELECT RAISE(ABORT, 'refused')",
                ),
            }[kind]
            statements = [f"CREATE TRIGGER on_update {when} BEGIN {body}; END"]
        for statement in statements:
            connection.exec_driver_sql(statement)

    def insert(self, connection: sa.Connection, ident: int, row: Row) -> None:
        """Insert a job."""
        connection.execute(sa.insert(self.table), self._values(ident, row))
        (*_, key) = self.key[:1]
        if row.bad and (extra := self.scenario.table.column("extra")) is not None:
            content = KINDS[extra.kind].bad[self.database]
            connection.execute(
                sa.update(self.table)
                .where(self.columns["ident"] == ident)
                .values({self.columns["extra"]: sa.literal_column(content, sa.types.NullType())})
            )
        value = self._values(ident, row)[key.key]
        if self.subs is not None and row.identity == "sub":
            connection.execute(sa.insert(self.subs).values(job=value, detail="sub"))
        if self.lines is not None:
            connection.execute(sa.insert(self.lines).values(number=ident, job=value, detail="line"))

    def _values(self, ident: int, row: Row) -> dict[str, Any]:
        found = {
            self.columns[column.label].key: self._value(column, ident, row)
            for column in self.scenario.table.columns
        }
        found |= {
            self.columns["ident"].key: ident,
            self.columns["note"].key: f"note {ident}",
            self.columns["hook"].key: int(row.hooked),
        }
        if self.is_polymorphic:
            found[self.columns["identity"].key] = row.identity
        return found

    def _value(self, column: Any, ident: int, row: Row) -> Any:
        """Return a column's value in a row."""
        kind, label = KINDS[column.kind], column.label
        if label == "state":
            value = self.token(row.state)
            return moment(column.kind, -HOUR) if value == "NOW" else value
        if label.startswith("key"):
            place = int(label[3:])
            # Of several columns only the last one tells all rows apart.
            last = len(self.scenario.table.keys) - 1
            return kind.value(ident if place == last else ident // 3)
        if label in {"due", "lease"} and is_time(column.kind):
            said = row.due if label == "due" else row.lease
            if said == "none":
                return None if column.nullable else moment(column.kind, -2 * HOUR)
            return moment(column.kind, HOUR if said == "future" else -HOUR)
        if label in {"done_at", "failed_at"}:
            ended = row.ended and label == "done_at"
            return moment(column.kind, -HOUR) if ended else None
        if label == "stamp":
            return moment(column.kind, -2 * HOUR if row.aged else -HOUR / 60)
        if label == "group":
            return None if row.group is None else kind.value(row.group)
        if label == "tenant":
            return None if row.tenant is None else kind.value(row.tenant)
        if label == "order":
            return None if row.rank is None and column.nullable else kind.value(row.rank or 0)
        if label == "attempts" and column.kind in {"integer", "small", "bigint"}:
            return row.attempts
        if label == "error" and column.kind == "json" and column.nullable:
            # Not JSON's own null.
            return sa.null()
        return None if column.nullable and label != "extra" else kind.value(ident)


def is_time(kind: str) -> bool:
    """Return True if a kind holds points in time."""
    return kind in {"instant", "naive", "timestamp", "time state"}


def moment(kind: str, offset: timedelta) -> datetime:
    """Return a time relative to now, as a column of this kind takes it."""
    found = datetime.now(UTC) + offset
    return found if kind == "instant" else found.replace(tzinfo=None)


class Places:
    """The databases that scenarios share: the one in question, and another one of the same kind."""

    def __init__(self, here: Database, elsewhere: Database, other: Database | None) -> None:
        self.here = here
        self.elsewhere = elsewhere
        self.other = other or elsewhere
        self.name = here.name
        options = _options(here, Bind())
        if self.name == "postgresql":
            # Types come and go under it.
            options["connect_args"]["prepare_threshold"] = None
        self.watch = sa.create_engine(here.url, isolation_level="AUTOCOMMIT", **options)
        patience = {
            "postgresql": "SET lock_timeout = '1s'",
            "sqlite": "PRAGMA busy_timeout = 1000",
        }.get(self.name, "SET innodb_lock_wait_timeout = 1, lock_wait_timeout = 1")

        @sa.event.listens_for(self.watch, "connect")
        def prepare(driver: Any, _: Any) -> None:
            with closing(driver.cursor()) as cursor:
                cursor.execute(patience)

    def waiting(self) -> int:
        """Count the connections that wait for a lock."""
        return 0 if self.name == "sqlite" else self.here.lock_waiters()

    def kill(self, driver: Any) -> None:
        """End the server's process of a driver connection, as an administrator would."""
        # MySQL complains of a connection that has ended already, PostgreSQL does not.
        gone = (sa.exc.DBAPIError,) if self.name in INNODB else ()
        with suppress(*gone):
            end_connection(self.watch, driver)


def make_engine(database: Database, bind: Bind) -> sa.Engine:
    """Create a synchronous engine."""
    return sa.create_engine(database.url, **_options(database, bind))


def _options(database: Database, bind: Bind) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if bind.isolation is not None and bind.isolated_by == "engine":
        found["isolation_level"] = bind.isolation
    if bind.pool == "null":
        found["poolclass"] = NullPool
    if bind.pool == "queue" and not bind.on_loop:
        found |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    connecting: dict[str, Any] = {}
    if database.name == "sqlite":
        connecting["timeout"] = 0.05
    elif database.name in INNODB:
        connecting["init_command"] = "SET time_zone = '+00:00'"
    elif bind.prepares and not bind.on_loop:
        connecting["prepare_threshold"] = 0
    return found | {"connect_args": connecting}


class Player:
    """An actor: a thread, and in it an engine, a bind and an event loop."""

    def __init__(self, bind: Bind, places: Places, schema: Schema) -> None:
        self.bind = bind
        self.places = places
        self.schema = schema
        self.armed: dict[str, int] = {}
        self.killed = False
        self.paused = threading.Event()
        self.resumed = threading.Event()
        self.calls: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self.do(self._open).result(60)

    def do(self, call: Callable[[], Any]) -> Future[Any]:
        """Have the thread do something."""
        future: Future[Any] = Future()
        self.calls.put((call, future))
        return future

    def close(self) -> None:
        """End the thread, and all connections."""
        self.do(self._close).result(60)
        self.calls.put(None)
        self.thread.join(60)

    def resume(self) -> None:
        """Let a call go on that has paused."""
        self.paused.clear()
        self.resumed.set()

    def awaited(self, call: Callable[[], Any]) -> Any:
        """Call, and wait on the event loop for what is awaited."""
        found = call()
        return self.loop.run_until_complete(found) if asyncio.iscoroutine(found) else found

    def _work(self) -> None:
        while (item := self.calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - handed over, not swallowed
                future.set_exception(error)

    def _open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engines = [
            self._engine(database) for database in (self.places.here, self.places.elsewhere)
        ]
        self.engine, self.elsewhere = self.engines
        self._listen()
        self.object = self._bind()

    def _engine(self, database: Database) -> Any:
        options = _options(database, self.bind)
        if self.bind.on_loop:
            url = database.url.set(drivername=ON_LOOP[database.name])
            found: Any = create_async_engine(url, **options)
        else:
            found = sa.create_engine(database.url, **options)
        if self.bind.isolation is not None and self.bind.isolated_by == "option":
            found = found.execution_options(isolation_level=self.bind.isolation)
        return found

    @property
    def sync_engine(self) -> sa.Engine:
        """The engine, or the synchronous one behind it."""
        return getattr(self.engine, "sync_engine", self.engine)

    def _listen(self) -> None:
        engine = self.sync_engine
        for event in ("begin", "commit", "before_cursor_execute"):
            if event in self.bind.listeners:
                sa.event.listen(engine, event, lambda *_: None)
        if "recipe" in self.bind.listeners:

            @sa.event.listens_for(engine, "connect")
            def connected(driver: Any, _: Any) -> None:
                driver.isolation_level = None

            @sa.event.listens_for(engine, "begin")
            def begun(connection: sa.Connection) -> None:
                connection.exec_driver_sql("BEGIN")

        # Not for all: a listener may change the way of a claim.
        if self.schema.scenario.has(Fault):
            sa.event.listen(engine, "before_cursor_execute", self._before)
            sa.event.listen(engine, "after_cursor_execute", self._after)
            sa.event.listen(engine, "commit", lambda _: self._raise("raise commit"))
            self.schema.loading[threading.get_ident()] = lambda: self._raise("raise load")

    def read(self) -> None:
        """Read the table in the actor's transaction."""
        query = sa.select(*self.schema.key)
        found = self.awaited(lambda: self.object.execute(query))
        found.all()

    def _raise(self, what: str) -> None:
        if self.armed.pop(what, None) is not None:
            raise HookError(what)

    def _due(self, what: str) -> bool:
        left = self.armed.get(what)
        if left is None:
            return False
        self.armed[what] = left - 1
        if left > 0:
            return False
        del self.armed[what]
        return True

    def _before(self, connection: sa.Connection, *_: Any) -> None:
        if self._due("kill before"):
            self._kill(connection)
        if self._due("pause"):
            self.resumed.clear()
            self.paused.set()
            self.resumed.wait(60)

    def _after(self, connection: sa.Connection, *_: Any) -> None:
        if self._due("kill after"):
            self._kill(connection)

    def _kill(self, connection: sa.Connection) -> None:
        self.places.kill(connection.connection.driver_connection)
        self.killed = True

    def _session_options(self) -> dict[str, Any]:
        here, elsewhere, routing = self.engine, self.elsewhere, self.bind.routing
        synchronous = self.sync_engine
        reads = getattr(elsewhere, "sync_engine", elsewhere)

        class Own(Session):
            """The application's session."""

        if routing == "routed":

            def get_bind(session: Any, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
                # The recipe of SQLAlchemy's documentation, "Custom Vertical Partitioning".
                writes = session._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert))
                return synchronous if writes else reads

            Own.get_bind = get_bind  # type: ignore[method-assign]
        elif routing == "by mapper":

            def get_bind(session: Any, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
                return reads if mapper is None and clause is None else synchronous

            Own.get_bind = get_bind  # type: ignore[method-assign]
        for event in ("do_orm_execute", "after_begin"):
            if event in self.bind.listeners:
                sa.event.listen(Own, event, lambda *_: None)
        target = self.schema.target
        bound = (
            {"bind": elsewhere, "binds": {target: here}} if routing == "binds" else {"bind": here}
        )
        return bound | {"sync_session_class" if self.bind.on_loop else "class_": Own}

    def _bind(self) -> Any:
        kind = self.bind.kind
        if kind == "engine":
            return self.engine
        if kind == "connection":
            return (
                self.awaited(self.engine.connect)
                if not self.bind.on_loop
                else (self.loop.run_until_complete(self.engine.connect().start()))
            )
        options = self._session_options()
        if self.bind.on_loop:
            maker: Any = async_sessionmaker(class_=AsyncSession, **options)
        else:
            maker = sessionmaker(**options)
        if kind == "sessionmaker":
            return maker
        if kind == "scoped_session":
            if self.bind.on_loop:
                return async_scoped_session(maker, scopefunc=lambda: 1)
            return scoped_session(maker)
        return maker()

    def finish(self, *, commits: bool) -> None:
        """Commit or roll back the transaction of the actor."""
        if self.bind.is_own:
            return
        try:
            self.awaited(self.object.commit if commits else self.object.rollback)
        except DBAPIError as error:
            if commits or not error.connection_invalidated:
                raise
            # Killed, and nothing is left to be rolled back.
            self.object = self._bind()

    def _close(self) -> None:
        with suppress(Exception):
            if self.bind.kind == "scoped_session":
                self.awaited(self.object.remove)
            elif not self.bind.is_own:
                self.awaited(self.object.close)
        for engine in self.engines:
            self.awaited(engine.dispose)
        self.loop.close()


class World:
    """A scenario that has begun.

    Attributes:
        schema: its tables and classes.
        players: its actors.
    """

    def __init__(self, scenario: Scenario, places: Places) -> None:
        self.scenario = scenario
        self.places = places
        self.schema = Schema(scenario, places.name)
        self.players: dict[Actor, Player] = {}
        self._left = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._prepare()
        except BaseException:
            self._left.close()
            raise
        return self

    def _prepare(self) -> None:
        self._left.callback(self.schema.close)
        for engine in self._engines():
            with engine.begin() as connection:
                # The leavings of an interrupted run.
                self.schema.drop(connection)
                self.schema.create(connection)
            self._left.callback(self._drop, engine)
        with self.places.watch.connect() as connection:
            self.texts = self._samples(connection)
            for place, row in enumerate(self.scenario.rows):
                self.schema.insert(connection, place + 1, row)
            self.schema.add_trigger(connection)

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def open(self) -> None:
        """Start the actors."""
        for actor, bind in zip("ab", self.scenario.binds, strict=True):
            player = Player(bind, self.places, self.schema)
            self._left.callback(player.close)
            self.players[actor] = player  # type: ignore[index]

    def _engines(self) -> list[sa.Engine]:
        engines = [self.places.watch]
        if any(bind.routing for bind in self.scenario.binds):
            engines.append(make_engine(self.places.elsewhere, Bind()))
        return engines

    def _drop(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            self.schema.drop(connection)
        if engine is not self.places.watch:
            engine.dispose()

    @contextmanager
    def other(self, count: int) -> Iterator[sa.Engine]:
        """Yield an engine of another database with the same table and free rows."""
        engine = make_engine(self.places.other, Bind())
        schema = self.schema
        with engine.begin() as connection:
            schema.metadata.drop_all(connection)
            schema.metadata.create_all(connection)
            for number in range(1, count + 1):
                schema.insert(connection, number, Row())
        try:
            yield engine
        finally:
            with engine.begin() as connection:
                schema.metadata.drop_all(connection)
            engine.dispose()

    def _samples(self, connection: sa.Connection) -> dict[str, str | None]:
        """Return each token of the state as the database shows it as text."""
        found: dict[str, str | None] = {}
        tokens = KINDS[self.scenario.table.state.kind].tokens
        for token in tokens:
            if tokens[token] is None:
                found[token] = None
                continue
            self.schema.insert(connection, 900, Row(state=token))
            found[token] = self.snapshot(connection)[900]["state"]
            for child in (self.schema.lines, self.schema.subs):
                if child is not None:
                    connection.execute(sa.delete(child))
            connection.execute(sa.delete(self.schema.table))
        return found

    def snapshot(self, connection: sa.Connection | None = None) -> dict[int, dict[str, str | None]]:
        """Return the committed rows by `ident`, each a dictionary of texts by label."""
        if connection is None:
            with self.places.watch.connect() as own:
                return self.snapshot(own)
        labels = list(self.schema.columns)
        columns = [
            self._text(self.schema.columns[label]).label(f"c{n}") for n, label in enumerate(labels)
        ]
        rows = connection.execute(sa.select(*columns).select_from(self.schema.table)).all()
        found = [dict(zip(labels, row, strict=True)) for row in rows]
        return {int(row["ident"]): row for row in found}

    def _text(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        raw = sa.type_coerce(column, sa.types.NullType())
        if self.places.name == "postgresql":
            return sa.cast(raw, sa.Text)
        if self.places.name == "sqlite":
            return sa.cast(raw, sa.Text)
        if isinstance(column.type, (sa.LargeBinary, mysql.BIT, sa.TypeDecorator)):
            return sa.func.hex(raw)
        return sa.cast(raw, sa.CHAR)

    def write(self, place: int, **values: Any) -> None:
        """Change a row as an outside writer would, at once."""
        given = {self.schema.columns[label]: value for label, value in values.items()}
        with self.places.watch.connect() as connection:
            connection.execute(
                sa.update(self.schema.table)
                .where(self.schema.columns["ident"] == place)
                .values(given)
            )
