"""What the page must not do: fetch, open, decode, keep or tell what nobody asked it to."""

import asyncio
import io
import json
import logging
import os
import shutil
import socket
import sqlite3
import uuid
from pathlib import Path
from types import SimpleNamespace

import fakes
import gradio as gr
import pytest
import sqlalchemy as sa
import torch
from conftest import Running
from PIL import Image, PngImagePlugin

from latentgen import controlnet, metadata
from latentgen.errors import InvalidRequest
from latentgen.lora import Layer, Lora, write_lora
from latentgen.server import page
from latentgen.server.drawing import accept
from latentgen.server.jobs import QueueFull
from latentgen.server.settings import Settings

IMAGES = {".png", ".jpeg", ".jpg", ".webp"}
BROKEN = "Something went wrong here; the log tells what"
FORM = {
    "prompt": "a cat",
    "negative_prompt": "",
    "model": None,
    "scheduler": "",
    "num_inference_steps": 4,
    "guidance_scale": 5,
    "seed": "7",
    "num_images": 1,
    "width": 32,
    "height": 32,
    "loras": [],
    "lora_weight": 1,
    "strength": 0.8,
    "mask_blur": 0,
    "padding_mask_crop": None,
    "controlnet": "",
    "controlnet_conditioning_scale": 1,
    "control_guidance_start": 0,
    "control_guidance_end": 1,
    "eta": 0,
    "guidance_rescale": 0,
    "output_format": "png",
}
assert tuple(FORM) == page.FIELDS


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny):
    """A server of our own: with a folder for temporary files, and an upload of its last life."""
    home, temporary = tmp_path_factory.mktemp("safe") / "home", tmp_path_factory.mktemp("temporary")
    (home / "uploads").mkdir(parents=True)
    shutil.copytree(fakes.controlnet(), home / "controlnets" / "edges")
    (home / "uploads" / "left.png").write_bytes(b"left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        running = Running(home, tiny).start()
    running.temporary = temporary
    yield running.wait()
    running.stop()
    assert not (home / "uploads").exists()


@pytest.fixture
def settings(server, tiny, monkeypatch):
    """The server's own."""
    monkeypatch.setenv("LATENTGEN_HOME", str(server.home))
    return Settings(model=str(tiny), data_dir=server.home)


@pytest.fixture
def quiet(server):
    """Nothing that a test gets refused leaves a trace in the log."""
    before = server.log.stat().st_size
    yield
    assert "Traceback" not in server.log.read_text()[before:]


def happenings(server, element: str, event: str, data: list, **more) -> list[dict]:
    """What the page answers when something happens to an element of it."""
    config = server.http.get("/config").json()
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    function = next(d for d in config["dependencies"] if [ids[element], event] in d["targets"])
    session = uuid.uuid4().hex
    asked = {"fn_index": function["id"], "session_hash": session, "data": data, **more}
    assert server.http.post("/gradio_api/queue/join", json=asked).status_code == 200
    told = []
    with server.http.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                told.append(json.loads(line.removeprefix("data:")))
            if told and told[-1]["msg"] == "process_completed":
                break
    return told


def draw(server, editor=None, mask=None, seen=None, **fields) -> list[dict]:
    """Press the button, with a form."""
    values = (FORM | {"model": "tiny"} | fields).values()
    return happenings(server, "draw-button", "click", [editor, mask, seen, *values])


def refusal(told: list[dict]) -> str:
    assert told[-1]["success"] is False
    return told[-1]["output"]["error"]


def file(path: str | None, **more) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def upload(server, data: bytes, name: str = "picture.png") -> str:
    answer = server.http.post("/gradio_api/upload", files={"files": (name, data)})
    return answer.json()[0]


def encoded(image: Image.Image, **more) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **more)
    return stream.getvalue()


def edited(background: dict, layers: list[dict] = ()) -> dict:
    return {"background": background, "layers": list(layers), "composite": None}


def newest(server) -> str | None:
    return next((job["id"] for job in server.http.get("/jobs?limit=1").json()["jobs"]), None)


def pictures_on_disk(server) -> set[Path]:
    folders = (server.home, server.temporary)
    return {f for folder in folders for f in folder.rglob("*") if f.suffix in IMAGES}


# URLs and paths.


@pytest.mark.usefixtures("quiet")
def test_no_url_in_a_request_is_ever_fetched(server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "name.invalid"):
            url = f"http://{host}/picture.png"
            for told in (
                happenings(server, "dropped", "change", [file(url)]),
                draw(server, mask=file(url)),
                draw(server, editor=edited(file(url))),
                draw(server, prompt=file(url)),  # Gradio looks for files everywhere
            ):
                assert "URLs are not fetched" in refusal(told)
            for ask in (server.http.get, server.http.head):
                assert ask(f"/gradio_api/file={url}").status_code == 403
                assert ask(f"/gradio_api/proxy={url}").status_code == 400
            assert "URLs are not fetched" in server.http.get(f"/gradio_api/file={url}").text
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.usefixtures("quiet")
def test_no_other_file_of_this_machine_is_opened(server, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "a secret\nSteps: 7, Sampler: Euler a, CFG scale: 4, Seed: 5")
    (tmp_path / "mine.png").write_bytes(encoded(Image.new("RGB", (32, 32)), pnginfo=info))
    mine = file(str(tmp_path / "mine.png"))
    for told in (
        happenings(server, "dropped", "change", [mine]),
        draw(server, mask=mine),
        draw(server, editor=edited(mine)),
    ):
        assert "Only files that were uploaded" in refusal(told)
        assert "secret" not in json.dumps(told)


def test_what_the_page_does_not_use_is_not_there(server):
    assert server.http.get("/gradio_api/deep_link?session_hash=x").status_code == 404
    assert server.http.post("/gradio_api/process_recording").status_code == 404
    assert server.http.get("/gradio_api/runs").status_code == 404
    assert server.http.get("/gradio_api/run-history/buckets").status_code == 404


# Sizes.


@pytest.mark.usefixtures("quiet")
def test_a_picture_that_is_too_large_is_refused_by_its_header(server):
    data = encoded(Image.new("1", (9000, 9000)))
    assert len(data) < 20_000
    huge = file(upload(server, data))
    fine = file(upload(server, encoded(Image.new("RGB", (32, 32)))))
    process = Path(f"/proc/{server.process.pid}")
    (process / "clear_refs").write_text("5")  # its peak is now
    before = peak(process)
    for told in (
        draw(server, editor=edited(huge)),
        draw(server, editor=edited(fine, [huge])),
        draw(server, editor=edited(fine), mask=huge),
        draw(server, seen=huge, controlnet="edges"),
    ):
        assert f"at most {2048 * 2048} pixels" in refusal(told)
    [described] = happenings(server, "dropped", "change", [huge])[-1:]
    assert f"at most {2048 * 2048} pixels" in described["output"]["data"][0]
    assert peak(process) - before < 40_000  # a byte for each of its pixels would be 79,000


def peak(process: Path) -> int:
    """The most memory that a process had, in KiB."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.usefixtures("quiet")
def test_pictures_come_as_uploads_only(server):
    inline = {
        "path": None,
        "url": "data:image/png;base64,AAAA",
        "meta": {"_type": "gradio.FileData"},
    }
    fine = file(upload(server, encoded(Image.new("RGB", (32, 32)))))
    assert "upload the file itself" in refusal(draw(server, editor=edited(fine), mask=inline))
    answer = server.http.post(
        "/gradio_api/component_server",
        data={"component_id": "21", "session_hash": "x", "fn_name": "accept_blobs"},
        files={"file": b"x" * 1000},
    )
    assert answer.status_code == 404
    assert "load it again" in refusal(draw(server, editor=edited(file(f"{fine['path']}.gone"))))
    assert "goes with a picture" in refusal(draw(server, mask=fine))


def test_what_is_painted_is_the_mask(settings, tmp_path):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "below.png")
    layer = Image.new("RGBA", (64, 32))
    layer.paste((255, 0, 170, 90), (0, 0, 10, 32))
    layer.save(tmp_path / "layer.png")
    below, above = (SimpleNamespace(path=tmp_path / name) for name in ("below.png", "layer.png"))
    picture, mask = page.read_editor(SimpleNamespace(background=below, layers=[above]), settings)
    assert (picture.size, mask.getbbox(), mask.getextrema()) == ((64, 32), (0, 0, 10, 32), (0, 255))
    picture, mask = page.read_editor(SimpleNamespace(background=below, layers=[]), settings)
    assert (picture.size, mask) == ((64, 32), None)
    assert page.read_editor(None, settings) == (None, None)


# Copies.


def test_nothing_of_a_deleted_picture_is_kept_or_served(server):
    before = pictures_on_disk(server)
    told = draw(server)
    assert told[-1]["success"]
    id = newest(server)
    shown = {text for text in texts(told) if text.startswith(("/", "data:", "http"))}
    [address] = [text for text in shown if not text.startswith("data:")]
    assert any(text.startswith("data:image/png") for text in shown)  # previews
    assert server.http.get(address).status_code == 200
    assert pictures_on_disk(server) - before == {
        server.home / "outputs" / address.removeprefix("/images/")
    }
    assert server.http.delete(f"/jobs/{id}").status_code == 200
    assert pictures_on_disk(server) == before
    assert server.http.get(address).status_code == 404
    kept = server.home / "outputs" / address.removeprefix("/images/")
    assert server.http.get(f"/gradio_api/file={kept}").status_code == 403


def texts(value) -> set[str]:
    """Every text in what was told."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return {text for part in parts for text in texts(part)}
    return {value} if isinstance(value, str) else set()


def test_uploads_are_kept_in_the_data_folder_and_not_for_long(server):
    assert not (server.home / "uploads" / "left.png").exists()
    path = Path(upload(server, b"a picture"))
    assert path.is_relative_to(server.home / "uploads")
    assert not (server.temporary / "gradio").exists()
    one = page.build(Settings(data_dir=server.home), lambda: None)
    assert one.delete_cache == (600, 3600)


def test_uploads_go_when_the_server_does(tmp_path):
    async def live() -> None:
        (tmp_path / "uploads").mkdir()
        async with page.emptied(tmp_path / "uploads", None):
            assert not (tmp_path / "uploads").exists()
            (tmp_path / "uploads").mkdir()
        assert not (tmp_path / "uploads").exists()

    asyncio.run(live())


# Settings.


def used(server, settings, job: dict) -> tuple[dict, list[str]]:
    """What the form asks for after "Use these settings" of a job's picture, and what it lacks."""
    picture = server.home / "outputs" / job["images"][0]["url"].removeprefix("/images/")
    values, lost = page.settings_of(picture, settings)
    form = FORM | {"num_inference_steps": 20, "eta": 0.5, "mask_blur": 3, "padding_mask_crop": 9}
    form |= values
    drawing, _ = page.read_form(list(form.values()), None, None, None, settings)
    asked = drawing.model_dump(exclude_none=True)
    return asked | {"steps": asked.pop("num_inference_steps")}, lost


def test_a_controlnet_is_followed(server):
    seen = file(upload(server, encoded(Image.new("RGB", (32, 32), "grey"))))
    fields = {"controlnet": "edges", "controlnet_conditioning_scale": 0.5}
    assert "give one as control_image" in refusal(draw(server, **fields))
    assert draw(server, seen=seen, **fields)[-1]["success"]
    assert draw(server, seen=seen)[-1]["success"]  # it lies there, and nothing follows it
    last, first = server.http.get("/jobs?limit=2").json()["jobs"]
    assert first["request"]["controlnet"]["name"] == "edges"
    assert first["request"]["controlnet_conditioning_scale"] == 0.5
    assert "controlnet" not in last["request"]
    assert pixels(server, first) != pixels(server, last)


def test_a_photo_of_any_size_can_be_redrawn(settings, tmp_path):
    Image.new("RGB", (101, 75), "red").save(tmp_path / "photo.png")
    painted = SimpleNamespace(
        background=SimpleNamespace(path=str(tmp_path / "photo.png")), layers=[]
    )
    form = FORM | {"model": next(iter(settings.models()))}
    drawing, pictures = page.read_form(list(form.values()), painted, None, None, settings)
    assert (drawing.width, drawing.height) == (96, 72)
    assert accept(drawing, settings, pictures).request["width"] == 96


def pixels(server, job: dict) -> bytes:
    answer = server.http.get(job["images"][0]["url"])
    return Image.open(io.BytesIO(answer.content)).tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler": "dpm++_2m", "seed": 11, "steps": 5},
        {"scheduler": "ddim", "eta": 0.3, "guidance_scale": 7.53, "guidance_rescale": 0.7},
        {"prompt": "a <b>cat", "negative_prompt": "a dog, red", "width": 40, "seed": 2**50},
    ],
)
def test_the_settings_of_a_picture_draw_it_again(server, settings, fields):
    first = server.ended(server.submit(**fields))
    asked, lost = used(server, settings, first)
    second = server.ended(server.submit(**asked))
    assert pixels(server, first) == pixels(server, second)
    assert first["request"] == second["request"]
    assert lost == []


def test_one_of_several_pictures_is_drawn_again(server, settings):
    first = server.ended(server.submit(num_images=3, seed=5))
    first["images"] = first["images"][2:]
    asked, _ = used(server, settings, first)
    assert asked["seed"] == 7
    assert pixels(server, first) == pixels(server, server.ended(server.submit(**asked)))


def lora_file(path: Path, seed: int) -> None:
    """A LoRA of one layer of the tiny model, loud enough to change every picture."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v"
    out, width = fakes.parts()["unet"].get_submodule(name).weight.shape
    noise = torch.Generator().manual_seed(seed)
    layer = Layer(torch.randn(2, width, generator=noise), torch.randn(out, 2, generator=noise), 2.0)
    write_lora(Lora(unet={name: layer}, text_encoder={}), path)


def test_loras_of_different_weights_are_used_again(server, settings):
    folder = server.home / "loras"
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(("one", "two", "three")):
        lora_file(folder / f"{name}.safetensors", seed)
    loras = [
        {"name": "one", "weight": 0.3},
        {"name": "two", "weight": -1 / 3},
        {"name": "three", "weight": 1, "text_encoder_weight": 0.25},
    ]
    first = server.ended(server.submit(loras=loras))
    asked, lost = used(server, settings, first)
    tags = "<lora:one:0.3> <lora:two:-0.3333333333333333> <lora:three:0.25:1>"
    assert asked["prompt"] == f"a cat {tags}"
    assert lost == []
    second = server.ended(server.submit(**asked))
    assert pixels(server, first) == pixels(server, second)
    assert first["request"] == second["request"]

    lora_file(folder / "one.safetensors", 9)
    (folder / "two.safetensors").unlink()
    asked, lost = used(server, settings, first)
    assert asked["prompt"] == "a cat <lora:one:0.3> <lora:three:0.25:1>"
    assert lost == ["the LoRA one, which is not here", "the LoRA two, which is not here"]


def test_what_the_form_lacks_is_told(server, settings, tmp_path):
    image = encoded(Image.new("RGB", (32, 32), "grey"))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    answer = server.http.post(
        "/v1/images/edits",
        files={"image": ("a.png", image), "mask": ("b.png", encoded(holes(mask)))},
        data={"prompt": "a cat", "size": "32x32"},
    )
    assert answer.status_code == 200, answer.text
    job = server.http.get("/jobs?limit=1").json()["jobs"][0]
    picture = server.home / "outputs" / job["images"][0]["url"].removeprefix("/images/")
    values, lost = page.settings_of(picture, settings)
    assert values["strength"] == job["request"]["strength"]
    assert lost == ["the picture that it was made from: load it to start from it"]

    record = metadata.read(picture).record
    record["model"] = {"name": "another", "hash": "0123456789"}
    data = metadata.encode(Image.new("RGB", (8, 8)), "PNG", "", record, 95)
    (tmp_path / "other.png").write_bytes(data)
    values, lost = page.settings_of(tmp_path / "other.png", settings)
    assert "model" not in values
    assert lost[0] == "the model another, which is not here"

    told = {"name": "lines", "hash": "0123456789"}
    record["request"] |= {"controlnet": told, "control_guidance_end": 0.5}
    record["pictures"]["control_image"] = "0123"
    (tmp_path / "led.png").write_bytes(
        metadata.encode(Image.new("RGB", (8, 8)), "PNG", "", record, 95)
    )
    again, lost = page.settings_of(tmp_path / "led.png", settings)
    assert again == values
    assert "the ControlNet that it was made with, which is not here" in lost
    shutil.copytree(fakes.controlnet(), server.home / "controlnets" / "lines")
    assert page.settings_of(tmp_path / "led.png", settings) == (again, lost)  # of other weights
    told["hash"] = controlnet.find("lines").hash()
    (tmp_path / "led.png").write_bytes(
        metadata.encode(Image.new("RGB", (8, 8)), "PNG", "", record, 95)
    )
    for name in ("x", {}, {"name": []}, None):
        assert not page.is_here(name)
    again, lost = page.settings_of(tmp_path / "led.png", settings)
    assert again == values | {"controlnet": "lines", "control_guidance_end": 0.5}
    assert "the picture that its ControlNet saw: load it" in lost


def holes(mask: Image.Image) -> Image.Image:
    """As OpenAI has masks: transparent where it is redrawn."""
    return Image.merge("LA", (mask, mask.point(lambda value: 255 - value)))


def test_a_webui_picture_tells_what_is_not_taken_over(settings, tmp_path):
    text = "a cat <lora:gone:0.5>\nSteps: 7, Sampler: Euler a, CFG scale: 4, Seed: 5, Clip skip: 2"
    data = metadata.encode(Image.new("RGB", (8, 8)), "PNG", f"{text}, Steps: x", None, 95)
    (tmp_path / "theirs.png").write_bytes(data)
    values, lost = page.settings_of(tmp_path / "theirs.png", settings)
    assert values | {"prompt": "a cat", "scheduler": "euler_a", "seed": "5"} == values
    assert {"the LoRA gone, which is not here", "Clip skip: 2", "Steps: x"} <= set(lost)


@pytest.mark.parametrize("index", [1, -1, 10**6])
def test_a_damaged_record_is_refused(server, settings, tmp_path, index):
    job = server.ended(server.submit())
    picture = server.home / "outputs" / job["images"][0]["url"].removeprefix("/images/")
    record = metadata.read(picture).record | {"index": index}
    data = metadata.encode(Image.new("RGB", (8, 8)), "PNG", "", record, 95)
    (tmp_path / "damaged.png").write_bytes(data)
    with pytest.raises(InvalidRequest, match="damaged"):
        page.settings_of(tmp_path / "damaged.png", settings)


# Words.


@pytest.mark.usefixtures("quiet")
def test_expected_refusals_are_sentences_and_leave_no_trace(server):
    for fields, words in (
        ({"prompt": ""}, "say what to draw"),
        ({"seed": "seven"}, "a whole number"),
        ({"num_inference_steps": 10**6}, "greater than maximum value"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"width": 33}, "multiple of"),
        ({"eta": 0.5, "scheduler": "euler"}, "takes no eta"),
        ({"prompt": "a <lora:<b>:1>"}, "&lt;b"),  # toasts are HTML
        ({"loras": ["gone"]}, "gone"),
        ({"model": "gone"}, "not in the list of choices"),
    ):
        text = refusal(draw(server, **fields))
        assert words in text
        assert str(server.home) not in text
    assert "load the page again" in refusal(
        happenings(server, "draw-button", "click", ["a secret wish"])
    )
    assert "secret wish" not in server.log.read_text()


def test_a_failing_database_is_told_plainly(tiny, tmp_path, caplog):
    fault = sa.exc.OperationalError("INSERT INTO jobs", {}, sqlite3.OperationalError("disk I/O"))
    settings = Settings(model=str(tiny), data_dir=tmp_path)
    assert pressed(settings, fault) == BROKEN
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info[1] is fault


def test_a_full_queue_is_told_plainly(tiny, tmp_path, caplog):
    settings = Settings(model=str(tiny), data_dir=tmp_path)
    assert "Too many jobs wait" in pressed(settings, QueueFull())
    refused = InvalidRequest("loras", "x", f"there are none (in {tmp_path}/loras)")
    assert pressed(settings, refused).endswith("(in LATENTGEN_HOME/loras)")
    assert caplog.records == []


def pressed(settings: Settings, error: Exception) -> str:
    """What the button says when a job cannot be put into the queue."""

    class Failing:
        async def aside(self, work, *arguments):
            return work(*arguments)

        async def submit(self, *_):
            raise error

    blocks = page.build(settings, Failing)
    start = next(f for f in blocks.fns.values() if f.name == "start")
    values = (FORM | {"model": "tiny"}).values()
    with pytest.raises(gr.Error) as told:
        asyncio.run(blocks.process_api(start, [None, None, None, *values], in_event_listener=False))
    assert not told.value.print_exception
    return told.value.message


def test_no_stubs_are_written_beside_the_page():
    folder = Path(page.__file__).parent
    assert list(folder.glob("*.pyi")) == []
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
