"""What the server makes of what its worker tells."""

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from PIL import Image

from latentgen import DEFAULT_MODEL, modelfolder
from latentgen.errors import InvalidRequest
from latentgen.server import live as live_module
from latentgen.server import process, service
from latentgen.server.drawing import Drawing, accept
from latentgen.server.jobs import Jobs, JobState, QueueFull, alone
from latentgen.server.live import Live
from latentgen.server.service import Service
from latentgen.server.settings import Settings


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path)


def test_the_bound_is_counted_in_the_database(settings):
    """Also for one that comes between the server's own counts."""
    one, other = (Jobs(settings.database, limit=2) for _ in range(2))
    jobs = [accept(Drawing(prompt="a cat", seed=k), settings) for k in range(3)]
    one.put(jobs[0])
    other.put(jobs[1])
    with pytest.raises(QueueFull):
        one.put(jobs[2])
    assert one.get(jobs[2].id) is None
    other.cancel(jobs[0].id)
    one.put(jobs[2])
    assert (one.count(), other.get(jobs[2].id).status) == (2, "queued")


def test_a_job_cancelled_in_its_last_step_leaves_no_picture(settings):
    job = accept(Drawing(prompt="a cat"), settings)
    (file,) = job.output_files(settings)
    file.parent.mkdir(parents=True)

    class Fake:
        status = "done"

        def get(self, id):
            return JobState(id, self.status, job, ended=1.0)

    for status, stays in (("done", True), ("cancelled", False)):
        file.touch()
        Fake.status = status
        asyncio.run(Live(settings, Fake())._hear({"event": "ended", "ids": [job.id]}))
        assert file.exists() == stays


def test_a_database_out_of_reach_does_not_deafen_the_server(settings, monkeypatch, tmp_path):
    """The worker goes on telling, and its lines go on being heard."""
    lines = [{"event": "ended", "ids": ["x"]}, {"event": "ready"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    start = asyncio.create_subprocess_exec

    async def tell(*words, **options):
        code = f"print({text!r}, flush=True); input(); input()"
        return await start(sys.executable, "-c", code, **options)

    class Fake:
        def get(self, id):
            raise OSError("out of reach")

    async def listen():
        live = Live(settings, Fake())
        await live.start()
        await asyncio.wait_for(live.ready.wait(), 20)
        await live.stop()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", tell)
    asyncio.run(listen())


def test_counting_goes_on_when_the_database_comes_back(settings):
    answers = iter([OSError("out of reach"), 3])

    def count():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run():
        service = Service(settings)
        service.jobs.count = count
        task = asyncio.create_task(service._keep_counting())
        while service.open != 3:
            await asyncio.sleep(0.05)
            assert not task.done()
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_line_without_end_ends_the_worker_and_not_the_queue(settings, monkeypatch):
    start, codes = asyncio.create_subprocess_exec, []

    async def tell(*words, **options):
        ready = 'print(\'{"event": "ready"}\', flush=True);'
        codes.append(ready + ("" if codes else "print('x' * 300_000, flush=True);") + "input()")
        return await start(sys.executable, "-c", codes[-1] + ";input()", **options)

    async def listen():
        live = Live(settings, None)
        await live.start()
        while len(codes) < 2 or not live.ready.is_set():
            await asyncio.sleep(0.02)
        assert (live.deaths, live._task.done()) == (1, False)
        await live.stop()

    monkeypatch.setattr(live_module, "LINE", 2**16)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", tell)
    asyncio.run(asyncio.wait_for(listen(), 60))


def test_a_worker_that_is_being_started_is_stopped(settings, monkeypatch):
    start = asyncio.create_subprocess_exec

    async def slowly(*_words, **options):
        await asyncio.sleep(0.2)
        return await start(sys.executable, "-c", "import time; time.sleep(600)", **options)

    async def stop():
        live = Live(settings, None)
        await live.start()
        await asyncio.sleep(0.1)
        await live.stop()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    asyncio.run(asyncio.wait_for(stop(), 60))


def test_a_cancelled_job_is_heard_of_before_there_is_a_worker(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"cancel": "x"}\n'))
    monkeypatch.setattr(os, "_exit", lambda status: None)
    cancelled = deque()
    process._listen(cancelled, [])
    assert list(cancelled) == ["x"]


def test_those_that_find_no_place_are_told_at_once(tmp_path, monkeypatch):
    """Not after the others' pictures were written."""
    accepted = []

    def slowly(*arguments):
        time.sleep(0.3)
        accepted.append(accept(*arguments))
        return accepted[-1]

    async def submit(service):
        begin = time.monotonic()
        try:
            await service.submit(lambda: (Drawing(prompt="a cat"), {}))
        except QueueFull:
            return time.monotonic() - begin
        return None

    async def run():
        service = Service(Settings(data_dir=tmp_path, max_queue=2))
        return await asyncio.gather(*(submit(service) for _ in range(12)))

    monkeypatch.setattr(service, "accept", slowly)
    refused = [seconds for seconds in asyncio.run(run()) if seconds is not None]
    assert (len(accepted), len(refused)) == (2, 10)
    assert max(refused) < 0.2


def test_a_worker_that_cannot_start_ends(settings):
    """The next one may: a database comes back."""
    (settings.data_dir / "jobs.sqlite").mkdir()
    command = (sys.executable, "-m", "latentgen.server.process")
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as worker:
        worker.stdin.write(settings.to_json())
        worker.stdin.flush()
        try:
            assert worker.wait(120) == 1
        finally:
            worker.kill()


def test_a_default_model_that_was_replaced_has_its_own_defaults(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "mine")
    own = folder / "latentgen.json"
    settings = Settings(data_dir=tmp_path, model=str(folder))
    before = settings.models()["mine"]
    own.write_text('{"num_inference_steps": 3}')
    assert settings.models()["mine"].num_inference_steps == 3
    own.write_text('{"num_inf')  # half of a copy
    assert settings.models()["mine"] == before


def test_a_hub_is_asked_once(settings, monkeypatch, tmp_path):
    asked = []

    def fetch(*_arguments):
        asked.append(1)
        return Path(DEFAULT_MODEL)

    monkeypatch.setattr(modelfolder, "fetch", fetch)
    settings = Settings(data_dir=tmp_path, model="someone/some-model")
    assert next(iter(settings.models())) == next(iter(settings.models())) == "someone/some-model"
    assert len(asked) == 1


def test_what_a_job_started_from_is_deleted_when_it_has_ended(settings):
    image = Image.new("RGB", (64, 64))
    service = Service(settings)

    def put():
        job = accept(Drawing(prompt="a cat", strength=0.5), settings, {"image": image})
        service.jobs.put(job)
        return job, job.input_file(settings, "image")

    (job, file), (_, other) = put(), put()
    stray = settings.inputs / f"{'0' * 36}-image.png"
    stray.touch()
    service._tidy(3600)
    assert file.exists()
    assert stray.exists()
    service._tidy()
    assert file.exists()
    assert not stray.exists()
    asyncio.run(service.live.cancel(job.id))
    assert not file.exists()
    assert other.exists()
    file.touch()
    (picture,) = job.output_files(settings)
    picture.parent.mkdir(parents=True)
    picture.touch()  # in its last step, when the server was killed
    service._tidy()
    assert not file.exists()
    assert not picture.exists()


def test_a_database_belongs_to_one_server(postgres, settings):
    refused = pytest.raises(InvalidRequest, match="another server uses it")
    with alone(settings.database), alone(settings.database), alone(postgres):  # noqa: SIM117
        with refused, alone(postgres):
            pass
    with alone(postgres):
        pass


def test_errors_show_a_picture_by_its_size():
    assert "a picture of 8 x 9" in str(InvalidRequest("image", Image.new("L", (8, 9)), "none"))
