"""What draws: it takes jobs out of the queue, puts those that are alike into one batch, and writes
their pictures. It runs in a process of its own (`process.py`), which may die at any moment: its
jobs stay in the database as they are, and the next worker takes them up.

It knows no HTTP.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from dbos import error as dbos_error
from filelock import FileLock

from .. import metadata
from ..errors import InvalidRequest, LatentgenError
from ..modelfolder import Model
from ..outputs import write_file
from ..pipeline import LatentDiffusion, Result, Step, choose_place
from ..request import ResolvedRequest, can_join, together
from .drawing import FORMATS, Job
from .jobs import APP, DRAWS, QUEUE, VERSION, WORKFLOW, open_client, prepare
from .settings import Settings

TAKEN_UP_AGAIN = 3  # times that an interrupted job is tried once more
CLAIMS = 50  # times that a job may be taken out without being drawn
GATHER = 0.02  # seconds in which the other jobs of a batch may arrive
POLL = 0.05  # seconds between looks into the database
FAULT = "fault"  # attribute of a job: why nobody draws it any more
NO_ROOM = (
    "the memory of the device does not hold this; ask for fewer or smaller pictures, or for a "
    "smaller model"
)
PREVIEW = (512, 512)  # pixels at most; the server keeps them all until the job has ended

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Somebody cancelled the job while it was drawn."""


class Interrupted(LatentgenError):
    """The worker died with this job, too often or for good."""


@dataclass(frozen=True)
class _Read(Model):
    """A model in memory: its hash is that of what was read, whatever its file holds by now."""

    digits: str | None = None

    def hash(self) -> str | None:
        return self.digits


@dataclass(eq=False)
class Slot:
    """A job that waits in this process, and later how it ended."""

    job: Job
    draws: int  # how often its drawing began before
    done: threading.Event = field(default_factory=threading.Event)
    result: dict[str, Any] | None = None
    error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        if error is not None and self.result is None:
            self.error = error
        self.done.set()


class Worker:
    """Draws what is put into it, one batch at a time, in a thread of its own."""

    def __init__(
        self, settings: Settings, client: DBOSClient, tell: TextIO, cancelled: Collection[str]
    ) -> None:
        """`cancelled`: ids of jobs that stop at their next step; somebody else adds to them."""
        self.settings, self.client = settings, client
        self._out = tell
        self._telling = threading.Lock()
        self._arrived = threading.Condition()
        self._waiting: list[Slot] = []
        self._drawing: list[Slot] = []
        self._cancelled = cancelled
        self._model: tuple[Any, Any] = (None, None)  # what was asked for, and it
        self.lock: FileLock | None = None
        threading.Thread(target=self._loop, name="draw", daemon=True).start()

    def do(self, job: Job) -> dict[str, Any]:
        """Draw a job; returns what the database keeps of it. Called in a thread for each job."""
        (row,) = self.client.list_workflows(workflow_ids=[job.id], load_input=False)
        attributes = row.attributes or {}
        if FAULT in attributes:
            raise Interrupted(attributes[FAULT])
        draws = attributes.get(DRAWS, 0)
        if draws > TAKEN_UP_AGAIN or (row.recovery_attempts or 0) > CLAIMS:
            raise Interrupted(f"the process that drew it died {draws} times; it is not tried again")
        slot = Slot(job, draws)
        with self._arrived:
            self._waiting.append(slot)
            # threads do not keep the order, and the database may know whole seconds only
            self._waiting.sort(key=lambda slot: slot.job.created)
            self._arrived.notify()
        slot.done.wait()
        if slot.error is not None:
            raise slot.error
        assert slot.result is not None
        return slot.result

    def give_up(self) -> None:
        """Note that the jobs under way were not interrupted by anything they did."""
        for slot in self._drawing:
            self.client.update_workflow_attributes(slot.job.id, {DRAWS: slot.draws}, merge=True)

    def tell(self, event: str, **facts: Any) -> None:
        """A line for the server."""
        with self._telling, contextlib.suppress(BrokenPipeError):  # then the process ends anyway
            self._out.write(json.dumps({"event": event, **facts}) + "\n")
            self._out.flush()

    def _loop(self) -> None:
        while True:
            with self._arrived:
                while not self._waiting:
                    self._arrived.wait()
            time.sleep(GATHER)
            with self._arrived:
                first = self._waiting.pop(0)
                fresh = [slot for slot in self._waiting if slot.draws == 0]
                others = fresh if first.draws == 0 else []  # what failed before is drawn alone
            self._try(first, others)

    def _try(self, first: Slot, others: list[Slot]) -> None:
        """Draw a slot and those of the others that fit; whatever goes wrong stays with it."""
        batch = [first]
        try:
            pipe = self._load(first.job.model)
            requests = [pipe.resolve(first.job.to_request(self.settings))]
            for slot in others:
                if slot.job.model != first.job.model or slot.job.inputs:
                    continue
                try:
                    request = pipe.resolve(slot.job.to_request(self.settings))
                except LatentgenError:
                    continue  # it will be told when its own turn comes
                count = sum(len(one.seeds) for one in [*requests, request])
                if count <= self.settings.max_batch and can_join(requests[0], request):
                    batch.append(slot)
                    requests.append(request)
            with self._arrived:
                self._waiting = [slot for slot in self._waiting if slot not in batch]
            self._draw(pipe, batch, requests)
        except Exception as error:
            if _is_fatal(error):
                self._die(batch, error)
            if len(batch) == 1 and not first.done.is_set():
                if isinstance(error, RuntimeError) and "out of memory" in str(error):
                    error = LatentgenError(NO_ROOM)
                elif not isinstance(error, LatentgenError):
                    log.exception("a job failed")
                first.end(error)
        finally:
            self._drawing = []
        for slot in batch:  # if several failed, one of them is to blame: draw each alone
            if not slot.done.is_set():
                self._try(slot, [])

    def _die(self, batch: list[Slot], error: Exception) -> NoReturn:
        """End this process: torch cannot use the device any more, but the next one can. It fails
        the job that was drawn alone, and of a batch it draws each alone."""
        told = str(error).partition("\n")[0]
        log.error("the device failed, and so this process ends: %s", told)
        try:
            if len(batch) == 1:
                facts = {FAULT: f"the device failed while it was drawn: {told}"}
                self.client.update_workflow_attributes(batch[0].job.id, facts, merge=True)
        finally:
            os._exit(1)

    def _load(self, name: str) -> LatentDiffusion:
        """The model of a name, with the embeddings that there are; the one before it leaves the
        memory."""
        while self._model[0] != (wanted := self._wanted(name)):  # also if it changed meanwhile
            self._model = (None, None)
            self._model = (wanted, self._read(*wanted[:2]))
        return self._model[1]

    def _wanted(self, name: str) -> tuple[Model, list[Path], Any]:
        """A model, the files of embeddings, and what changes when a file is replaced."""
        found = self.settings.models().get(name)
        if found is None:
            raise InvalidRequest("model", name, "it is not here any more")
        words = sorted(self.settings.embeddings.glob("*.safetensors"))
        files: Iterable[Path] = ()
        if found.hub_id is None and found.path is not None:  # those of the hub stay as they are
            files = [found.path] if found.is_single_file else sorted(found.path.glob("*/*"))
        facts = [(file, file.stat()) for file in (*files, *words) if file.exists()]
        return found, words, [(file, told.st_size, told.st_mtime_ns) for file, told in facts]

    def _read(self, found: Model, words: list[Path]) -> LatentDiffusion:
        settings = self.settings
        source = found.hub_id if found.hub_id is not None else found.path
        assert source is not None
        try:
            pipe = LatentDiffusion.from_pretrained(
                source, settings.device, settings.dtype, settings.attention, found.revision
            )
        except InvalidRequest as error:  # where it lies is the server's own business
            value = found.name if error.field == "model" else error.value
            raise InvalidRequest(error.field, value, error.hint) from error
        pipe.model = _Read(**vars(pipe.model), digits=pipe.model.hash())
        if (file := pipe.model.weight_file()) is not None:
            mtime_ns = file.stat().st_mtime_ns
            self.tell("read", file=str(file), mtime_ns=mtime_ns, hash=pipe.model.hash())
        for file in words:
            try:
                pipe.load_embedding(file)
            except LatentgenError as error:  # of another model, most likely
                log.warning("%s is not used with %s: %s", file.name, found.name, error)
        return pipe

    def _draw(
        self, pipe: LatentDiffusion, batch: list[Slot], requests: list[ResolvedRequest]
    ) -> None:
        self._drawing = batch
        for slot in batch:  # on the disk before the first step, so it counts what was interrupted
            self.client.update_workflow_attributes(slot.job.id, {DRAWS: slot.draws + 1}, merge=True)
        ids = [slot.job.id for slot in batch]
        self.tell("started", ids=ids, model=pipe.model.name)
        request = together(requests) if len(requests) > 1 else requests[0]
        result = None
        for step in self._live(pipe.draw(request), batch):
            self.tell("step", ids=ids, index=step.index, total=step.total)
            self._show(step, batch)
            result = step.result
        if result is None:
            return  # all of them were cancelled
        parts = pipe.split(result, requests) if len(requests) > 1 else [result]
        for slot, part in zip(batch, parts, strict=True):
            if not slot.done.is_set():
                files = self._write(part, slot.job)
                facts = {"files": files, "seconds": part.seconds, "batch": len(batch)}
                facts["ended"] = time.time()  # SQLite's own time is a whole second
                slot.result = facts
                slot.end()

    def _live(self, steps: Iterator[Step], batch: list[Slot]) -> Iterator[Step]:
        """The steps, for as long as somebody waits for them."""
        while any(not slot.done.is_set() for slot in batch):
            for slot in batch:
                if slot.job.id in self._cancelled:
                    slot.end(Cancelled(slot.job.id))
            if all(slot.done.is_set() for slot in batch):
                return
            step = next(steps, None)
            if step is None:
                return
            yield step

    def _show(self, step: Step, batch: list[Slot]) -> None:
        """Send the previews that are due, spread evenly over the steps, of each first picture."""
        first = 0
        for slot in batch:
            wanted = slot.job.previews
            due = (step.index + 1) * (wanted + 1) // step.total
            before = step.index * (wanted + 1) // step.total
            if before < due <= wanted and not slot.done.is_set():
                stream = io.BytesIO()
                image = step.preview(first)
                image.thumbnail(PREVIEW)
                image.save(stream, "PNG", compress_level=1)
                png = base64.b64encode(stream.getvalue()).decode()
                self.tell("preview", id=slot.job.id, png=png)
            first += len(slot.job.seeds)

    def _write(self, result: Result, job: Job) -> list[str]:
        """Write a job's pictures under the names it was accepted with; each is there whole or not
        at all. Returns their names below the outputs."""
        files = job.output_files(self.settings)
        for k, file in enumerate(files):
            form = FORMATS[job.output_format]
            write_file(file, metadata.encode_result(result, k, form, job.quality))
        return [file.relative_to(self.settings.outputs).as_posix() for file in files]


def launch(settings: Settings, tell: TextIO, cancelled: Collection[str]) -> Worker:
    """Begin to take jobs out of the queue, as soon as no other worker of the folder does.

    Raises:
        InvalidRequest: this machine cannot draw where and how the settings say.
    """
    lock = FileLock(settings.data_dir / "worker.lock")
    lock.acquire()
    choose_place(settings.device, settings.dtype, settings.attention)
    prepare(settings.database)
    worker = Worker(settings, open_client(settings.database), tell, cancelled)
    worker.lock = lock  # until the process ends

    # None: the limit is ours, so that such a job fails with a reason
    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
    def draw(job: dict[str, Any]) -> dict[str, Any]:
        try:
            return worker.do(Job.model_validate(job))
        finally:
            worker.tell("ended", ids=[job["id"]])

    logger = logging.getLogger("dbos")
    logger.addFilter(_worth_telling)
    DBOS(
        config={
            "name": APP,
            "system_database_url": settings.database,
            "application_version": VERSION,
            "executor_id": "worker",  # always the same: the next one takes up what this one leaves
            "serializer": DBOSPortableJSONSerializer(),
            "run_migrations": False,
            "log_level": "WARNING",
            "enable_otlp": False,
            "max_executor_threads": 4 * settings.max_batch,
            "scheduler_polling_interval_sec": 3600.0,
        }
    )
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    DBOS.register_queue(
        QUEUE,
        worker_concurrency=2 * settings.max_batch,
        polling_interval_sec=POLL,
        on_conflict="always_update",
    )
    worker.tell("ready")
    return worker


def _is_fatal(error: Exception) -> bool:
    """Whether torch cannot use the device any more."""
    try:
        if torch.cuda.is_initialized():  # libraries have errors of their own, of the same causes
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return isinstance(error, torch.AcceleratorError)


def _worth_telling(record: logging.LogRecord) -> bool:
    """DBOS logs every job that is cancelled while it runs, and every failure, with a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    expected = (dbos_error.DBOSAwaitedWorkflowCancelledError, Cancelled, LatentgenError)
    return not isinstance(error, expected) and "outcome was not recorded" not in record.getMessage()
