"""The worker's parts, without a process and without weights."""

import base64
import io
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fakes
import pytest
import torch
from PIL import Image

from latentgen.errors import InvalidRequest, LatentgenError
from latentgen.modelfolder import Model, find
from latentgen.server.drawing import Drawing, accept
from latentgen.server.settings import Settings
from latentgen.server.worker import (
    GATHER,
    Cancelled,
    Interrupted,
    LatentDiffusion,
    Slot,
    Worker,
)


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
        lambda *_: SimpleNamespace(
            model=Model("x"), load_embedding=lambda file: loaded.append(file.name)
        ),
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


def test_a_model_that_was_replaced_is_read_anew(worker, tiny, monkeypatch):
    folder = worker.settings.data_dir / "models" / "mine"
    shutil.copytree(tiny, folder)
    first = worker._load("mine")
    then = first.model.hash()
    assert (then, worker._load("mine")) == (find(folder).hash(), first)
    replaced, read = [], LatentDiffusion.from_pretrained

    def replace() -> None:
        replaced.append(seed := len(replaced) + 1)
        fakes.components(sample_size=4, seed=seed)["unet"].save_pretrained(folder / "unet")

    def meanwhile(*arguments):
        pipe = read(*arguments)
        if len(replaced) == 1:
            replace()
        return pipe

    monkeypatch.setattr(LatentDiffusion, "from_pretrained", meanwhile)
    replace()
    second = worker._load("mine")
    assert len(replaced) == 2
    latest = fakes.components(sample_size=4, seed=2)["unet"]
    assert torch.equal(second.unet.conv_in.weight, latest.conv_in.weight)
    assert second.model.hash() == find(folder).hash() != then
    assert first.model.hash() == then  # of what it has drawn


def failing(worker, monkeypatch, error, count=1) -> list[Slot]:
    """Jobs that were tried, where drawing raises an error."""
    pipe = SimpleNamespace(resolve=lambda request: request.resolve(Model("x")))
    monkeypatch.setattr(worker, "_load", lambda name: pipe)
    monkeypatch.setattr(worker, "_draw", lambda *_: (_ for _ in ()).throw(error))
    drawing = Drawing(prompt="a cat", seed=1)
    first, *others = [Slot(accept(drawing, worker.settings), 0) for _ in range(count)]
    worker._try(first, others)
    return [first, *others]


def test_what_does_not_fit_into_the_memory_fails_alone_and_with_advice(worker, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    for count in (1, 2):
        for slot in failing(worker, monkeypatch, error, count):
            assert isinstance(slot.error, LatentgenError)
            assert "fewer or smaller pictures" in str(slot.error)


@pytest.mark.parametrize("count", [1, 2])
def test_a_device_that_failed_ends_the_process(worker, monkeypatch, caplog, count):
    """And the job that it was drawn with: of several, the next process draws each alone."""
    noted = {}
    worker.client = SimpleNamespace(
        update_workflow_attributes=lambda id, facts, merge: noted.update({id: facts}),
        list_workflows=lambda workflow_ids, load_input: [
            SimpleNamespace(attributes=noted[workflow_ids[0]])
        ],
    )

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered\nAnd so on.")
    with pytest.raises(SystemExit):
        failing(worker, monkeypatch, error, count)
    assert "device-side assert triggered" in caplog.text
    assert len(noted) == (count == 1)
    for id in noted:
        job = SimpleNamespace(id=id)
        with pytest.raises(Interrupted, match=r"failed while it was drawn: CUDA .* triggered$"):
            worker.do(job)


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
