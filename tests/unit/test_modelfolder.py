"""What is a model, judged by its files alone."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from fakes import drawer
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from latentgen import InvalidRequest
from latentgen.embeddings import read_embedding
from latentgen.modelfolder import CONVERT, Model, bundled_models, find, schedule_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    drawer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def refusal(model):
    with pytest.raises(InvalidRequest) as refused:
        find(model)
    assert refused.value.field == "model"
    assert "\n" not in str(refused.value)
    return str(refused.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_facts_of_a_folder(folder):
    model = find(folder)
    assert (model.name, model.path, model.hub_id) == ("tiny", folder, None)
    assert (model.vae_scale_factor, model.height, model.width) == (8, 32, 32)
    assert (model.num_inference_steps, model.guidance_scale, model.scheduler) == (50, 7.5, None)
    assert (model.scheduler_class, model.sees_mask) == ("DDIMScheduler", False)
    edit(folder / "unet" / "config.json", in_channels=9, sample_size=[4, 6])
    model = find(folder)
    assert (model.sees_mask, model.height, model.width) == (True, 32, 48)


def test_the_hash_is_the_beginning_of_sha256(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert find(folder).hash() == hashlib.sha256(weights.read_bytes()).hexdigest()[:10]
    single = Model(weights.stem, weights)
    assert single.is_single_file
    assert single.hash() == find(folder).hash()
    other = weights.with_name("diffusion_pytorch_model.non_ema.safetensors")  # is not drawn with
    other.write_bytes(b"")
    assert find(folder).hash() == single.hash()
    weights.unlink()
    assert "weights are missing" in refusal(folder)


def test_latentgen_json_brings_defaults(folder):
    own = {"num_inference_steps": 12, "guidance_scale": 3.0, "scheduler": "heun", "height": 64}
    (folder / "latentgen.json").write_text(json.dumps(own))
    model = find(folder)
    assert {name: getattr(model, name) for name in own} == own
    assert model.width == 32


def test_an_unknown_key_of_latentgen_json_is_refused(folder):
    (folder / "latentgen.json").write_text('{"steps": 12}')
    assert "'steps'" in refusal(folder)
    assert "num_inference_steps" in refusal(folder)


@pytest.mark.parametrize(
    "own", [{"height": "128"}, {"num_inference_steps": 2.5}, {"width": True}, {"scheduler": 1}]
)
def test_a_value_of_another_type_is_named(folder, own):
    (folder / "latentgen.json").write_text(json.dumps(own))
    [(name, value)] = own.items()
    assert f"its {name} is {value!r}" in refusal(folder)


@pytest.mark.parametrize("sample_size", ["x", [8], [8, "x"]])
def test_a_size_that_is_none_is_named(folder, sample_size):
    edit(folder / "unet" / "config.json", sample_size=sample_size)
    assert "sample_size" in refusal(folder)


def test_models_in_latentgens_home_are_found_by_their_names(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path))
    assert "no such folder or file" in refusal("mine")
    shutil.copytree(saved, tmp_path / "models" / "mine")
    assert find("mine").path == tmp_path / "models" / "mine"
    assert find("latentgen-icons-128").path == bundled_models()[0].path


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\xff"])
def test_json_that_is_no_object_is_refused(folder, content):
    (folder / "unet" / "config.json").write_text(content, "latin-1")
    assert "JSON" in refusal(folder)


@pytest.mark.parametrize(
    "model", ["nowhere", "./no/where", "/no/where", "", "a/b/c", "../x", "models/x.safetensors"]
)
def test_what_is_nowhere_is_refused(model):
    assert "no such folder or file" in refusal(model) or "not a model" in refusal(model)


@pytest.mark.parametrize("model", ["models/x--", "a/b..c", "a/b.git", "a/" + 100 * "b"])
def test_what_the_hub_would_not_have_is_nowhere_too(model):
    assert "there is no such folder, and it is no hub id" in refusal(model)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    assert "no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline", None])
def test_a_model_of_another_kind_is_refused(folder, kind):
    edit(folder / "model_index.json", _class_name=kind)
    assert "Stable Diffusion 1, 2 and XL" in refusal(folder)


def test_of_sdxl_both_text_encoders_are_wanted(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "its text_encoder_2/config.json is missing" in refusal(folder)
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "its autoencoder has a latents_mean" in refusal(folder)
    edit(
        folder / "model_index.json",
        _class_name="StableDiffusionXLPipeline",
        text_encoder=[None, None],
    )
    assert "a refiner of SDXL; give the base model" in refusal(folder)


@pytest.mark.parametrize(
    "missing",
    ["vae/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"],
)
def test_a_missing_part_is_named(folder, missing):
    (folder / missing).unlink()
    assert missing in refusal(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_damaged_weights_are_refused_from_their_header(folder, part):
    [weights] = (folder / part).glob("*.safetensors")
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * len(whole), b"<html>404</html>"):
        weights.write_bytes(damaged)
        assert "damaged" in refusal(folder)
        assert "damaged" in refusal(weights)


def test_missing_weights_are_refused(folder):
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    assert "weights are missing" in refusal(folder)


def test_pickles_are_refused_with_a_way_to_convert_them(folder, tmp_path):
    [weights] = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert "convert it once" in refusal(folder)
    for name in ("model.ckpt", "model.pt", "model.pth", "model.BIN"):
        (tmp_path / name).write_bytes(b"")
        assert "convert it once" in refusal(tmp_path / name)
        assert "convert it once" in refusal(tmp_path / "missing" / name)


VECTORS = torch.arange(12.0).reshape(2, 6)


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        ({"a.weight": VECTORS.T, "b.weight": VECTORS}, "b.weight"),
        ({"state_dict": {"a": VECTORS[:1], "b": VECTORS, "n": 3}, "global_step": 7}, "b"),
        ({"<cat>": torch.nn.Parameter(VECTORS)}, "<cat>"),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "x"}, "*"),
    ],
)
def test_pickles_are_converted_by_what_the_refusal_says(tmp_path, monkeypatch, pickled, name):
    monkeypatch.chdir(tmp_path)
    torch.save(pickled, "FILE")
    exec(re.search(r'python -c "(.*)"`', CONVERT)[1])
    assert torch.equal(load_file("NAME.safetensors")[name], VECTORS)
    if name in ("<cat>", "*"):
        word, [vectors] = read_embedding("NAME.safetensors")
        assert word == {"*": "NAME"}.get(name, name)
        assert torch.equal(vectors, VECTORS)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert ".safetensors" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.alpha"], "a LoRA; use it with --lora"),
        (["emb_params"], "use it with --embedding"),
        (["clip_l", "clip_g"], "use it with --embedding"),
        (["down_blocks.0.x", "up_blocks.0.x"], "no Stable Diffusion checkpoint"),
        ([], "no Stable Diffusion checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told_from_its_header(tmp_path, names, told):
    save_file({name: np.zeros(3, np.float32) for name in names}, tmp_path / "x.safetensors")
    assert told in refusal(tmp_path / "x.safetensors")


UNET = "model.diffusion_model."


def write_checkpoint(file, inputs=4, lacks="-", header=None, **more):
    """What a checkpoint is judged by, and a whole one has."""
    tensors = {name: torch.zeros(1) for name in ("first_stage_model.x", "cond_stage_model.x")}
    tensors[UNET + "input_blocks.0.0.weight"] = torch.zeros(8, inputs, 3, 3)
    kept = {name: value for name, value in tensors.items() if not name.startswith(lacks)}
    save_tensors(kept | more, file, header)
    return file


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"inputs": 5}, "a model that sees depth; latentgen draws with"),
        ({"inputs": 7}, "an upscaler"),
        ({"inputs": 8}, "InstructPix2Pix or Stable Video Diffusion"),
        ({"lacks": UNET, UNET + "joint_blocks.0": torch.ones(1)}, "Stable Diffusion 3; latentgen"),
        ({"lacks": UNET, UNET + "double_blocks.0": torch.ones(1)}, "Flux; latentgen draws"),
        ({"lacks": UNET, UNET + "blocks.0": torch.ones(1)}, "a model of another kind; latentgen"),
        ({"edm_mean": torch.ones(1, 4, 1, 1)}, "Playground v2.5; latentgen draws with"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, "CosXL"),
        ({"lacks": "first_stage"}, "its autoencoder is missing; give a checkpoint of the whole"),
        ({"lacks": "cond_stage"}, "its text encoder is missing; give a checkpoint of the whole"),
    ],
)
def test_a_checkpoint_of_another_kind_or_of_a_part_is_named(tmp_path, what, told):
    assert find(write_checkpoint(tmp_path / "x.safetensors")).sees_mask is False
    assert told in refusal(write_checkpoint(tmp_path / "x.safetensors", **what))


def test_a_checkpoint_tells_what_it_predicts(tmp_path):
    file, v = tmp_path / "x.safetensors", {"prediction_type": "v_prediction"}
    assert (schedule_of(write_checkpoint(file)), find(file).prediction_type) == ({}, "epsilon")
    write_checkpoint(file, v_pred=torch.zeros(0), header={"modelspec.prediction_type": "epsilon"})
    assert schedule_of(file) == v
    assert find(file).prediction_type == "v_prediction"
    write_checkpoint(file, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    assert schedule_of(file) == {
        **v,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    for told, wanted in (("v", v), ("epsilon", {"prediction_type": "epsilon"}), ("odd", {})):
        write_checkpoint(file, header={"modelspec.prediction_type": told})
        assert schedule_of(file) == wanted


@pytest.mark.parametrize(
    ("spread", "more", "size"),
    [
        (0.2, {}, 768),
        (0.02, {}, 512),
        (0.2, {"inputs": 9}, 512),
        (0.2, {"header": {"modelspec.prediction_type": "epsilon"}}, 512),
        (0.02, {"header": {"modelspec.prediction_type": "v"}}, 768),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_stable_diffusion_2_predicts_is_told_by_its_weights(
    tmp_path, spread, more, size, dtype
):
    words = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    bias = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = {words: torch.zeros(4, 1024), bias: torch.tensor([-spread, spread], dtype=dtype)}
    found = find(write_checkpoint(tmp_path / "x.safetensors", **tensors, **more))
    assert (found.width, found.height) == (size, size)
    assert found.prediction_type == {768: "v_prediction", 512: "epsilon"}[size]


def test_without_weights_to_judge_by_it_predicts_the_noise(tmp_path):
    words = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    bias = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = {words: torch.zeros(4, 1024)}
    for more in ({}, {bias: torch.ones(2, dtype=torch.bfloat16)}):
        file = write_checkpoint(tmp_path / "x.safetensors", **tensors, **more)
        assert (find(file).prediction_type, find(file).width) == ("epsilon", 512)


def test_a_hub_id_that_is_not_on_this_machine_is_refused_offline():
    assert "not on this machine" in refusal("someone/some-model")  # conftest: HF_HUB_OFFLINE


def test_the_bundled_models_are_models():
    assert [model.name for model in bundled_models()] == ["latentgen-icons-128"]
