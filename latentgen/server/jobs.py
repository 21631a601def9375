"""The queue: accepted jobs in a database, each of which ends exactly once.

It is DBOS, a library of durable workflows: a job is a workflow with a queue of its own, in an
SQLite file or in PostgreSQL. This module is what the server process needs of it (put in, look at,
cancel, delete); `worker.py` takes jobs out and does them. Whatever is killed, a job that was put in
stays until it has ended. Values are JSON; the library's pickles are shut off.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import sqlalchemy as sa
from dbos import DBOSClient, DBOSPortableJSONSerializer, run_dbos_database_migrations
from dbos import _serialization as serialization

from ..errors import InvalidRequest
from .drawing import Job

__all__ = ["JobState", "Jobs", "QueueFull", "Status", "alone", "open_client"]

APP = QUEUE = WORKFLOW = "latentgen"
VERSION = "latentgen-jobs-1"  # of what the database holds; a server takes up jobs of its own only
DRAWS = "draws"  # attribute of a job: how often its drawing began

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: dict[str, Status] = {
    "SUCCESS": "done",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "cancelled",
}
OPEN = ["ENQUEUED", "PENDING", "DELAYED"]
ID = re.compile("[0-9a-f-]{36}")
AT_ONCE = 500  # rows that are deleted at once


class QueueFull(Exception):
    """As many jobs wait as may wait."""


@dataclass(frozen=True)
class JobState:
    """What the database knows of a job. Times are seconds since 1970.

    Attributes:
        status: "running" once its drawing began, also while it waits to be taken up again.
        result: of a job that is done: `files` (below the outputs), `seconds`, `batch`.
        error: why it failed, for people.
    """

    id: str
    status: Status
    job: Job
    ended: float | None = None
    result: dict[str, Any] | None = None
    error: str | None = None


class Jobs:
    """The queue as the server sees it. All methods block for milliseconds; any thread may call."""

    def __init__(self, url: str, limit: int) -> None:
        """`limit`: of the jobs that have not ended."""
        self.limit = limit
        prepare(url)
        self._client = open_client(url)
        self._engine = sa.create_engine(url, hide_parameters=True)  # what people ask for
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._table = "workflow_status" if self._sqlite else "dbos.workflow_status"
        self._cancelling = threading.Lock()

    def put(self, job: Job) -> None:
        """Accept a job: it is on the disk when this returns.

        Raises:
            QueueFull: counted in the transaction that would put it in.
        """
        options = {
            "workflow_name": WORKFLOW,
            "queue_name": QUEUE,
            "workflow_id": job.id,
            "workflow_id_reuse_policy": "reject",
        }
        with self._engine.connect() as connection, connection.begin():
            if self._sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7265001)"))
            if self._count(connection) >= self.limit:
                raise QueueFull
            self._client.enqueue_in_transaction(
                connection, cast(Any, options), job.model_dump(mode="json")
            )

    def count(self) -> int:
        """How many jobs have not ended."""
        with self._engine.connect() as connection:
            return self._count(connection)

    def _count(self, connection: sa.Connection) -> int:
        # literal states, so that SQLite uses the index of rows in flight
        query = (
            f"SELECT count(*) FROM {self._table} "
            "WHERE queue_name = :queue AND status IN ('ENQUEUED', 'PENDING')"
        )
        return connection.execute(sa.text(query), {"queue": QUEUE}).scalar_one()

    def get(self, id: str) -> JobState | None:
        """A job; None if there is no such one."""
        if not ID.fullmatch(id):
            return None
        found = self._client.list_workflows(workflow_ids=[id])
        return _state(found[0]) if found else None

    def newest(
        self, limit: int = 50, offset: int = 0, status: Status | None = None
    ) -> list[JobState]:
        """Jobs, the newest first."""
        if status in ("queued", "running"):  # one to the database; there are `self.limit` at most
            found = self._client.list_workflows(name=WORKFLOW, status=OPEN, sort_desc=True)
            states = [state for state in map(_state, found) if state.status == status]
            return states[offset : offset + limit]
        wanted = None
        if status is not None:
            wanted = [name for name, told in ENDED.items() if told == status]
        found = self._client.list_workflows(
            name=WORKFLOW, status=wanted, limit=limit, offset=offset, sort_desc=True
        )
        return [_state(row) for row in found]

    def cancel(self, id: str) -> JobState | None:
        """Cancel a job that has not ended; its state afterwards. One that has ended stays as it
        is."""
        with self._cancelling:
            state = self.get(id)
            if state is not None and state.ended is None:
                self._client.cancel_workflow(id)
                state = self.get(id)
        return state

    def forget(self, ids: list[str]) -> None:
        """Delete what the database knows of jobs that have ended."""
        self._client.delete_workflows(ids)

    def ended_before(self, moment: str) -> list[JobState]:
        """Some of the jobs that ended before a moment (ISO 8601)."""
        found = self._client.list_workflows(
            name=WORKFLOW, status=list(ENDED), completed_before=moment, limit=AT_ONCE
        )
        return [_state(row) for row in found]

    def close(self) -> None:
        """Give the connections back."""
        self._client.destroy()
        self._engine.dispose()


def prepare(url: str) -> None:
    """Make the database ready: its tables, and for SQLite a log that lets readers and a writer
    work at once. Commits wait for the disk either way."""
    if url.startswith("sqlite"):
        file = sa.make_url(url).database
        assert file is not None
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    logging.getLogger("dbos").setLevel(logging.WARNING)
    run_dbos_database_migrations(url)


@contextlib.contextmanager
def alone(url: str) -> Iterator[None]:
    """Keep other servers off a PostgreSQL database: they would take up this one's jobs. An SQLite
    file lies in a folder that is locked already.

    Raises:
        InvalidRequest: another server has it, or it cannot be reached or read.
    """
    if url.startswith("sqlite"):
        _check_readable(Path(url.removeprefix("sqlite:///")))
        yield
        return
    _check_reachable(url)
    prepare(url)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:  # the lock lasts as long as it does
        if not connection.execute(sa.text("SELECT pg_try_advisory_lock(7265002)")).scalar_one():
            hint = "another server uses it; stop that one, or give each a database of its own"
            raise InvalidRequest("database_url", engine.url.database, hint)
        yield


def _check_readable(file: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("SELECT name FROM sqlite_master").fetchall()
    except sqlite3.Error as error:
        hint = f"cannot be read ({error})"
        if not isinstance(error, sqlite3.OperationalError):  # no lock, and no lack of rights
            hint += "; put it elsewhere, and the server makes a new one"
        raise InvalidRequest("database", str(file), hint) from None


def _check_reachable(url: str) -> None:
    try:
        shown = sa.make_url(url).render_as_string(hide_password=True)
        if sa.make_url(url).get_backend_name() != "postgresql":
            raise InvalidRequest("database_url", shown, "PostgreSQL: postgresql://USER@HOST/NAME")
    except sa.exc.ArgumentError as error:
        hint = "not a URL; PostgreSQL's look like postgresql://USER@HOST/NAME"
        raise InvalidRequest("database_url", url.partition(":")[0], hint) from error
    try:
        with sa.create_engine(url, poolclass=sa.NullPool).connect():
            pass
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        if "does not exist" not in reason:  # the database is made then, or it is told why not
            raise InvalidRequest("database_url", shown, f"cannot be reached: {reason}") from error


def open_client(url: str) -> DBOSClient:
    """A client whose values are JSON, in a process that reads no pickles."""
    refuse_pickles()
    return DBOSClient(
        system_database_url=url,
        serializer=DBOSPortableJSONSerializer(),
        application_name=APP,
    )


def refuse_pickles() -> None:
    """A row that calls itself pickled would be unpickled whatever the serializer: not here."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise TypeError("a pickle in the database of jobs; it was not opened")

    serialization.DefaultSerializer.serialize = refuse  # type: ignore[method-assign]
    serialization.DefaultSerializer.deserialize = refuse  # type: ignore[method-assign]


def _state(row: Any) -> JobState:
    arguments = row.input["args"] if isinstance(row.input, dict) else row.input.args
    draws = (row.attributes or {}).get(DRAWS, 0)
    status = ENDED.get(row.status) or ("running" if draws else "queued")
    job = Job.model_validate(arguments[0])
    result = row.output if status == "done" else None
    ended = None
    if status in ENDED.values() and row.completed_at:
        ended = max(job.created, row.completed_at / 1000)
    if result is not None:
        ended = result.get("ended", ended)
    return JobState(
        id=row.workflow_id,
        status=status,
        job=job,
        ended=ended,
        result=result,
        error=_reason(row) if status == "failed" else None,
    )


def _reason(row: Any) -> str:
    return str(row.error) if row.error is not None else "interrupted too often"
