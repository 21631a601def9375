"""The worker's parts, without a process and without weights."""

import base64
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from latentgen.errors import InvalidRequest
from latentgen.server.drawing import Drawing, accept
from latentgen.server.settings import Settings
from latentgen.server.worker import GATHER, Cancelled, LatentDiffusion, Slot, Worker


@pytest.fixture
def worker(tmp_path):
    return Worker(Settings(data_dir=tmp_path), None, io.StringIO(), ())


def test_a_model_that_is_gone_is_said_to_be(worker):
    with pytest.raises(InvalidRequest, match="not here any more"):
        worker._load("gone")


def test_embeddings_that_come_later_are_read(worker, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        LatentDiffusion,
        "from_pretrained",
        lambda *_: SimpleNamespace(load_embedding=lambda file: loaded.append(file.name)),
    )
    (name, *_) = worker.settings.models()
    folder = worker.settings.embeddings
    first = worker._load(name)
    folder.mkdir()
    (folder / "cat.safetensors").touch()
    second = worker._load(name)
    assert first is not second
    assert worker._load(name) is second
    os.utime(folder / "cat.safetensors", (1, 1))
    assert worker._load(name) is not second
    assert loaded == ["cat.safetensors"] * 2


def test_who_came_first_is_drawn_first(tmp_path, monkeypatch):
    """The threads of two jobs that were taken out together may come in any order, and in SQLite
    DBOS keeps the second in which they were submitted, no more."""
    drawn, both = [], threading.Barrier(2)

    def draw(self, first, others):
        drawn.append(first.job.request["prompt"])
        first.result = {}
        first.end()

    class Database:
        def list_workflows(self, workflow_ids, load_input):
            job = next(job for job in jobs if job.id == workflow_ids[0])
            both.wait(5)
            if job is jobs[0]:
                time.sleep(GATHER / 4)  # it comes second
            return [SimpleNamespace(attributes={}, recovery_attempts=0, created_at=1000)]

    monkeypatch.setattr(Worker, "_try", draw)
    worker = Worker(Settings(data_dir=tmp_path), Database(), io.StringIO(), ())
    jobs = [accept(Drawing(prompt=name), worker.settings) for name in ("a cat", "a dog")]
    with ThreadPoolExecutor() as threads:
        list(threads.map(worker.do, jobs))
    assert drawn == [("a cat",), ("a dog",)]


def test_previews_are_small(worker):
    job = accept(Drawing(prompt="a cat", previews=1), worker.settings)
    step = SimpleNamespace(index=0, total=2, preview=lambda k: Image.new("RGB", (2048, 1024)))
    worker._show(step, [Slot(job, 0)])
    told = json.loads(worker._out.getvalue())
    assert Image.open(io.BytesIO(base64.b64decode(told["png"]))).size == (512, 256)


def test_a_cancelled_job_takes_no_further_step(tmp_path):
    cancelled = set()
    worker = Worker(Settings(data_dir=tmp_path), None, io.StringIO(), cancelled)
    jobs = [accept(Drawing(prompt=name), worker.settings) for name in ("a cat", "a dog")]
    batch = [Slot(job, 0) for job in jobs]
    taken = []
    for step in worker._live(iter(range(50)), batch):
        taken.append(step)
        if step in (3, 7):
            cancelled.add(jobs[len(cancelled)].id)
    assert taken == list(range(8))  # the first one's end leaves the other's steps
    assert [type(slot.error) for slot in batch] == [Cancelled] * 2
