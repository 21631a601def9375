"""Our own API, and the promise of the queue: what was accepted ends once, whatever is killed."""

import base64
import io
import os
import random
import signal
import threading
import time

import pytest
from conftest import Running
from PIL import Image

from latentgen import LatentDiffusion, metadata

LONG = {"steps": 900, "num_images": 16, "height": 512, "width": 512}  # minutes of drawing


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def fetch(server: Running, url: str) -> bytes:
    answer = server.http.get(url)
    assert answer.status_code == 200
    return answer.content


def test_a_job_gives_the_pictures_that_the_library_gives(server, tiny, tmp_path):
    asked = {"prompt": "a dog", "negative_prompt": "red", "guidance_scale": 3, "seed": 7}
    id = server.submit(**asked, n=2, scheduler="Euler a", output_format="webp", quality=90)
    state = server.ended(id)
    assert (state["status"], state["seeds"], state["model"]) == ("done", [7, 8], "tiny")
    own = LatentDiffusion.from_pretrained(tiny, device="cpu").generate(
        **asked, num_images=2, num_inference_steps=2, scheduler="euler_a"
    )
    for k, image in enumerate(state["images"]):
        assert image["seed"] == 7 + k
        data = fetch(server, image["url"])
        assert Image.open(io.BytesIO(data)).tobytes() == (
            Image.open(io.BytesIO(metadata.encode_result(own, k, "WEBP", 90))).tobytes()
        )
        (tmp_path / "x.webp").write_bytes(data)
        assert metadata.read(tmp_path / "x.webp").record["request"] == state["request"]
    assert [one["id"] for one in server.http.get("/jobs?limit=1").json()["jobs"]] == [id]
    assert state["images"][0]["url"] in server.http.get("/images").json()["images"]


def test_inpainting_keeps_the_rest(server, picture, mask):
    fields = {"image": png(picture), "mask_image": "data:image/png;base64," + png(mask)}
    state = server.ended(server.submit(**fields, strength=0.8, steps=5))
    image = Image.open(io.BytesIO(fetch(server, state["images"][0]["url"])))
    black = mask.point(lambda value: 255 - value)
    outside = Image.new("RGB", picture.size)
    assert Image.composite(image, outside, black).tobytes() == (
        Image.composite(picture, outside, black).tobytes()
    )
    assert image.tobytes() != picture.tobytes()


def test_events_tell_all_steps_and_the_previews_asked_for(server):
    id = server.submit(steps=6, previews=2)
    events = server.events(id)
    kinds = [kind for kind, _ in events]
    assert kinds.count("preview") == 2
    assert events[-1][0] == "status"
    assert events[-1][1]["status"] == "done"
    told = [data["index"] for kind, data in events if kind == "progress"]
    assert told == sorted(told)
    first = next(data for kind, data in events if kind == "preview")
    assert Image.open(io.BytesIO(base64.b64decode(first["png"]))).size == (32, 32)
    assert server.events(id) == [events[-1]]  # it has ended: that is all there is


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_when_the_server_is_stopped_is_told_so_and_the_job_stays(tiny, tmp_path, stream):
    server = Running(tmp_path / "home", tiny, "--max-steps", "900").start()
    asked = {"prompt": "a cat", "stream": stream, "steps": 900, "size": "512x512", "n": 8}
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(server.http.post("/v1/images/generations", json=asked))
    )
    try:
        server.wait()
        waiting.start()
        end = time.monotonic() + 60
        while not (jobs := server.http.get("/jobs").json()["jobs"]):
            assert time.monotonic() < end
            time.sleep(0.05)
        id = jobs[0]["id"]
        server.drawn(id, 3)
        server.process.send_signal(signal.SIGTERM)
        waiting.join(60)
        server.process.wait(30)
        state = server.start().wait("").job(id)
    finally:
        server.process.kill()
    assert state["status"] in ("queued", "running")
    told = f"the server is being stopped; the job {id} stays in the queue"
    if stream:
        assert told in answers[0].text
    else:
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["message"] == told


def test_cancelling_stops_a_job_and_leaves_no_picture(server):
    id, waiting = server.submit(**LONG), server.submit(**LONG, seed=5)
    server.drawn(id, 3)
    for one in (id, waiting):
        state = server.http.post(f"/jobs/{one}/cancel").json()
        assert state["status"] == "cancelled", state
    assert server.ended(server.submit())["status"] == "done"  # the worker is free again
    assert [server.job(one)["status"] for one in (id, waiting)] == ["cancelled"] * 2
    assert not list(server.home.glob(f"outputs/*/{id}*"))
    assert server.http.post(f"/jobs/{id}/cancel").json()["status"] == "cancelled"


def test_deleting_leaves_nothing(server, picture):
    for fields in ({"image": png(picture), "strength": 0.5, "steps": 4}, LONG):
        id = server.submit(**fields)
        if fields is not LONG:
            server.ended(id)
        assert server.http.delete(f"/jobs/{id}").json() == {"deleted": id}
        assert server.http.get(f"/jobs/{id}").status_code == 404
        assert not list(server.home.rglob(f"*{id}*"))


WRONG = [
    ({"prompt": ""}, "prompt", "say what to draw"),
    ({"colour": "red"}, "colour", "no such field"),
    ({"steps": 0}, "steps", "greater than or equal to 1"),
    ({"steps": 1000}, "num_inference_steps", "at most 900"),
    ({"n": 65}, "num_images", "between 1 and 64"),
    ({"n": 20}, "num_images", "at most 16"),
    ({"width": 30}, "width", "multiple of 8"),
    ({"width": 4096, "height": 4096}, "width", "pixels in all"),
    ({"scheduler": "nobody"}, "scheduler", "no such scheduler"),
    ({"model": "../tiny"}, "model", "one of tiny"),
    ({"loras": [{"name": "/etc/passwd"}]}, "loras", "no LoRA of that name"),
    ({"prompt": "a <lora:../x:1>"}, "loras", "no LoRA of that name"),
    ({"image": "http://127.0.0.1/x.png"}, "image", "not fetched"),
    ({"image": "file:///etc/passwd"}, "image", "not fetched"),
    ({"image": "%%%"}, "image", "not base64"),
    ({"image": base64.b64encode(b"no picture").decode()}, "image", "no picture"),
    ({"mask_image": "x"}, "mask_image", "not base64"),
    ({"strength": 0.5}, "strength", "goes with an image"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"guidance_scale": "NaN"}, "guidance_scale", ""),
    ({"output_format": "gif"}, "output_format", "png"),
    ({"quality": 50}, "quality", "PNG loses nothing"),
    ({"output_format": "jpeg", "prompt": "猫" * 12_500}, "output_format", "cannot hold"),
    ({"seed": 2**63 - 64}, "seed", "less than or equal"),
]


@pytest.mark.parametrize(("fields", "named", "told"), WRONG)
def test_what_is_wrong_is_named(server, fields, named, told):
    answer = server.http.post("/jobs", json={"prompt": "a cat", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(named)
    assert told in error["message"]


@pytest.mark.parametrize("path", ["/jobs", "/images"])
def test_so_it_is_in_a_query(server, path):
    answer = server.http.get(path, params={"bogus": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "bogus")


def test_a_picture_that_was_deleted_is_told_no_more(server):
    id = server.submit(num_images=2)
    first, second = server.ended(id)["images"]
    (server.home / "outputs" / first["url"].removeprefix("/images/")).unlink()
    assert server.job(id)["images"] == [second]


def test_a_decompression_bomb_is_refused_by_its_header(server):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG", compress_level=9)
    text = base64.b64encode(bomb.getvalue()).decode()
    answer = server.http.post("/jobs", json={"prompt": "a", "image": text})
    assert answer.status_code == 400
    assert "at most" in answer.json()["error"]["message"]


def test_a_broken_model_fails_its_jobs_alone(server, tiny):
    folder = server.home / "models" / "broken"
    parts = LatentDiffusion.from_pretrained(tiny, device="cpu")
    parts.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    parts.save_pretrained(folder)
    failed = server.ended(server.submit(model="broken"))
    assert failed["status"] == "failed"
    assert "cannot draw" in failed["error"]
    assert server.ended(server.submit())["status"] == "done"


def test_more_than_may_wait_is_refused_at_once(server):
    long = server.submit(**LONG)
    ids, refused = [], []
    for _ in range(50):
        begin = time.monotonic()
        answer = server.http.post("/jobs", json={"prompt": "a", **LONG})
        if answer.status_code == 429:
            refused.append(time.monotonic() - begin)
            assert int(answer.headers["Retry-After"]) >= 1
        else:
            ids.append(answer.json()["id"])
    assert len(ids) < 40
    assert refused
    assert sorted(refused)[len(refused) // 2] < 0.1
    for id in [*ids, long]:
        server.http.post(f"/jobs/{id}/cancel")
    assert {server.ended(id)["status"] for id in ids} == {"cancelled"}


def test_drawing_gives_way_to_answering(server):
    server.ended(server.submit())  # so there is a worker
    nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (server.process.pid, server.worker())]
    assert nice[0] < nice[1]


def test_jobs_that_are_alike_are_drawn_together(server):
    first = server.submit(**LONG)
    ids = [server.submit(seed=k, prompt=f"a {k}") for k in range(4)]
    server.http.post(f"/jobs/{first}/cancel")
    for k, id in enumerate(ids):
        state = server.ended(id)
        alone = server.ended(server.submit(seed=k, prompt=f"a {k}"))
        one, other = (fetch(server, s["images"][0]["url"]) for s in (state, alone))
        pixels = [Image.open(io.BytesIO(data)).tobytes() for data in (one, other)]
        assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1
    assert "latentgen_jobs_open" in server.http.get("/metrics").text


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_nothing_is_lost_whatever_is_killed(tmp_path, tiny, database, request):
    """Small jobs, while the worker and the server are killed at random moments."""
    flags = ["--max-queue", "500"]
    if database == "postgres":
        flags += ["--database-url", request.getfixturevalue("postgres")]
    server = Running(tmp_path / "home", tiny, *flags).start().wait("")
    moment = random.Random(0)
    accepted = []
    for kill in ("worker", "server", "worker"):
        until = time.monotonic() + moment.uniform(0.5, 3)
        while time.monotonic() < until:
            accepted.append(server.submit(steps=moment.randint(1, 20), seed=len(accepted)))
            time.sleep(0.02)
        pid = server.worker() if kill == "worker" else server.process.pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        if kill == "server":
            server.process.wait()
            server.start().wait("")
    ended = {}
    for id in accepted:
        state = server.ended(id, seconds=120)
        ended[id] = state["ended"]
        if state["status"] == "done":
            assert len(list(server.home.glob(f"outputs/*/{id}*"))) == 1
        else:
            assert "died" in state["error"]
    assert len(accepted) > 20
    assert {id: server.job(id)["ended"] for id in accepted} == ended
    assert not list(server.home.glob("outputs/*/.*"))
    server.stop()


def test_a_job_that_kills_the_worker_fails_after_three_more_tries(tmp_path, tiny):
    server = Running(tmp_path / "home", tiny, "--max-steps", "900").start().wait()
    id = server.submit(**LONG)
    deaths = 0
    while (state := server.job(id))["ended"] is None:
        if (state["progress"] or {"index": 0})["index"] > 0:
            os.kill(server.worker(), signal.SIGKILL)
            deaths += 1
            while server.job(id)["progress"] is not None:
                time.sleep(0.02)
        time.sleep(0.02)
    assert (state["status"], deaths) == ("failed", 4)
    assert "died 4 times" in state["error"]
    server.stop()
