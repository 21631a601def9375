"""ControlNets through every door of the server, by their names."""

import base64
import io
import json
import shutil

import fakes
import pytest
from PIL import Image, ImageDraw

from latentgen import LatentDiffusion, metadata

ASKED = {"prompt": "a cat", "seed": 3, "scheduler": "ddim", "guidance_scale": 5}
STRENGTH = {"controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.5}


@pytest.fixture(autouse=True)
def net(server):
    folder = shutil.copytree(fakes.controlnet(), server.home / "controlnets" / "lines")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def lines() -> Image.Image:
    """What the ControlNet sees, of another size and shape than the picture."""
    image = Image.new("RGB", (48, 32))
    ImageDraw.Draw(image).line((5, 3, 40, 28), "white", 3)
    return image


@pytest.fixture
def expected(tiny):
    """The pixels that the library draws, from what the ControlNet sees."""
    pipe = LatentDiffusion.from_pretrained(tiny, device="cpu")

    def draw(seen: Image.Image, **fields) -> bytes:
        asked = ASKED | STRENGTH | {"num_inference_steps": 4} | fields
        result = pipe.generate(**asked, controlnet=fakes.controlnet(), control_image=seen)
        return result.image.tobytes()

    return draw


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def test_a_job_follows_it_and_its_picture_tells_so(server, lines, expected):
    control = {"controlnet": "lines", "control_image": png(lines), **STRENGTH}
    state = server.ended(server.submit(**ASKED, steps=4, **control))
    assert state["status"] == "done", state
    file = server.home / "outputs" / state["images"][0]["url"].removeprefix("/images/")
    drawn = Image.open(file).tobytes()
    assert drawn == expected(lines)
    without = server.ended(server.submit(**ASKED, steps=4))
    data = server.http.get(without["images"][0]["url"]).content
    assert pixels(data) != drawn
    record = metadata.read(file).record
    assert record["request"]["controlnet"]["name"] == "lines"
    assert record["request"]["control_guidance_end"] == 0.5
    assert list((server.home / "inputs").iterdir()) == []


def test_what_cannot_be_followed_is_refused_at_once(server, lines, net):
    seen = png(lines)
    for fields, told in (
        ({"controlnet": "nowhere", "control_image": seen}, "one of lines"),
        ({"controlnet": str(net), "control_image": seen}, "one of lines"),
        ({"controlnet": "../controlnets/lines", "control_image": seen}, "one of lines"),
        ({"controlnet": "lines"}, "give one as control_image"),
        ({"control_image": seen}, "goes with a controlnet"),
        ({"controlnet": "lines", "control_image": "!"}, "control_image='!': not base64"),
        (
            {"controlnet": "lines", "control_image": seen, "controlnet_conditioning_scale": 0},
            "no effect",
        ),
    ):
        answer = server.http.post("/jobs", json=ASKED | fields)
        assert answer.status_code == 400, answer.text
        assert told in answer.json()["error"]["message"]
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    answer = server.http.post("/jobs", json={**ASKED, "controlnet": "lines", "control_image": seen})
    assert "made for another model" in answer.json()["error"]["message"]


def unit(**fields) -> dict:
    """What webuiapi 0.9.17 sends for one of its ControlNetUnits."""
    usual = {"image": "", "mask": None, "module": "none", "model": "None", "weight": 0.5}
    usual |= {"resize_mode": "Resize and Fill", "low_vram": False, "processor_res": 512}
    usual |= {"threshold_a": 64, "threshold_b": 64, "guidance_start": 0.0, "guidance_end": 0.5}
    usual |= {"control_mode": "Balanced", "pixel_perfect": False, "hr_option": "Both"}
    return usual | {"enabled": True, "model": "lines [0123abcd]"} | fields


def asked_of_the_webui(*units: dict) -> dict:
    scripts = {"ControlNet": {"args": list(units)}}
    same = {"prompt": "a cat", "seed": 3, "sampler_name": "DDIM", "cfg_scale": 5, "steps": 4}
    return same | {"width": 32, "height": 32, "alwayson_scripts": scripts}


def test_the_webuis_script_follows_it(server, lines, expected):
    filled = Image.new("RGB", (32, 32))
    filled.paste(lines.resize((32, 21), Image.Resampling.LANCZOS), (0, 5))
    off = unit(model="another", enabled=False)
    for mode, seen in (
        ("Just Resize", lines),
        (1, lines.crop((8, 0, 40, 32))),
        ("Resize and Fill", filled),
    ):
        asked = asked_of_the_webui(off, unit(image=png(lines), resize_mode=mode))
        answer = server.http.post("/sdapi/v1/txt2img", json=asked)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert pixels(base64.b64decode(told["images"][0])) == expected(seen), mode
        assert "Model: lines" in json.loads(told["info"])["infotexts"][0]
    listed = server.http.get("/controlnet/model_list").json()
    assert listed == {"model_list": ["lines"]}


def test_without_an_image_of_its_own_it_follows_the_one_that_is_redrawn(server, lines, expected):
    asked = asked_of_the_webui(unit()) | {"init_images": [png(lines)], "denoising_strength": 0.8}
    cropped = lines.crop((8, 0, 40, 32))
    for mode, seen in ((0, lines.resize((32, 32), Image.Resampling.LANCZOS)), (1, cropped)):
        answer = server.http.post("/sdapi/v1/img2img", json=asked | {"resize_mode": mode})
        assert answer.status_code == 200, answer.text
        drawn = pixels(base64.b64decode(answer.json()["images"][0]))
        assert drawn == expected(seen, image=seen, strength=0.8), mode


def test_what_other_clients_send_with_a_unit(server, lines, expected):
    told = {"batch_images": "", "input_mode": "simple", "is_ui": True, "loopback": False}
    told |= {"output_dir": "", "use_preview_as_input": False, "control_mode": ["Balanced"]}
    told |= {"resize_mode": "Scale to Fit (Inner Fit)", "effective_region_mask": None}
    told |= {"image": {"image": png(lines), "mask": None}, "guidance": 0.5}
    told = unit(**told)
    del told["guidance_end"]
    answer = server.http.post("/sdapi/v1/txt2img", json=asked_of_the_webui(told))
    assert answer.status_code == 200, answer.text
    drawn = pixels(base64.b64decode(answer.json()["images"][0]))
    assert drawn == expected(lines.crop((8, 0, 40, 32)))


def test_what_it_sees_may_be_large_and_what_is_drawn_not(server, lines):
    noise = Image.effect_noise((1200, 1200), 100).convert("RGB")
    asked = asked_of_the_webui(unit(image=png(noise)))
    assert len(asked["alwayson_scripts"]["ControlNet"]["args"][0]["image"]) > 2**20
    assert server.http.post("/sdapi/v1/txt2img", json=asked).status_code == 200
    asked = asked_of_the_webui(unit(image=png(lines))) | {"width": 50_000, "height": 50_000}
    for name, more in (("txt2img", {}), ("img2img", {"init_images": [png(lines)]})):
        answer = server.http.post(f"/sdapi/v1/{name}", json=asked | more)
        assert answer.status_code == 400
        assert "pixels in all" in answer.json()["detail"]


def test_one_for_inpainting_sees_what_is_repainted(server, tiny, picture, mask, net):
    folder = shutil.copytree(net, server.home / "controlnets" / "sd15_inpaint")
    pipe = LatentDiffusion.from_pretrained(tiny, device="cpu")
    given = {"image": picture, "mask_image": mask, "controlnet": folder, "strength": 0.8}
    drawn = pipe.generate(**ASKED, **given, **STRENGTH, num_inference_steps=4).image
    asked = asked_of_the_webui(unit(model="sd15_inpaint", module="inpaint_only"))
    asked |= {"init_images": [png(picture)], "mask": png(mask), "denoising_strength": 0.8}
    asked |= {"mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    answer = server.http.post("/sdapi/v1/img2img", json=asked)
    asked["alwayson_scripts"]["ControlNet"]["args"][0]["model"] = "lines"
    refused = server.http.post("/sdapi/v1/img2img", json=asked)
    shutil.rmtree(folder)
    assert answer.status_code == 200, answer.text
    assert pixels(base64.b64decode(answer.json()["images"][0])) == drawn.tobytes()
    assert "inpaint_only goes with a mask" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("units", "told"),
    [
        (
            [unit(module="canny", image="x")],
            "'canny': module of a unit of controlnet: Input should",
        ),
        ([unit(module="inpaint_only", image="x")], "inpaint_only goes with a mask"),
        ([unit(model="nowhere")], "one of lines"),
        ([unit()], "image=None: the controlnet needs one"),
        ([unit(image="!")], "image='!': not base64"),
        ([unit(), unit()], "one of them works here"),
        ([unit(control_mode="My prompt is more important")], "control_mode of a unit"),
        ([unit(resize_mode="Any")], "resize_mode of a unit"),
        ([unit(model=None)], "model of a unit"),
        ([unit(batch_images="x")], "batch_images"),
        (["lines"], "a unit of controlnet is an object"),
        ([unit(enabled="no"), unit(enabled="false"), unit(weight="x")], "weight of a unit"),
    ],
)
def test_units_that_ask_for_more_are_refused(server, lines, units, told):
    for one in units:
        if isinstance(one, dict) and one["model"] == "nowhere":
            one["image"] = png(lines)  # a request that is right but for that
    answer = server.http.post("/sdapi/v1/txt2img", json=asked_of_the_webui(*units))
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["detail"]


@pytest.mark.parametrize("script", [{"foo": 1}, {"args": None}, {"args": 5}, {"args": [], "x": 1}])
def test_a_script_of_another_shape_is_refused(server, script):
    asked = {"prompt": "a cat", "alwayson_scripts": {"controlnet": script}}
    answer = server.http.post("/sdapi/v1/txt2img", json=asked)
    assert answer.status_code == 400
    assert "controlnet, with its units in `args`" in answer.json()["detail"]
