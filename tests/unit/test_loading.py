"""Loading and saving: the same weights draw the same picture, whatever way they came."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from fakes import KINDS, SCHEDULER, components, drawer
from safetensors.torch import load_file, save_file
from single_file import save_single_file

from latentgen import InvalidRequest, LatentDiffusion, generate, pipeline
from latentgen.modelfolder import find
from latentgen.pipeline import quietly

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3, "guidance_scale": 7.5}


def draw(pipe, **options):
    return pipe.generate(**CALL, output_type="np", **options).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    drawer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    path = folder.parent / "tiny-all-in-one.safetensors"
    save_single_file(drawer(), path)
    return path


def test_a_saved_model_draws_the_same_picture_bit_for_bit(folder, pipe):
    loaded = LatentDiffusion.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(draw(loaded), draw(pipe))
    assert loaded.model == find(folder)


@pytest.mark.usefixtures("stock_convolutions")
def test_the_saved_folder_is_a_stable_diffusion_model_for_everyone(folder, pipe):
    stock = StableDiffusionPipeline.from_pretrained(folder)
    assert (
        json.loads((folder / "model_index.json").read_text())["_class_name"] == type(stock).__name__
    )
    stock.set_progress_bar_config(disable=True)
    call = {name: value for name, value in CALL.items() if name != "seed"}
    generator = [torch.Generator("cpu").manual_seed(CALL["seed"])]
    expected = stock(**call, generator=generator, output_type="np").images
    np.testing.assert_array_equal(draw(pipe), expected)


def test_a_single_file_draws_the_same_picture_bit_for_bit(folder, checkpoint, pipe):
    loaded = LatentDiffusion.from_single_file(checkpoint, device="cpu", config=folder)
    options = {"scheduler": "ddim"}
    np.testing.assert_array_equal(draw(loaded, **options), draw(pipe, **options))
    assert loaded.model.name == "tiny-all-in-one"
    assert loaded.model.hash() == find(checkpoint).hash()
    assert (loaded.model.height, loaded.model.vae_scale_factor) == (32, 8)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_a_single_file_tells_how_it_was_trained(folder, checkpoint, tmp_path, scheduler):
    config = shutil.copytree(folder, tmp_path / "config")
    scheduler.from_config(SCHEDULER).save_pretrained(config / "scheduler")
    index = json.loads((config / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler.__name__]
    (config / "model_index.json").write_text(json.dumps(index))
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(checkpoint) | marks, tmp_path / "v.safetensors")
    loaded = LatentDiffusion.from_single_file(tmp_path / "v.safetensors", "cpu", config=config)
    assert loaded.model.prediction_type == "v_prediction"
    assert loaded.scheduler.alphas_cumprod[-1] < 1e-6
    expected = draw(drawer("zero-terminal-snr"), scheduler="ddim")
    np.testing.assert_array_equal(draw(loaded, scheduler="ddim"), expected)


def test_without_a_configuration_a_file_decides_over_the_hubs(
    folder, checkpoint, tmp_path, monkeypatch
):
    """The hub's for Stable Diffusion 2 predicts v, at 768 pixels."""
    hubs = shutil.copytree(folder, tmp_path / "hubs")
    config = hubs / "scheduler" / "scheduler_config.json"
    told = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(told))
    found = {"pretrained_model_name_or_path": str(hubs)}
    monkeypatch.setattr("diffusers.loaders.single_file.fetch_diffusers_config", lambda _: found)
    loaded = LatentDiffusion.from_single_file(checkpoint, "cpu")
    assert (loaded.model.prediction_type, loaded.model.width) == ("epsilon", 512)
    chosen = LatentDiffusion.from_single_file(checkpoint, "cpu", config=hubs)
    assert (chosen.model.prediction_type, chosen.model.width) == ("v_prediction", 32)


def test_a_single_file_without_its_configuration_is_an_error_offline(checkpoint):
    with pytest.raises(InvalidRequest, match="give a model folder of the same kind as --config"):
        LatentDiffusion.from_pretrained(checkpoint, device="cpu")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_weights_that_lack_a_tensor_are_refused_and_never_filled_up(folder, tmp_path, part):
    broken = shutil.copytree(folder, tmp_path / "broken")
    [file] = (broken / part).glob("*.safetensors")
    weights = load_file(file)
    missing = sorted(name for name in weights if name.endswith(".weight"))[3]
    del weights[missing]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InvalidRequest, match=rf"the weights of its {part} lack .*weight"):
        LatentDiffusion.from_pretrained(broken, device="cpu")


@pytest.mark.parametrize(
    ("kind", "given"),
    [("xl", ()), ("4-channel", ["image"])]
    + [(kind, ["image", "mask_image"]) for kind in ("4-channel", "9-channel")],
)
def test_offloaded_weights_draw_the_same_picture(kind, given, picture, mask):
    pipe = LatentDiffusion(**components(sample_size=4, **KINDS[kind]))
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):  # as enable_sequential_cpu_offload does
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    options = {"image": picture, "mask_image": mask}
    options = CALL | {name: options[name] for name in given} | {"output_type": "np"}
    *_, last = pipe.stream(**options)
    *_, expected = drawer(kind).stream(**options)
    np.testing.assert_allclose(last.result.images, expected.result.images, atol=1e-5)


def test_a_folder_is_no_single_file(folder):
    with pytest.raises(InvalidRequest, match="from_pretrained loads folders"):
        LatentDiffusion.from_single_file(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "abacus"),
        ("device", "cuda:99"),
        ("dtype", "float8"),
        ("dtype", "fp16"),
        ("dtype", 16),
        ("attention", "flash"),
    ],
)
def test_a_wrong_device_dtype_or_attention_is_refused(folder, field, value):
    with pytest.raises(InvalidRequest) as refused:
        LatentDiffusion.from_pretrained(folder, **{"device": "cpu", field: value})
    assert refused.value.field == field


def test_xformers_without_a_gpu_is_refused(folder):
    with pytest.raises(InvalidRequest, match=r"latentgen\[xformers\]") as refused:
        LatentDiffusion.from_pretrained(folder, device="cpu", attention="xformers")
    assert refused.value.field == "attention"


def test_a_wrong_setting_is_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(InvalidRequest, match="attention"):
        LatentDiffusion.from_pretrained(folder, device="cpu", attention="flash")


def test_sliced_attention_draws_the_same_picture(folder, pipe):
    loaded = LatentDiffusion.from_pretrained(folder, device="cpu", attention="sliced")
    assert loaded.attention == "sliced"
    # Slices are multiplied one by one, so sums round differently.
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-4)
    assert loaded.generate(**CALL).settings["attention"] == "sliced"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_set_at_load_and_the_picture_is_close(folder, pipe, dtype):
    loaded = LatentDiffusion.from_pretrained(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.bfloat16}
    result = loaded.generate(**CALL, output_type="np")
    assert result.settings == {"device": "cpu", "dtype": "bfloat16", "attention": "sdpa"}
    assert abs(result.images - draw(pipe)).mean() < 0.05


def test_the_defaults_of_latentgen_json_are_used(folder, tmp_path):
    own = tmp_path / "own"
    drawer().save_pretrained(own)
    defaults = {"num_inference_steps": 2, "guidance_scale": 2.0, "scheduler": "heun", "height": 64}
    (own / "latentgen.json").write_text(json.dumps(defaults))
    result = LatentDiffusion.from_pretrained(own, device="cpu").generate("x")
    assert {name: getattr(result.request, name) for name in defaults} == defaults
    assert result.image.size == (32, 64)


def test_one_thread_loads_at_a_time_and_the_bundled_model_once(monkeypatch):
    """While they load, the libraries replace functions of torch: two at once left them replaced."""
    inside, loaded = [], []

    def load():
        inside.append(1)
        time.sleep(0.02)
        loaded.append(len(inside))
        inside.pop()

    def from_pretrained(*_):
        quietly(load)
        return "the model"

    monkeypatch.setattr(LatentDiffusion, "from_pretrained", from_pretrained)
    pipeline._bundled_once.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: pipeline._bundled(), range(4))) == {"the model"}
            assert loaded == [1]
            list(pool.map(lambda _: quietly(load), range(4)))
        assert loaded == [1] * 5
    finally:
        pipeline._bundled_once.cache_clear()


def test_progress_bars_that_were_off_stay_off():
    from diffusers.utils import logging

    for switch, shown in (
        (logging.disable_progress_bar, False),
        (logging.enable_progress_bar, True),
    ):
        switch()
        quietly(lambda: None)
        assert logging.is_progress_bar_enabled() is shown


def test_a_wrong_request_for_the_bundled_model_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    with pytest.raises(InvalidRequest, match="must be a multiple of"):
        generate("a red apple", height=33)
