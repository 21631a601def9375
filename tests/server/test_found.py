"""What a reviewer found: each answered wrongly once."""

import asyncio
import base64
import errno
import io
import json
import os
import re
import resource
import signal
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Running
from PIL import Image

from latentgen import InvalidRequest, metadata
from latentgen.outputs import write_file
from latentgen.server import openai
from latentgen.server.drawing import Drawing, accept
from latentgen.server.jobs import JobState, alone
from latentgen.server.settings import Settings

UPRIGHT = Image.new("RGB", (32, 64), "red")


def encoded(image: Image.Image, form: str = "PNG", **more) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **more)
    return stream.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def photo() -> bytes:
    """A camera's JPEG: lying on its side, with a note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(UPRIGHT.rotate(90, expand=True), "JPEG", exif=exif)


def commented(kind: int, count: int, value: bytes) -> bytes:
    """A PNG whose EXIF comment is of another type than a comment has."""
    pointer = struct.pack("<HHHII", 1, 0x8769, 4, 1, 26) + bytes(4)
    comment = struct.pack("<HHHI", 1, 0x9286, kind, count) + value + bytes(4)
    return encoded(UPRIGHT, exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + pointer + comment)


def test_a_picture_is_not_made_larger_before_its_size_is_checked(server):
    asked = {
        "prompt": "a",
        "init_images": [text(encoded(UPRIGHT))],
        "width": 10**5,
        "height": 10**5,
    }
    answer = server.http.post("/sdapi/v1/img2img", json=asked)
    assert answer.status_code == 400
    assert "pixels" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (4, 1, struct.pack("<I", 4_000_000_000)),
        (3, 2, struct.pack("<HH", 300, 400)),
        (12, 9, b"????"),
    ],
)
def test_a_comment_that_is_no_text_is_none(server, kind, count, value):
    asked = {"image": text(commented(kind, count, value))}
    answer = server.http.post("/sdapi/v1/png-info", json=asked)
    assert (answer.status_code, answer.json()["items"]) == (200, {})


def test_a_photo_is_masked_as_it_is_seen(server):
    mask = Image.new("RGBA", UPRIGHT.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 16))
    files = {"image": ("a.jpg", photo()), "mask": ("m.png", encoded(mask))}
    fields = {"prompt": "a cat", "steps": "2", "response_format": "b64_json"}
    answer = server.http.post("/v1/images/edits", files=files, data=fields)
    assert answer.status_code == 200, answer.text
    drawn = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert drawn.size == UPRIGHT.size
    asked = {"prompt": "a", "init_images": [text(photo())], "width": 32, "height": 64, "steps": 2}
    asked["mask"] = text(encoded(mask.getchannel("A").point(lambda value: 255 - value)))
    assert server.http.post("/sdapi/v1/img2img", json=asked).status_code == 200


def fingerprint(server, job: dict) -> str:
    """Of the picture that a job started from, as its own picture tells."""
    data = server.http.get(job["images"][0]["url"]).content
    return json.loads(Image.open(io.BytesIO(data)).info["latentgen"])["pictures"]["image"]


def test_what_is_transparent_is_white_everywhere(server):
    clear = encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
    ours = server.submit(image=text(clear), strength=0.5, seed=3, steps=4, guidance_scale=7)
    server.ended(ours)
    asked = {"prompt": "a cat", "init_images": [text(clear)], "denoising_strength": 0.5, "seed": 3,
             "steps": 4, "width": 32, "height": 32, "cfg_scale": 7,
             "sampler_name": "DDIM"}  # fmt: skip
    theirs = server.http.post("/sdapi/v1/img2img", json=asked | {"save_images": True}).json()
    assert theirs["images"], theirs
    white = metadata.fingerprint(Image.new("RGB", (32, 32), "white"))
    for job in server.http.get("/jobs?limit=2").json()["jobs"]:
        assert fingerprint(server, job) == white
    assert not list(server.home.glob("inputs/*"))


def test_automatic_is_what_the_webui_means_by_it(server):
    for name, wanted in (("DPM++ 2M", "Karras"), ("DPM++ 2M SDE", "Exponential")):
        for kind in ("automatic", None):
            asked = {"prompt": "a", "sampler_name": name, "scheduler": kind, "steps": 2,
                     "width": 32, "height": 32}  # fmt: skip
            info = server.http.post("/sdapi/v1/txt2img", json=asked).json()["info"]
            assert f"Schedule type: {wanted}" in json.loads(info)["infotexts"][0]


def test_they_are_refused_and_not_broken(server):
    origin = server.http.get("/jobs", headers={"Origin": "http://[::1"})
    assert origin.status_code == 403
    files = {"image": ("a.png", encoded(UPRIGHT))}
    for value in ("[x", "[" * 100_000, "style"):
        answer = server.http.post(
            "/v1/images/edits", files=files, data={"prompt": "a", "loras": value}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
    for path, asked in (
        ("/v1/images/generations", {"stream": True, "response_format": "url"}),
        ("/sdapi/v1/png-info", {"image": text(encoded(UPRIGHT)), "colour": 1}),
        (
            "/sdapi/v1/txt2img",
            {
                "override_settings": {"samples_format": "jpg"},
                "override_settings_restore_afterwards": False,
            },
        ),
    ):
        answer = server.http.post(path, json={"prompt": "a", **asked})
        assert answer.status_code == 400, (path, answer.text)
    assert server.http.get("/jobs/%00").status_code == 404


def test_a_picture_with_an_endless_prompt_has_no_variations(server):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a" * 30_000 + "\nSteps: 2, Sampler: DDIM, CFG scale: 2, Seed: 1")
    files = {"image": ("a.png", encoded(UPRIGHT, pnginfo=info))}
    answer = server.http.post("/v1/images/variations", files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_strays_among_the_pictures_do_no_harm(server):
    server.ended(server.submit())
    stray = server.home / "outputs" / ".DS_Store"
    stray.write_bytes(b"")
    assert server.http.get("/images").json()["images"]
    stray.unlink()


def test_the_running_job_is_found_behind_those_that_wait(server):
    long = {"steps": 900, "width": 256, "height": 256, "guidance_scale": 7}
    running = server.submit(**long)
    waiting = [server.submit(**long, seed=k, scheduler="euler") for k in range(20)]
    while server.job(running)["status"] == "queued":
        pass
    found = server.http.get("/jobs?status=running&limit=1").json()["jobs"]
    for id in [running, *waiting]:
        server.http.post(f"/jobs/{id}/cancel")
    assert [job["id"] for job in found] == [running]


def test_methods_that_somebody_invents_are_one_row_of_the_metrics(server):
    server.http.request("FOO1", "/health")
    assert "FOO1" not in server.http.get("/metrics").text


def resident(server) -> int:
    """Bytes of memory of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="tells the memory of a process")
def test_clients_that_wait_hold_no_pictures_in_memory(server):
    server.submit(width=256, height=256, steps=900, n=8)
    clear = encoded(Image.new("RGBA", (1536, 1536)))
    waiting = []

    def edit():
        files = {"image": ("x.png", clear, "image/png")}
        server.http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files, timeout=120)

    def accepted(count):
        waiting.append(threading.Thread(target=edit))
        waiting[-1].start()
        while server.http.get("/jobs?status=queued").json()["jobs"][count - 1 :] == []:
            time.sleep(0.05)

    for count in range(1, 9):  # each thread of the server keeps some of what it had, once
        accepted(count)
    before = resident(server)
    for count in range(9, 17):
        accepted(count)
    assert resident(server) - before < 60_000_000  # once it was 21 MB each
    for job in server.http.get("/jobs?status=queued").json()["jobs"]:
        server.http.post(f"/jobs/{job['id']}/cancel")
    for thread in waiting:
        thread.join()


def test_signals_to_the_whole_group_do_not_end_the_worker(server):
    """systemd and terminals send them so; a worker that dies counts as one that a job killed."""
    worker = server.worker()
    id = server.submit(width=128, height=128, steps=60)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(worker, number)
    assert server.ended(id)["status"] == "done"
    assert server.worker() == worker


def test_ctrl_c_ends_a_server_without_a_complaint(tiny, tmp_path):
    server = Running(tmp_path / "home", tiny).start().wait("")
    server.stop()
    assert server.process.returncode == 0
    assert "nterrupt" not in server.log.read_text()


def test_a_damaged_lora_is_told_by_its_name(server):
    file = server.home / "loras" / "damaged.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"nothing of the kind")
    try:
        answer = server.http.post("/jobs", json={"prompt": "a cat", "loras": [{"name": "damaged"}]})
    finally:
        file.unlink()
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("loras='damaged': damaged or not")


def test_no_answer_tells_where_things_lie(tiny, tmp_path, monkeypatch):
    settings = Settings(model=str(tiny), data_dir=tmp_path)
    assert settings.told(f"model='{tiny}': no") == "model='tiny': no"
    assert settings.told(f"{tmp_path}/loras/x") == "LATENTGEN_HOME/loras/x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTGEN_HOME", "d")
    settings = Settings(model=str(tiny))
    assert settings.told("guidance_scale=0.5") == "guidance_scale=0.5"


@pytest.mark.parametrize(
    "override",
    [
        {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        {"sd_vae": None, "eta_noise_seed_delta": 0},
    ],
)
def test_settings_of_the_webui_that_ask_for_nothing_are_taken(server, override):
    asked = {"prompt": "a cat", "steps": 2, "width": 32, "height": 32, "clip_skip": 1}
    asked |= {"override_settings": override, "override_settings_restore_afterwards": False}
    assert server.http.post("/sdapi/v1/txt2img", json=asked).status_code == 200
    assert server.http.post("/sdapi/v1/options", json=override).status_code == 200
    override = override | {"CLIP_stop_at_last_layers": 2}
    asked["override_settings"] = override
    for path, body in (("txt2img", asked), ("options", override)):
        answer = server.http.post(f"/sdapi/v1/{path}", json=body)
        assert answer.status_code == 400
        assert "CLIP_stop_at_last_layers" in answer.json()["detail"]


def test_a_negative_prompt_without_guidance_is_refused_and_the_webui_passes_over_it(server):
    asked = {"prompt": "a cat", "negative_prompt": "red", "steps": 2}
    told = server.http.post("/jobs", json=asked | {"guidance_scale": 1})
    assert told.status_code == 400
    assert "no effect with guidance_scale 1" in told.json()["error"]["message"]
    asked |= {"cfg_scale": 1, "width": 32, "height": 32}
    assert server.http.post("/sdapi/v1/txt2img", json=asked).status_code == 200


def test_a_job_never_ends_before_it_began(server):
    for state in (server.ended(server.submit()), server.http.post("/jobs", json={"prompt": "a"})):
        if not isinstance(state, dict):
            server.http.post(f"/jobs/{state.json()['id']}/cancel")
            state = server.ended(state.json()["id"])
        assert state["ended"] >= state["created"]


def test_a_stream_of_events_is_kept_back_by_no_proxy(server):
    asked = {"prompt": "a cat", "stream": True, "steps": 2}
    answer = server.http.post("/v1/images/generations", json=asked)
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == (
        "no-cache",
        "no",
    )


def test_a_stream_that_waits_says_that_it_lives(server, monkeypatch, tmp_path):
    async def waits(id):
        for _ in range(4):
            yield JobState(id, "queued", job)
        yield JobState(id, "cancelled", job, ended=1.0)

    job = accept(Drawing(prompt="a"), Settings(data_dir=tmp_path))
    monkeypatch.setattr(openai, "PING", 0.0)
    live = SimpleNamespace(follow=waits, running={})
    service = SimpleNamespace(live=live, settings=Settings(data_dir=tmp_path), leaving=False)

    async def told():
        return [one async for one in openai._events(service, job, "image_generation", {})]

    *pings, last = asyncio.run(told())
    assert pings == [b": waiting\n\n"] * 4
    assert b"the job was cancelled" in last


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://us:secret@127.0.0.1/x", "PostgreSQL"),
        ("postgres:/bad", "not a URL"),
        ("postgresql://us:secret@127.0.0.1:1/x", "cannot be reached"),
    ],
)
def test_a_database_that_is_none_is_told_in_a_line(url, told):
    with pytest.raises(InvalidRequest, match=told) as refused, alone(url):
        pass
    assert refused.value.field == "database_url"
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(_number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x.png", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")
def test_a_disk_that_is_full_is_told_and_nothing_stays(server):
    asked = {"prompt": "a", "steps": 2}
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        answers = [
            server.http.post("/jobs", json=asked),
            server.http.post("/jobs", json=asked | {"image": text(encoded(UPRIGHT))}),
            server.http.post("/v1/images/generations", json={"prompt": "a"}),
        ]
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
    for answer in answers:
        assert answer.status_code == 503
        assert "cannot read or write its files" in answer.json()["error"]["message"]
    assert list((server.home / "inputs").iterdir()) == []
    assert server.ended(server.submit())["status"] == "done"


def test_a_prompt_that_a_jpeg_cannot_hold_is_refused_before_it_is_drawn(server):
    asked = {"prompt": "猫" * 14_500, "output_format": "jpeg"}
    answer = server.http.post("/jobs", json=asked)
    assert answer.status_code == 400
    assert "cannot hold" in answer.json()["error"]["message"]


def test_both_names_of_a_field_are_told_to_be_one(server):
    answer = server.http.post("/jobs", json={"prompt": "a", "steps": 2, "num_inference_steps": 3})
    assert answer.status_code == 400
    assert "the same as num_inference_steps" in answer.json()["error"]["message"]


def test_no_other_page_shows_this_one_in_a_frame(server):
    for path in ("/", "/health", "/jobs"):
        headers = server.http.get(path).headers
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["content-security-policy"] == "frame-ancestors 'self'"
        assert headers["x-content-type-options"] == "nosniff"
