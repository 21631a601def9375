"""The worker process as the server sees it: started, started again when it dies, and listened to.

What it tells (steps, previews, ends) is kept here for those who follow a job. None of it is needed
to lose nothing: it is gone when the server is, and the database is asked whenever it matters.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidRequest
from ..modelfolder import Model
from .drawing import Job
from .jobs import Jobs, JobState
from .settings import Settings

__all__ = ["Live", "Progress", "remove_inputs", "remove_outputs"]

ASK_AGAIN = 2.0  # seconds after which the database is asked, if the worker tells nothing
RESTART = 0.5  # seconds before a worker that died is started again
LINE = 64 * 2**20  # bytes; previews are lines
WEIGHT = 0.2  # of the newest job in the mean time of jobs

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Follower:
    """Somebody who waits. `ask`: the database may know more than the last time."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ask: bool = True


@dataclass
class Progress:
    """How far a drawing is. `previews`: PNG files, in their order."""

    index: int = 0  # steps that are done
    total: int = 0
    started: float = field(default_factory=time.monotonic)
    previews: list[bytes] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return self.index / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the steps so far; None before the first."""
        if not self.index:
            return None
        return (time.monotonic() - self.started) * (self.total - self.index) / self.index


class Live:
    """Runs the worker and follows it. Its methods belong to the server's event loop."""

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        self.settings, self.jobs = settings, jobs
        self.running: dict[str, Progress] = {}
        self.ready = asyncio.Event()  # the worker takes jobs
        self.refused: InvalidRequest | None = None  # why no worker could ever draw anything
        self._was_ready = False
        self._hashes: dict[tuple[str, int], str] = {}  # by file and time of its last change
        self.deaths = 0
        self.mean_seconds = 1.0  # of a batch, for those who are told to come again
        self._followers: dict[str, set[_Follower]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """End the worker; what it draws stays in the queue."""
        self._closing = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
        if self._task is not None:
            await self._task

    async def cancel(self, id: str) -> JobState | None:
        """Cancel a job; the worker stops at its next step."""
        state = await asyncio.to_thread(self.jobs.cancel, id)
        process = self._process
        if state is not None and state.status == "cancelled" and process is not None:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"cancel": id}).encode() + b"\n")
        if state is not None and state.ended is not None:
            remove_inputs(state.job, self.settings)
        self._notify([id], ask=True)
        return state

    async def follow(self, id: str) -> AsyncIterator[JobState]:
        """The job's state, now and whenever something about it may have changed; the last one has
        ended. See `running` for how far it is."""
        follower = _Follower()
        self._followers.setdefault(id, set()).add(follower)
        try:
            state = None
            while state is None or state.ended is None:
                if follower.ask:
                    follower.ask = False
                    state = await asyncio.to_thread(self.jobs.get, id)
                    if state is None:
                        return
                assert state is not None
                yield state
                if state.ended is None:
                    try:
                        await asyncio.wait_for(follower.changed.wait(), ASK_AGAIN)
                    except TimeoutError:
                        follower.ask = True
                    follower.changed.clear()
        finally:
            self._followers[id].discard(follower)
            if not self._followers[id]:
                del self._followers[id]

    def hash_of(self, model: Model) -> str | None:
        """The hash of a model, if the worker has read it: large files take a while."""
        file = model.weight_file()
        return None if file is None else self._hashes.get((str(file), file.stat().st_mtime_ns))

    async def _keep_running(self) -> None:
        command = (sys.executable, "-m", "latentgen.server.process")
        pipe = asyncio.subprocess.PIPE
        while not self._closing:
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    *command, stdin=pipe, stdout=pipe, limit=LINE
                )
            except OSError:  # no memory, say, which may come back
                log.exception("no worker can be started")
                await asyncio.sleep(RESTART)
                continue
            assert process.stdin is not None
            assert process.stdout is not None
            if self._closing:  # while it was being started
                process.kill()
            process.stdin.write(self.settings.to_json().encode())
            try:
                async for line in process.stdout:
                    try:
                        await self._hear(json.loads(line))
                    except Exception:  # a database out of reach, say: followers ask again
                        log.exception("what the worker told was not understood")
            except ValueError:
                log.error("the worker told more than %d bytes in one line", LINE)
                process.kill()
                await process.stdout.read()  # else its end is not heard
            code = await process.wait()
            self.ready.clear()
            self.running.clear()
            self._notify(self._followers, ask=True)
            if self.refused is not None:
                return
            if not self._closing:
                self.deaths += 1
                log.warning("the worker ended with status %s; starting another", code)
                await asyncio.sleep(RESTART)

    async def _hear(self, told: dict[str, Any]) -> None:
        match told["event"]:
            case "ready":
                self.ready.set()
                self._was_ready = True
            case "refused":
                error = InvalidRequest(told["field"], told["value"], told["hint"])
                if self._was_ready:  # a GPU that is full for a moment, say: the next one may do
                    log.error("the worker cannot draw: %s", error)
                else:
                    self.refused = error
            case "read":
                self._hashes[told["file"], told["mtime_ns"]] = told["hash"]
            case "started":
                self.running |= {id: Progress() for id in told["ids"]}
                self._notify(told["ids"], ask=True)
            case "step":
                for id in told["ids"]:
                    if id in self.running:
                        self.running[id].index = told["index"] + 1
                        self.running[id].total = told["total"]
                self._notify(told["ids"])
            case "preview":
                if told["id"] in self.running:
                    self.running[told["id"]].previews.append(base64.b64decode(told["png"]))
                self._notify([told["id"]])
            case "ended":
                await self._see_off(told["ids"])
                self._notify(told["ids"], ask=True)

    async def _see_off(self, ids: list[str]) -> None:
        """The database says so a moment after the worker did."""
        for id in ids:
            progress = self.running.pop(id, None)
            if progress is not None:
                seconds = time.monotonic() - progress.started
                self.mean_seconds += WEIGHT * (seconds - self.mean_seconds)
            for _ in range(50):
                state = await asyncio.to_thread(self.jobs.get, id)
                if state is None or state.ended is not None:
                    break
                await asyncio.sleep(0.01)
            if state is not None and state.ended is not None:
                remove_inputs(state.job, self.settings)
            # cancelled during its last step, or failed when some of its pictures were written
            if state is not None and state.status in ("cancelled", "failed"):
                remove_outputs(state.job, self.settings)

    def _notify(self, ids: Iterable[str], ask: bool = False) -> None:
        for id in ids:
            for follower in self._followers.get(id, ()):
                follower.ask = follower.ask or ask
                follower.changed.set()


def remove_inputs(job: Job, settings: Settings) -> None:
    """Delete what a job started from; once it has ended, nobody asks for that."""
    for kind in job.inputs:
        job.input_file(settings, kind).unlink(missing_ok=True)


def remove_outputs(job: Job, settings: Settings) -> None:
    """Delete the pictures of a job, and what a worker that was killed left of one."""
    for file in job.output_files(settings):
        file.unlink(missing_ok=True)
        file.with_name(f".{file.name}.partial").unlink(missing_ok=True)
