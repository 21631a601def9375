"""ControlNets: what is refused, what it costs, and what a picture tells of it."""

import json
import re
import shutil
from collections import Counter

import fakes
import numpy as np
import pytest
import single_file
import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image
from safetensors.torch import load_file, save_file

from latentgen import InvalidRequest, LatentDiffusion, controlnet, metadata
from latentgen.images import resize_mask
from latentgen.modelfolder import file_sha256
from latentgen.request import Request

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 4, "output_type": "np"}


@pytest.fixture
def lines():
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def control(lines):
    return {"controlnet": fakes.controlnet(), "control_image": lines}


@pytest.fixture
def folder(tmp_path):
    """A ControlNet's folder to break."""
    return shutil.copytree(fakes.controlnet(), tmp_path / "lines")


def rewrite(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1, [2, 2, 2, 2]),
        (0.25, 1, [0, 2, 2, 2]),
        (0, 0.75, [2, 2, 2, 0]),
        (0.3, 0.7, [0, 0, 0, 0]),  # no step lies in it whole
        (0.3, 0.75, [0, 0, 2, 0]),
    ],
)
def test_it_works_in_the_steps_that_lie_between_start_and_end(start, end, expected):
    assert controlnet.scales(2.0, start, end, 4) == expected


def test_at_no_strength_the_picture_is_that_of_no_controlnet_and_it_is_not_asked(
    pipe, control, monkeypatch
):
    plain = pipe.generate(**CALL).images
    strong = pipe.generate(**CALL, **control).images
    assert not np.array_equal(plain, strong)
    calls = Counter()
    real = ControlNetModel.forward

    def forward(self, *args, **kwargs):
        calls["forward"] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ControlNetModel, "forward", forward)
    with pytest.warns(UserWarning, match="no effect with controlnet_conditioning_scale 0"):
        off = pipe.generate(**CALL, **control, controlnet_conditioning_scale=0).images
    with pytest.warns(UserWarning, match=r"no whole one of its 4 steps from 0\.3 to 0\.7"):
        pipe.generate(**CALL, **control, control_guidance_start=0.3, control_guidance_end=0.7)
    np.testing.assert_array_equal(off, plain)
    assert calls["forward"] == 0
    pipe.generate(**CALL, **control, control_guidance_end=0.5)
    assert calls["forward"] == 2


def test_it_is_read_once_and_looks_at_its_picture_once_a_drawing(control, monkeypatch):
    pipe = LatentDiffusion(**fakes.parts())
    calls = Counter()
    looks, reads = ControlNetConditioningEmbedding.forward, ControlNetModel.from_pretrained

    def look(self, x):
        calls["look"] += 1
        return looks(self, x)

    def read(*args, **kwargs):
        calls["read"] += 1
        return reads(*args, **kwargs)

    monkeypatch.setattr(ControlNetConditioningEmbedding, "forward", look)
    monkeypatch.setattr(ControlNetModel, "from_pretrained", read)
    first = pipe.generate(**CALL, **control).images
    assert calls == {"look": 1, "read": 1}
    again = pipe.generate(**CALL, **control).images
    assert calls == {"look": 2, "read": 1}
    np.testing.assert_array_equal(first, again)


def test_each_picture_is_the_one_it_is_alone_also_beside_a_longer_prompt(pipe, control):
    """Rows of one length go through both networks together, with their own picture."""
    prompts = ["a red apple", "a house " * 20]
    call = {**CALL, **control, "guidance_scale": 5.0}
    together = pipe.generate(**call | {"prompt": prompts}).images
    for k, prompt in enumerate(prompts):
        alone = pipe.generate(**call | {"prompt": prompt, "seed": CALL["seed"] + k}).images
        np.testing.assert_allclose(together[k], alone[0], atol=1e-5)  # batches differ in last bits


def test_it_sees_the_part_of_its_picture_that_is_repainted(pipe, lines, mask):
    """Cut like the image: what lies outside of the part does not matter, what lies inside does."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (4, 4, 20, 20))
    picture = Image.new("RGB", (64, 64), "orange")
    call = {**CALL, "image": picture, "mask_image": mask, "padding_mask_crop": 4}
    call |= {"controlnet": fakes.controlnet(), "height": 32, "width": 32, "output_type": "latent"}

    def drawn(place):
        seen = Image.new("RGB", (64, 64))
        seen.paste(lines.resize((16, 16)), place)
        return pipe.inpaint(**call, control_image=seen).images

    inside, outside, nothing = drawn((4, 4)), drawn((44, 44)), drawn((64, 64))
    assert not np.array_equal(inside, nothing)
    np.testing.assert_array_equal(outside, nothing)


def test_it_sees_what_the_unet_sees_of_the_latents_and_no_mask(control, picture, mask):
    """Of the nine channels of an inpainting model, the first four."""
    pipe = fakes.drawer("9-channel")
    call = CALL | control | {"image": picture, "mask_image": mask}
    led = pipe.inpaint(**call).images
    call = {name: value for name, value in call.items() if name not in control}
    assert not np.array_equal(led, pipe.inpaint(**call).images)


@pytest.mark.parametrize(
    ("given", "field", "told"),
    [
        ({"control_image": Image.new("RGB", (8, 8))}, "control_image", "goes with a controlnet"),
        ({"control_guidance_end": 0.5}, "control_guidance_end", "goes with a controlnet"),
        ({"controlnet": "nowhere"}, "controlnet", "no such folder or file; give a folder in"),
        ({"controlnet": 7}, "controlnet", "a folder, a file, a name or a hub id"),
        ({"controlnet": __file__}, "controlnet", "must be a .safetensors file"),
        ({"controlnet": "some/where"}, "controlnet", "not on this machine"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(given, field, told):
    with pytest.raises(InvalidRequest, match=told) as caught:
        Request(prompt="a cat", **given)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("more", "field", "told"),
    [
        ({"control_image": None}, "controlnet", "give one as control_image"),
        ({"control_image": "nowhere.png"}, "control_image", "no such file"),
        ({"controlnet_conditioning_scale": 11}, "controlnet_conditioning_scale", "between 0 and"),
        (
            {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "control_guidance_start",
            "must lie before control_guidance_end, 0.5",
        ),
    ],
)
def test_so_is_what_is_wrong_with_it(control, more, field, told):
    with pytest.raises(InvalidRequest, match=told) as caught:
        Request(prompt="a cat", **control | more)
    assert caught.value.field == field


def test_one_for_inpainting_needs_a_mask_or_a_picture(tmp_path, pipe, picture, mask):
    folder = shutil.copytree(fakes.controlnet(), tmp_path / "Inpaint_depth")
    for more in ({}, {"image": picture}):
        with pytest.raises(InvalidRequest, match="give one as control_image"):
            Request(prompt="a cat", controlnet=folder, **more)
    masked = {"image": picture, "mask_image": mask, "controlnet": folder}
    with pytest.raises(InvalidRequest, match="must lie before control_guidance_end"):
        Request(prompt="a cat", **masked, control_guidance_start=1.0)
    drawn = pipe.inpaint("a cat", **masked, num_inference_steps=2, seed=1)
    again = metadata.request_from_record(
        metadata.record(drawn, 0), control=folder, image=picture, mask_image=mask
    )
    *_, last = pipe.draw(again)
    assert last.result.image.tobytes() == drawn.image.tobytes()


def test_one_for_inpainting_sees_the_part_that_is_drawn(tmp_path, pipe, picture, mask):
    folder = shutil.copytree(fakes.controlnet(), tmp_path / "inpaint")
    pictures = {"image": picture, "mask_image": mask, "controlnet": folder}
    request = pipe.resolve(Request(prompt="a cat", padding_mask_crop=2, **pictures))
    seen = pipe._control_image(request, 1, torch.empty(0))
    size = (request.width, request.height)
    repainted = resize_mask(mask, size, request.box)
    part = np.asarray(picture.resize(size, Image.Resampling.LANCZOS, request.box)) / 255
    part[np.asarray(repainted) > 0] = -1
    np.testing.assert_allclose(seen[0].permute(1, 2, 0).numpy(), part, atol=1e-6)
    assert (part == -1).any()
    assert (part != -1).any()


def test_a_cut_controlnet_picture_has_the_size_of_the_image(control):
    pictures = {"image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (64, 64), 255)}
    with pytest.raises(InvalidRequest, match="must have the size of the image, 64 x 64"):
        Request(prompt="a cat", **control, **pictures, padding_mask_crop=8)


def test_folders_that_hold_no_controlnet_are_refused(folder, lines):
    def refused(told):
        with pytest.raises(InvalidRequest, match=told) as caught:
            Request(prompt="a cat", controlnet=folder, control_image=lines)
        assert caught.value.field == "controlnet"

    rewrite(folder, conditioning_channels=1)
    refused("it sees 1 channels, not a picture")
    rewrite(folder, global_pool_conditions=True)
    refused("shuffle")
    rewrite(folder, _class_name="T2IAdapter")
    refused("a T2IAdapter, not a ControlNetModel")
    (folder / "config.json").unlink()
    refused("cannot be read as JSON")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    refused("damaged or not a safetensors file")
    file.rename(file.with_suffix(".bin"))
    refused("pickle")


@pytest.mark.parametrize("name", ["cross_attention_dim", "block_out_channels"])
def test_one_for_another_model_is_refused_before_its_weights_are_read(
    pipe, folder, lines, name, monkeypatch
):
    monkeypatch.setattr(ControlNetModel, "from_pretrained", None)
    rewrite(folder, **{name: [8, 32] if name == "block_out_channels" else 32})
    with pytest.raises(InvalidRequest, match=rf"made for another model: its {name} is .*32"):
        pipe.stream(**CALL, controlnet=folder, control_image=lines)  # and not at the first step


def test_weights_that_are_missing_are_told(pipe, folder, lines):
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights.pop("conv_in.bias")
    save_file(weights, file)
    with pytest.raises(InvalidRequest, match=r"do not fit together .*lack conv_in\.bias"):
        pipe.generate(**CALL, controlnet=folder, control_image=lines)
    weights |= {"conv_in.bias": torch.zeros(8), "task_embedding": torch.zeros(6, 8)}
    save_file(weights, file)
    with pytest.raises(InvalidRequest, match="it has task_embedding, which a ControlNetModel has"):
        pipe.generate(**CALL, controlnet=folder, control_image=lines)


@pytest.fixture(params=["diffusers", "control_model.", ""])
def single(request, pipe, tmp_path):
    """A ControlNet as a folder and as one file: in the diffusers layout, in that of the original
    repository, and in the same without its prefix."""
    torch.manual_seed(2)
    net = ControlNetModel.from_unet(pipe.unet)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(tmp_path / "folder")
    weights = net.state_dict()
    if request.param != "diffusers":
        weights = {
            request.param + single_file.controlnet_name(name, net.config): weight
            for name, weight in weights.items()
        }
    file = tmp_path / "canny.safetensors"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return tmp_path / "folder", file


def test_a_single_file_draws_as_its_folder_does(pipe, single, lines):
    expected, found = (pipe.generate(**CALL, controlnet=one, control_image=lines) for one in single)
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.request.controlnet.name == "canny"
    assert found.request.controlnet.hash() == file_sha256(single[1])[:10]
    assert not np.array_equal(found.images, pipe.generate(**CALL).images)


def test_a_single_file_goes_with_an_inpainting_model(single, lines, picture, mask):
    """Which has nine channels, of which a ControlNet sees the first four."""
    pipe = fakes.drawer("9-channel")
    call = CALL | {"image": picture, "mask_image": mask, "control_image": lines}
    expected, found = (pipe.inpaint(**call, controlnet=one).images for one in single)
    np.testing.assert_array_equal(found, expected)


def test_single_files_that_do_not_fit_are_refused(pipe, single, lines):
    _, file = single
    weights = load_file(file)

    def refused(told, **changes):
        save_file({name: w for name, w in (weights | changes).items() if w is not None}, file)
        with pytest.raises(InvalidRequest, match=told) as caught:
            pipe.generate(**CALL, controlnet=file, control_image=lines)
        assert caught.value.field == "controlnet"

    first = next(
        name
        for name in weights
        if name.endswith(("embedding.conv_in.weight", "hint_block.0.weight"))
    )
    refused("nothing in it sees a picture", **{first: None})
    refused("it sees 1 channels", **{first: torch.zeros(16, 1, 3, 3)})
    refused("a Control-LoRA", lora_controlnet=torch.zeros(0))
    attends = next(name for name in weights if name.endswith("attn2.to_k.weight"))
    refused(
        "made for another model: its cross_attention_dim is 40", **{attends: torch.zeros(32, 40)}
    )
    count = len(weights)
    refused(f"has {count - 1} weights, .* {count}; if it comes with a config", **{attends: None})
    refused(f"has {count + 1} weights, and one like", **{f"{first}_2": torch.zeros(1)})
    shuffle = file.rename(file.with_name("control_Shuffle.safetensors"))
    with pytest.raises(InvalidRequest, match="it pools its conditions"):
        controlnet.find(shuffle)
    with pytest.raises(InvalidRequest, match="pickle"):
        controlnet.find(shuffle.rename(file.with_suffix(".pth")))


def test_a_file_in_the_folder_of_controlnets_has_a_name(pipe, single, lines, monkeypatch, tmp_path):
    folder, file = single
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path / "home"))
    there = tmp_path / "home" / "controlnets"
    there.mkdir(parents=True)
    file.rename(there / file.name)
    assert controlnet.find("canny").path == there / file.name
    folder.rename(there / "canny")  # of the same name: it knows its configuration
    assert controlnet.find("canny").path == there / "canny"


def test_weights_of_a_variant_are_read_where_there_are_no_others(pipe, folder, control, lines):
    (file,) = folder.glob("*.safetensors")
    weights = file.read_bytes()
    half = file.with_name("diffusion_pytorch_model.fp16.safetensors")
    file.rename(half)
    (folder / "rank256.safetensors").write_bytes(b"another program's")
    expected = pipe.generate(**CALL, **control).images
    found = pipe.generate(**CALL, controlnet=folder, control_image=lines)
    np.testing.assert_array_equal(found.images, expected)
    digits = found.request.controlnet.hash()
    file.write_bytes(weights)
    half.write_bytes(b"damaged, and not read")
    assert controlnet.find(folder).hash() == digits


def test_a_controlnet_of_fewer_attentions_draws(pipe, lines, tmp_path):
    torch.manual_seed(0)
    config = dict(pipe.unet.config)
    net = ControlNetModel(
        **{name: config[name] for name in ("block_out_channels", "layers_per_block")},
        down_block_types=("DownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
        norm_num_groups=4,
        cross_attention_dim=16,
        conditioning_embedding_out_channels=(4, 4, 8, 8),
    )
    torch.nn.init.normal_(net.controlnet_mid_block.weight, std=0.1)
    net.save_pretrained(tmp_path)
    led = pipe.generate(**CALL, controlnet=tmp_path, control_image=lines).images
    assert not np.array_equal(led, pipe.generate(**CALL).images)


def test_one_in_latentgens_folder_is_called_by_its_name(pipe, control, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path))
    shutil.copytree(control["controlnet"], tmp_path / "controlnets" / "edges")
    (tmp_path / "controlnets" / "linked").symlink_to(control["controlnet"])
    assert controlnet.find("linked").name == "linked"  # by which replay finds it again
    named = pipe.generate(**CALL, **control | {"controlnet": "edges"}).images
    np.testing.assert_array_equal(named, pipe.generate(**CALL, **control).images)


def test_a_picture_tells_its_controlnet_and_never_where_it_was(pipe, control, tmp_path):
    call = CALL | control | {"output_type": "pil", "controlnet_conditioning_scale": 0.7}
    result = pipe.generate(**call, control_guidance_start=0.25)
    (file,) = result.save(tmp_path / "apple.png")
    picture = metadata.read(file)
    digits = result.request.controlnet.hash()
    assert re.fullmatch("[0-9a-f]{10}", digits)
    assert metadata.parse_infotext(picture.infotext).fields["ControlNet 0"] == (
        f"Module: none, Model: lines [{digits}], Weight: 0.7, Guidance Start: 0.25, Guidance End: 1"
    )
    assert picture.record["request"]["controlnet"] == {"name": "lines", "hash": digits}
    assert set(picture.record["pictures"]) == {"control_image"}
    assert str(control["controlnet"].parent) not in json.dumps(picture.record)

    given = {"control": control["controlnet"], "control_image": control["control_image"]}
    again = pipe.draw(metadata.request_from_record(picture.record, **given))
    *_, last = again
    assert last.result.image.tobytes() == result.image.tobytes()
    assert metadata.differences(picture.record, last.result) == []
    for name in ("lines", str(control["controlnet"])):  # a folder that is there, but not in ours
        picture.record["request"]["controlnet"]["name"] = name
        with pytest.raises(InvalidRequest, match="which is not here; name it: --controlnet"):
            metadata.request_from_record(picture.record, control_image=control["control_image"])

    plain = metadata.request_from_record(metadata.without_control(picture.record))
    assert (plain.controlnet, plain.control_image, plain.seed) == (None, None, CALL["seed"])


def test_another_controlnet_is_noticed(pipe, control, folder):
    first = pipe.generate(**CALL | control | {"output_type": "pil"})
    (file,) = folder.glob("*.safetensors")
    weights = file.read_bytes()
    file.write_bytes(weights[:-4] + b"\0\0\0\0")
    known = metadata.record(first, 0)
    given = {"control": folder, "control_image": control["control_image"]}
    *_, last = pipe.draw(metadata.request_from_record(known, **given))
    told = "the ControlNet lines is not the one that it was made with"
    assert metadata.differences(known, last.result) == [told]


def test_a_picture_without_one_takes_none(pipe, control):
    known = metadata.record(pipe.generate(**CALL | {"output_type": "pil"}), 0)
    assert "controlnet" not in known["request"]
    assert "control_guidance_end" not in known["request"]
    with pytest.raises(InvalidRequest, match="was not made with one; leave it out"):
        metadata.request_from_record(known, control=control["controlnet"])
