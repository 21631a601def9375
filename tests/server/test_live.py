"""What the server makes of what its worker tells."""

import asyncio
import json
import sys

import pytest

from latentgen.server.drawing import Drawing, accept
from latentgen.server.jobs import Jobs, JobState, QueueFull
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
