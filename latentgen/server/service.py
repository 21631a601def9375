"""What all the APIs and the page do with jobs: put one in, wait for it, fetch, cancel, delete."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from PIL import Image

from .drawing import Drawing, Job, accept
from .jobs import Jobs, JobState, QueueFull
from .live import Live, remove_inputs, remove_outputs
from .settings import Settings

__all__ = ["Gone", "Leaving", "Service"]

KEEP_DAYS = 30  # that the database remembers a job that ended; its pictures stay
HANDS = 4  # pictures that are decoded and checked at once
DAY = 86_400  # seconds; so often is tidied up
CANCELLED = 1000  # of the newest cancelled jobs: a server that was killed may have left pictures
LOOK = 1.0  # seconds between looks whether a client still waits
GRACE = 2.0  # seconds that jobs have to end in, while the server is being stopped
PICTURE = re.compile(r"\d{4}-\d\d-\d\d/[0-9a-f-]{36}-\d{1,3}\.(png|jpeg|webp|avif)")

log = logging.getLogger(__name__)
Done = TypeVar("Done")
# What to draw, and those of its pictures that were sent in another way than as its fields.
Sketch = tuple[Drawing, Mapping[str, Image.Image]]


class Gone(Exception):
    """The client hung up; its job was cancelled."""


class Leaving(Exception):
    """The server is being stopped while a client waits for a job."""

    def __init__(self, id: str) -> None:
        super().__init__(f"the server is being stopped; the job {id} stays in the queue")


class Service:
    """One server's jobs. Its methods belong to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.jobs = Jobs(settings.database, settings.max_queue)
        self.live = Live(settings, self.jobs)
        self._patience = math.inf  # until when clients can wait, by the monotonic clock
        self.open = 0  # jobs that have not ended: right after `count`, near enough in between
        self._coming = 0  # jobs, perhaps, on their way into the queue
        self._hands = asyncio.Semaphore(HANDS)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await asyncio.to_thread(self._tidy)
        await self.live.start()
        self._tasks = [
            asyncio.create_task(work) for work in (self._keep_counting(), self._keep_tidy())
        ]

    def leave(self) -> None:
        """The server is being stopped: those who wait for a job are let go after a moment."""
        self._patience = time.monotonic() + GRACE

    @property
    def leaving(self) -> bool:
        """Whether nobody can wait for a job any longer."""
        return time.monotonic() > self._patience

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.live.stop()
        self.jobs.close()

    async def submit(self, prepare: Callable[..., Sketch], *arguments: Any) -> Job:
        """Accept a drawing; once this returns, nothing loses it.

        Args:
            prepare: says what to draw, and decodes the pictures that it starts from; it is called
                in a thread, a few at a time, and its pictures are gone when this returns: clients
                that wait for their jobs must not hold them in memory.

        Raises:
            InvalidRequest: see `accept`.
            QueueFull: as many wait as may wait.
        """
        with self._place():
            job = await self._by_hand(self._accepted, prepare, arguments)
            try:
                await asyncio.to_thread(self.jobs.put, job)
            except Exception:
                remove_inputs(job, self.settings)
                raise
            self.open += 1
        prompt = f": {job.request['prompt'][0]}" if self.settings.log_prompts else ""
        log.info("job %s accepted, %d picture(s)%s", job.id, len(job.seeds), prompt)
        return job

    def _accepted(self, prepare: Callable[..., Sketch], arguments: tuple[Any, ...]) -> Job:
        drawing, pictures = prepare(*arguments)
        return accept(drawing, self.settings, pictures)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place in the queue, kept for who is on the way to it."""
        if self.open + self._coming >= self.settings.max_queue:
            raise QueueFull
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def _by_hand(self, work: Callable[..., Done], *arguments: Any) -> Done:
        async with self._hands:
            return await asyncio.to_thread(work, *arguments)

    async def finished(self, job: Job, request: Request) -> JobState:
        """Wait until a job has ended, for a client that waits too.

        Raises:
            Gone: it does not any more, or somebody deleted the job.
            Leaving: the server is being stopped.
        """
        end = asyncio.create_task(self._end(job.id))
        try:
            while not end.done():
                await asyncio.wait({end}, timeout=LOOK)
                if not end.done() and await request.is_disconnected():
                    await self.live.cancel(job.id)
                    raise Gone
                if not end.done() and self.leaving:
                    raise Leaving(job.id)
        finally:
            end.cancel()
        state = end.result()
        if state is None:
            raise Gone
        return state

    async def _end(self, id: str) -> JobState | None:
        async for state in self.live.follow(id):
            if state.ended is not None:
                return state
        return None

    async def abandon(self, id: str) -> None:
        """Cancel a job whose client hung up, while its own task is being cancelled."""
        if self._patience == math.inf:  # else that may be the reason
            await asyncio.shield(self.live.cancel(id))

    def pictures(self, state: JobState) -> list[Path]:
        """The files of a job that is done."""
        names = state.result["files"] if state.result is not None else []
        return [self.settings.outputs / name for name in names]

    def picture(self, name: str) -> Path | None:
        """The file of a name, as a job's result or the gallery tells it; None for any other."""
        file = self.settings.outputs / name
        return file if PICTURE.fullmatch(name) and file.is_file() else None

    def gallery(self, limit: int, offset: int = 0) -> list[str]:
        """The names of finished pictures, the newest first. It looks at nothing but the files."""
        found: list[str] = []
        root = self.settings.outputs
        days = [folder for folder in root.iterdir() if folder.is_dir()] if root.is_dir() else []
        for folder in sorted(days, reverse=True):
            if len(found) >= offset + limit:
                break
            dated = []
            for file in folder.iterdir():
                name = f"{folder.name}/{file.name}"
                if PICTURE.fullmatch(name):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        dated.append((file.stat().st_mtime, name))
            found += [name for _, name in sorted(dated, reverse=True)]
        return found[offset : offset + limit]

    async def delete(self, state: JobState) -> None:
        """Cancel a job if it has not ended, and delete its pictures and what is known of it."""
        await self.live.cancel(state.id)
        async for last in self.live.follow(state.id):
            state = last
        while state.id in self.live.running:
            await asyncio.sleep(0.05)
        remove_inputs(state.job, self.settings)
        remove_outputs(state.job, self.settings)
        await asyncio.to_thread(self.jobs.forget, [state.id])

    def _tidy(self, untouched: float = 0.0) -> None:
        """Forget jobs that ended long ago; delete the pictures of jobs that were cancelled, and the
        inputs of jobs that ended or were never accepted.

        Args:
            untouched: seconds since an input was written, so that its job is no more on its way.
        """
        moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=KEEP_DAYS)
        while old := self.jobs.ended_before(moment.isoformat()):
            for state in old:
                remove_inputs(state.job, self.settings)
            self.jobs.forget([state.id for state in old])
        for state in self.jobs.newest(CANCELLED, status="cancelled"):
            remove_outputs(state.job, self.settings)
        for file in self.settings.inputs.glob("*.*"):
            with contextlib.suppress(FileNotFoundError):  # its job has just ended
                if file.stat().st_mtime > time.time() - untouched:
                    continue
                found = self.jobs.get(file.name[:36])
                if found is None or found.ended is not None:
                    file.unlink()

    async def _keep_tidy(self) -> None:
        while True:
            await asyncio.sleep(DAY)
            try:
                await asyncio.to_thread(self._tidy, DAY)
            except Exception:  # the database is out of reach; it may come back
                log.exception("nothing could be tidied up")

    async def _keep_counting(self) -> None:
        while True:
            try:
                self.open = await asyncio.to_thread(self.jobs.count)
            except Exception:  # the database is out of reach; it may come back
                log.exception("jobs cannot be counted")
            await asyncio.sleep(0.25)
