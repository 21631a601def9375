"""What a reviewer found: each answered wrongly once."""

import base64
import io
import json
import struct

import pytest
from PIL import Image

from latentgen import metadata

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
        ("/sdapi/v1/txt2img", {"override_settings_restore_afterwards": False}),
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
