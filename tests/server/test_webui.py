"""The WebUI's API, by what its Python client sends with every request."""

import base64
import io
import json
import shutil
import threading
import time

import fakes
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from latentgen import LatentDiffusion, schedulers
from latentgen.modelfolder import find
from latentgen.server.webui import around

# What webuiapi 0.9.17 sends when nobody asks for anything.
ALWAYS = {
    "styles": [], "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0,
    "seed_resize_from_w": 0, "restore_faces": False, "tiling": False, "do_not_save_samples": False,
    "do_not_save_grid": False, "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1,
    "override_settings": {}, "override_settings_restore_afterwards": True, "script_name": None,
    "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {},
    "negative_prompt": "", "n_iter": 1, "batch_size": 1, "sampler_index": "Euler a",
    "scheduler": "automatic", "cfg_scale": 7.0, "seed": -1, "steps": 4, "width": 32, "height": 32,
}  # fmt: skip
OF_TEXT = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0,
    "hr_resize_x": 0, "hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None,
    "hr_scheduler": None, "hr_prompt": "", "hr_negative_prompt": "", "denoising_strength": 0.7,
    "firstphase_width": 0, "firstphase_height": 0,
}  # fmt: skip
OF_PICTURES = {
    "resize_mode": 0, "denoising_strength": 0.75, "mask_blur": 4, "inpainting_fill": 0,
    "inpaint_full_res": True, "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1, "image_cfg_scale": 1.5, "include_init_images": False,
}  # fmt: skip


def encoded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


WHITE = encoded(Image.new("L", (32, 32), 255))


def post(server, name: str, status: int = 200, **fields):
    answer = server.http.post(f"/sdapi/v1/{name}", json=fields)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_txt2img_tells_everything_about_its_pictures(server):
    asked = ALWAYS | OF_TEXT | {"prompt": "a cat", "negative_prompt": "red", "seed": 9}
    two = {"sampler_name": "DPM++ 2M Karras", "n_iter": 2}
    answer = post(server, "txt2img", **(asked | two))
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [9, 10]
    assert info["all_prompts"] == ["a cat"] * 2
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DPM++ 2M", 4, 7.0)
    for k, image in enumerate(map(decoded, answer["images"])):
        assert image.info["parameters"] == info["infotexts"][k]
        assert "Sampler: DPM++ 2M, Schedule type: Karras" in info["infotexts"][k]
        assert f"Seed: {9 + k}," in info["infotexts"][k]
    assert answer["parameters"]["seed"] == 9
    asked |= {"seed": 10, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    again = post(server, "txt2img", **asked)
    one, other = decoded(again["images"][0]), decoded(answer["images"][1])
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_pictures_are_kept_only_if_asked_for(server):
    for keep in (False, True):
        before = set(server.http.get("/images").json()["images"])
        answer = post(server, "txt2img", prompt="a", steps=2, width=32, height=32, save_images=keep,
                      send_images=not keep)  # fmt: skip
        after = set(server.http.get("/images").json()["images"])  # the newest
        assert len(answer["images"]) == 1 - keep
        assert len(after - before) == keep


def test_img2img_and_inpainting(server, picture, mask):
    asked = ALWAYS | OF_PICTURES | {"prompt": "a cat", "init_images": [encoded(picture)]}
    answer = post(server, "img2img", **asked, sampler_name="Euler a")
    assert decoded(answer["images"][0]).size == (32, 32)
    assert answer["parameters"]["init_images"] is None
    asked |= {"mask_blur": 0, "seed": 3}
    black = Image.new("RGB", picture.size)
    seen = set()
    for fill, invert in ((0, 0), (1, 0), (0, 1), (1, 1)):
        kept = mask.point(lambda value: 255 - value) if not invert else mask
        fields = asked | {"mask": encoded(mask), "inpainting_mask_invert": invert}
        fields |= {"inpainting_fill": fill}
        drawn = decoded(post(server, "img2img", **fields)["images"][0]).convert("RGB")
        assert Image.composite(drawn, black, kept).tobytes() == (
            Image.composite(picture, black, kept).tobytes()
        )
        assert drawn.tobytes() != picture.tobytes()
        seen.add(drawn.tobytes())
    assert len(seen) == 4
    larger = asked | {"width": 48, "height": 32}
    masked = larger | {"mask": encoded(mask), "inpaint_full_res_padding": 3}
    part = post(server, "img2img", **masked)
    assert decoded(part["images"][0]).size == picture.size
    assert "Inpaint area: Only masked, Masked area padding: 3" in part["info"]
    whole = post(server, "img2img", **(masked | {"inpaint_full_res": False}))
    assert decoded(whole["images"][0]).size == (48, 32)
    for mode in (0, 1):
        answer = post(server, "img2img", **(larger | {"resize_mode": mode}))
        assert decoded(answer["images"][0]).size == (48, 32)


def test_what_is_masked_is_filled_with_the_colours_around():
    image = Image.new("RGB", (96, 64), "red")
    image.paste("blue", (48, 0, 96, 64))
    image.paste("lime", (8, 8, 24, 24))  # to be forgotten
    mask = Image.new("L", image.size)
    mask.paste(255, (6, 6, 30, 30))
    filled = around(image, mask)
    assert Image.composite(image, filled, mask.point(lambda v: 255 - v)) == filled
    red, green, blue = filled.getpixel((16, 16))
    assert red > 200 > 55 > max(green, blue)
    assert around(image, Image.new("L", image.size, 255)) == image


WRONG = [
    ("enable_hr", True), ("styles", ["x"]), ("tiling", True), ("restore_faces", True),
    ("subseed_strength", 0.3), ("script_name", "xyz plot"), ("colour", 1), ("s_churn", 0.5),
    ("refiner_checkpoint", "other"), ("sampler_name", "nobody"), ("scheduler", "nobody"),
    ("steps", 0), ("steps", 1000), ("width", 33), ("batch_size", 100), ("eta", 0.5),
    ("alwayson_scripts", {"x": {"args": [1]}}), ("override_settings", {"sd_vae": "x"}),
    ("override_settings", {"sd_model_checkpoint": "x"}), ("cfg_scale", 0.5), ("prompt", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_cannot_be_done_is_named(server, name, value):
    fields = ALWAYS | OF_TEXT | {"prompt": "a cat", name: value}
    told = post(server, "txt2img", 400, **fields)
    assert told["error"]
    known_as = {"override_settings": "", "scheduler": "sampler_name"}.get(name, name)
    assert known_as in told["detail"]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"init_images": None}, 404, "Init image not found"),
        ({"init_images": ["http://localhost/x.png"]}, 400, "not fetched"),
        ({"init_images": ["x"] * 2}, 400, "one picture"),
        ({"mask": "x"}, 400, "mask"),
        ({"mask": WHITE, "inpainting_fill": 2}, 400, "inpainting_fill"),
        ({"mask": WHITE, "inpaint_full_res_padding": -1}, 400, "inpaint_full_res_padding"),
        ({"resize_mode": 3, "width": 64}, 400, "resize_mode"),
    ],
)
def test_so_it_is_with_pictures(server, picture, fields, status, told):
    asked = ALWAYS | OF_PICTURES | {"prompt": "a", "init_images": [encoded(picture)]} | fields
    assert told in post(server, "img2img", status, **asked)["detail"]


def test_progress_and_interrupt(server):
    idle = server.http.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    asked = ALWAYS | {"prompt": "a", "steps": 900, "width": 256, "height": 256, "batch_size": 8}
    answers = []
    drawing = threading.Thread(target=lambda: answers.append(post(server, "txt2img", **asked)))
    drawing.start()
    while (now := server.http.get("/sdapi/v1/progress").json())["state"]["sampling_step"] < 2:
        time.sleep(0.02)
    assert 0.01 < now["progress"] < 1
    assert now["state"]["sampling_steps"] == 900
    assert server.http.post("/sdapi/v1/interrupt").json() == {}
    drawing.join(120)
    assert answers[0]["images"] == json.loads(answers[0]["info"])["all_seeds"] == []


def test_what_sillytavern_sends_on_is_taken_and_its_password_is_not_told(server):
    own = {"url": "http://127.0.0.1:7860", "auth": "me:secret", "hr_additional_modules": []}
    answer = post(server, "txt2img", **ALWAYS | OF_TEXT | own | {"prompt": "a cat"})
    assert len(answer["images"]) == 1
    assert "secret" not in json.dumps(answer)


def test_companions_answer(server, picture):
    get = {
        name: server.http.get(f"/sdapi/v1/{name}").json()
        for name in ("samplers", "schedulers", "sd-models", "loras", "embeddings", "options",
                     "scripts", "upscalers", "latent-upscale-modes", "sd-vae")
    }  # fmt: skip
    assert "DPM++ 2M" in [one["name"] for one in get["samplers"]]
    assert "karras" in [one["name"] for one in get["schedulers"]]
    title = get["options"]["sd_model_checkpoint"]
    assert title in [one["title"] for one in get["sd-models"]]
    assert post(server, "options", sd_model_checkpoint=title) is None
    assert post(server, "options", 400, CLIP_stop_at_last_layers=2)["error"]
    assert post(server, "skip") is None
    assert post(server, "png-info", image=encoded(picture))["info"] == ""
    drawn = post(server, "txt2img", prompt="a cat", steps=3, width=32, height=32)["images"][0]
    told = post(server, "png-info", image=drawn)
    assert told["info"].startswith("a cat\nSteps: 3,")
    assert (told["parameters"]["Steps"], told["parameters"]["Size-1"]) == ("3", "32")


def test_a_hash_is_told_of_what_was_drawn_with(server):
    """No file is read for a list; what was replaced is another model."""
    folder = server.home / "models" / "mine"
    LatentDiffusion(**fakes.components(sample_size=4, seed=1)).save_pretrained(folder)
    asked = {"prompt": "a", "steps": 2, "width": 32, "height": 32, "seed": 1}

    def listed():
        told = server.http.get("/sdapi/v1/sd-models").json()
        return next(one for one in told if one["model_name"] == "mine")

    def drawn(name):
        answer = post(server, "txt2img", **asked, override_settings={"sd_model_checkpoint": name})
        return answer["images"], json.loads(answer["info"])["sd_model_hash"]

    assert (listed()["title"], listed()["hash"]) == ("mine", None)
    first, hash = drawn("mine")
    assert listed()["hash"] == hash == find(folder).hash()
    assert listed()["title"] == f"mine [{hash}]"
    assert drawn(f"mine [{hash}]") == drawn(hash) == (first, hash)
    fakes.components(sample_size=4, seed=2)["unet"].save_pretrained(folder / "unet")
    assert listed()["hash"] is None
    second, other = drawn("mine")
    assert second != first
    assert listed()["hash"] == other == find(folder).hash() != hash
    shutil.rmtree(folder)


def test_a_sampler_and_a_schedule_type_must_agree(server):
    asked = {"prompt": "a", "steps": 2, "width": 32, "height": 32}
    asked |= {"sampler_name": "DPM++ 2M Karras"}
    for kind in ("Karras", "Automatic", None):
        info = json.loads(post(server, "txt2img", **asked, scheduler=kind)["info"])
        assert "Schedule type: Karras," in info["infotexts"][0]
    told = post(server, "txt2img", 400, **asked, scheduler="Exponential")["detail"]
    assert "exponential and karras exclude each other" in told


def test_what_nobody_reads_is_told_again_or_refused(server):
    asked = {"prompt": "a", "steps": 1, "width": 32, "height": 32}

    def sent(path, body):  # as it is: httpx would not make JSON of it
        body = body if isinstance(body, str) else json.dumps(body)
        kind = {"Content-Type": "application/json"}
        return server.http.post(f"/sdapi/v1/{path}", content=body, headers=kind)

    answer = sent("txt2img", asked | {"hr_prompt": "a\ud800", "subseed": 10**30}).json()
    assert len(answer["images"]) == 1
    assert answer["parameters"]["hr_prompt"] == "a\ud800"
    nested = "[" * 900 + "]" * 900
    for name, value in (("hr_prompt", nested), ("hr_scale", "NaN"), ("hr_scale", "1e999")):
        body = json.dumps(asked)[:-1] + f', "{name}": {value}}}'
        answer = sent("txt2img", body)
        assert (answer.status_code, name in answer.json()["detail"]) == (400, True)
    assert (
        "there are no scripts"
        in post(
            server, "txt2img", 400, **asked, alwayson_scripts={"x": {"args": [], "more": [[]]}}
        )["detail"]
    )
    assert sent("txt2img", asked | {"override_settings": {"\ud800": 1}}).status_code == 400
    assert sent("options", {"\ud800": 1}).status_code == 400


def test_the_wrong_field_is_named_and_no_other(server, picture):
    asked = {"prompt": "a", "steps": 2, "width": 32, "height": 32}
    for fields, told in (
        ({"n_iter": 30}, "n_iter=30"),
        ({"batch_size": 30}, "batch_size=30"),
        ({"image": "x"}, "'image'"),
        ({"denoising_strength": 2}, "denoising_strength"),
        (
            {"prompt": "猫" * 12_500, "override_settings": {"samples_format": "jpg"}},
            "samples_format",
        ),
    ):
        assert post(server, "txt2img", 400, **(asked | fields))["detail"].startswith(told)
    assert post(server, "png-info", 400, image="%%")["detail"].startswith("image=")


def test_info_tells_what_was_asked_and_how(server, picture):
    file = server.home / "loras" / "style.safetensors"
    file.parent.mkdir(exist_ok=True)
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    save_file({f"{path}.{name}.weight": part for name, part in parts.items()}, file)
    asked = {"prompt": "a <lora:style:0.5> cat", "steps": 4, "width": 32, "height": 32, "seed": 1,
             "init_images": [encoded(picture)], "mask": WHITE, "batch_size": 2,
             "sampler_name": "DPM++ 2M", "denoising_strength": None}  # fmt: skip
    info = json.loads(post(server, "img2img", **asked)["info"])
    assert info["all_prompts"] == [asked["prompt"]] * 2
    assert info["prompt"] == asked["prompt"]
    assert info["denoising_strength"] == 0.75
    extra = info["extra_generation_params"]
    assert extra.pop("Lora hashes").startswith("style: ")
    assert extra == {
        "Schedule type": "Karras",
        "Mask blur": "4",
        "Inpaint area": "Only masked",
        "Masked area padding": "0",
    }
    file.unlink()


def test_embeddings_are_told_from_other_files(server):
    folder = server.home / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"<cat>": torch.zeros(2, 32)}, folder / "a.safetensors")
    save_file({"emb_params": torch.zeros(32)}, folder / "b.safetensors")
    save_file({"x": torch.zeros(2, 3, 4)}, folder / "c.safetensors")
    (folder / "d.safetensors").write_bytes(b"rubbish")
    told = server.http.get("/sdapi/v1/embeddings").json()
    assert {name: one["vectors"] for name, one in told["loaded"].items()} == {"<cat>": 2, "b": 1}
    assert set(told["skipped"]) == {"c", "d"}
    for file in folder.iterdir():
        file.unlink()


def test_every_schedule_type_goes_with_a_sampler(server):
    for one in server.http.get("/sdapi/v1/schedulers").json():
        for name in (one["name"], one["label"]):
            assert str(schedulers.parse(f"euler {name}")) != "euler" or one["name"] == "automatic"


def test_a_picture_tells_whatever_it_says(server):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", 'a\nSteps: 2, Sampler: DDIM, CFG scale: 2, Model: "\\ud800"')
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
    image = base64.b64encode(stream.getvalue()).decode()
    assert post(server, "png-info", image=image)["parameters"]["Model"] == "\ud800"
