"""LoRAs: every layout, the strength of every layer, and pictures as stock diffusers draws them."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from latentgen import InvalidRequest, LatentDiffusion, cli, emphasis, lora, lorafolder, metadata
from latentgen.embeddings import add_word
from latentgen.lora import (
    Layer,
    Lora,
    collect_lora,
    flatten_path,
    largest_difference,
    lora_metadata,
    read_lora,
    unflatten_path,
    write_lora,
)
from latentgen.lorafolder import LoraUse
from latentgen.request import Request

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 2, "output_type": "np"}
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty folder of LoRAs, and never the user's."""
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "loras"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def pipe() -> LatentDiffusion:
    """The tiny model of the session, in a pipeline of its own."""
    return LatentDiffusion(**fakes.parts())


def modules(model: nn.Module) -> dict[str, nn.Module]:
    found = model.named_modules()
    return {p: m for p, m in found if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in p}


def random_layer(module: nn.Module, rank: int, alpha: float, size: float = 0.3) -> Layer:
    out, *rest = module.weight.shape
    ones = (1,) * (len(rest) - 1)
    down, up = torch.randn(rank, *rest), size * torch.randn(out, rank, *ones)
    return Layer(down, up, alpha)


def random_lora(seed: int = 0, ranks=(4,), alphas=(2.0,), parts=("unet", "text_encoder")) -> Lora:
    """A LoRA for the attention of `fakes.parts()`, loud enough to change every picture."""
    torch.manual_seed(seed)
    chosen = {
        "unet": lambda p: ".attn" in p or ".ff." in p or p.endswith(("proj_in", "conv1")),
        "text_encoder": lambda p: "self_attn" in p or ".fc" in p,
    }
    layers: dict[str, dict[str, Layer]] = {"unet": {}, "text_encoder": {}}
    for part in parts:
        for i, (path, module) in enumerate(modules(fakes.parts()[part]).items()):
            if chosen[part](path):
                rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
                layers[part][path] = random_layer(module, rank, alpha)
    return Lora(**layers)


def as_dora(one: Lora) -> Lora:
    """The same, with magnitudes that are not the weights' own."""
    fresh = {}
    for part in ("unet", "text_encoder"):
        known = modules(fakes.parts()[part])
        fresh[part] = {
            path: replace(
                layer,
                magnitude=known[path].weight.detach().flatten(1).norm(dim=1)
                * torch.linspace(0.8, 1.3, len(known[path].weight)),
            )
            for path, layer in getattr(one, part).items()
        }
    return Lora(**fresh)


def merged(one: Lora, weight: float = 1.0, text_encoder_weight: float | None = None):
    """A pipeline whose weights were changed by hand."""
    parts = copy.deepcopy(fakes.parts())
    weights = {"unet": weight, "text_encoder": text_encoder_weight}
    for part, own in weights.items():
        known = modules(parts[part])
        for path, layer in getattr(one, part).items():
            w = known[path].weight.data
            rank = layer.down.shape[0]
            change = layer.alpha / rank * (layer.up.flatten(1) @ layer.down.flatten(1))
            new = w + change.reshape(w.shape)
            if layer.magnitude is not None:
                axis = 0 if layer.magnitude.ndim == 1 else 1  # rows, or columns
                others = tuple(d for d in range(w.ndim) if d != axis)
                ratio = layer.magnitude.flatten() / new.pow(2).sum(others).sqrt()
                new = new * ratio.reshape([-1 if d == axis else 1 for d in range(w.ndim)])
            w += (weight if own is None else own) * (new - w)
    return LatentDiffusion(**parts)


def draw(pipe: LatentDiffusion, **options) -> np.ndarray:
    return pipe.generate(**{**CALL, **options}).images


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for the order of float32 sums."""
    return float(np.abs(one - other).max()) < 1e-4


# Names and layouts.


@pytest.mark.parametrize("linear_projection", [False, True])
def test_kohyas_flat_names_are_turned_back_exactly(linear_projection):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            use_linear_projection=linear_projection,
            time_cond_proj_dim=32,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12))
    paths = [*modules(unet), *modules(text_encoder)]
    assert len(modules(unet)) > 280
    assert len(modules(text_encoder)) == 72
    assert [unflatten_path(flatten_path(path)) for path in paths] == paths
    prefixed = [f"text_model.{path}" for path in modules(text_encoder)]
    assert [unflatten_path(flatten_path(path)) for path in prefixed] == prefixed


@pytest.mark.parametrize("layout", lora.LAYOUTS)
@pytest.mark.parametrize("dora", [False, True])
def test_every_layout_is_read_as_it_was_written(tmp_path, layout, dora):
    one = random_lora(ranks=(4, 2, 3), alphas=(2.0, 4.0, 1.5, 3.0))
    one = as_dora(one) if dora else one
    file = write_lora(one, tmp_path / "x.safetensors", layout)
    again = read_lora(file)
    assert again.layout == layout
    for part in ("unet", "text_encoder"):
        before, after = getattr(one, part), getattr(again, part)
        assert before.keys() == after.keys()
        for path, layer in before.items():
            assert torch.equal(layer.down, after[path].down)
            assert torch.equal(layer.up, after[path].up)
            assert layer.alpha == after[path].alpha
            assert (layer.magnitude is None) == (after[path].magnitude is None)
            assert not dora or torch.equal(layer.magnitude, after[path].magnitude)
    assert largest_difference(one, again) == 0


def test_the_keys_are_those_of_the_field(tmp_path):
    torch.manual_seed(0)
    layer = Layer(torch.ones(2, 3), torch.ones(3, 2), 1.0, torch.ones(3))
    conv = Layer(torch.ones(2, 3, 3, 3), torch.ones(3, 2, 1, 1), 2.0, torch.ones(3))
    one = Lora({QUERY: layer, CONV: conv}, {TEXT: layer})
    kohya = load_file(write_lora(one, tmp_path / "k.safetensors"))
    flat = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {key for key in kohya if key.startswith(flat)} == {
        *(f"{flat}.{role}" for role in ("lora_down.weight", "lora_up.weight", "alpha")),
        f"{flat}.dora_scale",
    }
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in kohya
    assert kohya[f"{flat}.alpha"].shape == ()
    assert kohya["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].shape == (3, 1, 1, 1)
    other = load_file(write_lora(one, tmp_path / "d.safetensors", "diffusers"))
    assert f"unet.{QUERY}.lora_A.weight" in other
    assert f"text_encoder.text_model.{TEXT}.lora_linear_layer.down.weight" in other
    assert other[f"unet.{CONV}.lora_magnitude_vector"].shape == (1, 3, 1, 1)
    write_lora(one, tmp_path / "p", "peft")
    peft = load_file(tmp_path / "p" / "unet" / "adapter_model.safetensors")
    assert f"base_model.model.{QUERY}.lora_B.weight" in peft


def test_peft_reads_our_folders_with_the_right_strengths(tmp_path):
    from peft import LoraConfig, PeftModel

    one = random_lora(ranks=(4, 2, 3), alphas=(2.0, 4.0))
    write_lora(one, tmp_path / "p", "peft")
    for part in ("unet", "text_encoder"):
        config = LoraConfig.from_pretrained(tmp_path / "p" / part)
        assert config.peft_type == "LORA"
        model = copy.deepcopy(fakes.parts()[part])
        loaded = PeftModel.from_pretrained(model, tmp_path / "p" / part)
        again = collect_lora(loaded) if part == "unet" else collect_lora(nn.Module(), loaded)
        assert largest_difference(again, Lora(**{**NOTHING, part: getattr(one, part)})) < 1e-6


NOTHING: dict = {"unet": {}, "text_encoder": {}}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trains_is_collected(dora, rslora):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    parts = copy.deepcopy(fakes.parts())
    plain, x = fakes.drawer(), torch.randn(1, 4, 4, 4)
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_dora=dora,
        use_rslora=rslora,
        init_lora_weights=False,
        target_modules=["to_q", "to_out.0", "conv1", "proj_in"],
    )
    inject_adapter_in_model(config, parts["unet"], "mine")
    text = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["q_proj", "fc1"])
    inject_adapter_in_model(text, parts["text_encoder"], "mine")
    one = collect_lora(parts["unet"], parts["text_encoder"], "mine")
    assert len(one.unet) == sum(isinstance(m, LoraLayer) for m in parts["unet"].modules()) > 20
    assert len(one.text_encoder) == 4
    assert one.unet[QUERY].strength == pytest.approx(3 / 2 if rslora else 3 / 4)
    assert (one.unet[CONV].magnitude is not None) == dora

    context = torch.randn(1, 7, 16)
    with torch.no_grad():
        expected = parts["unet"](x, 10, context).sample
        found = merged(one).unet(x, 10, context).sample
        assert not torch.allclose(plain.unet(x, 10, context).sample, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not collect_lora(parts["unet"], adapter="default").unet


def test_older_layouts_of_diffusers_are_read(tmp_path):
    torch.manual_seed(0)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{block}.processor.to_q_lora.down.weight": down,
        f"unet.{block}.processor.to_q_lora.up.weight": up,
        f"unet.{block}.processor.to_out_lora.down.weight": down,
        f"unet.{block}.processor.to_out_lora.up.weight": up,
        f"unet.{block}.to_k.lora.down.weight": down,
        f"unet.{block}.to_k.lora.up.weight": up,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": down,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": up,
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.down.weight": down,
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.up.weight": up,
    }
    save_file({key: x.clone() for key, x in tensors.items()}, tmp_path / "old.safetensors")
    one = read_lora(tmp_path / "old.safetensors")
    assert set(one.unet) == {f"{block}.to_q", f"{block}.to_out.0", f"{block}.to_k"}
    assert set(one.text_encoder) == {TEXT, "encoder.layers.1.mlp.fc1"}
    assert {layer.strength for layer in one.layers.values()} == {1.0}


def test_strange_keys_are_listed_and_damaged_files_are_named(tmp_path):
    good = {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)}
    with_up = {**good, f"unet.{QUERY}.lora_B.weight": torch.ones(16, 2)}
    for tensors, told in [
        (good, r"unet\.down_blocks\.1.*lora_up or lora_B is missing"),
        ({**with_up, "first_stage_model.x": torch.ones(1)}, "first_stage_model.x"),
        ({**with_up, "lora_te2_text_model_x.alpha": torch.ones(1)}, "lora_te2_text_model_x"),
        ({**with_up, f"unet.{QUERY}.lora_B.bias": torch.ones(1)}, "lora_B.bias"),
        ({"lora_unet_input_blocks_1_1_proj_in.alpha": torch.ones(1)}, r"down_blocks\.0.*lora_down"),
        ({"emb_params": torch.ones(2, 16)}, "use it with --embedding"),
        ({"model.diffusion_model.out.0.bias": torch.ones(1)}, "use it with --model"),
        ({}, "nothing in it"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(1)}, "hada_w1_a"),
        ({**good, f"unet.{QUERY}.lora_B.weight": torch.ones(16, 3)}, "unet.down_blocks.1"),
        ({**with_up, f"unet.{QUERY}.alpha": torch.ones(2)}, "unet.down_blocks.1"),
        ({**with_up, f"unet.{TEXT}.alpha": torch.ones(1)}, f"unet.{TEXT}"),
    ]:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InvalidRequest, match=told):
            read_lora(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{nothing")
    with pytest.raises(InvalidRequest, match="damaged"):
        read_lora(tmp_path / "x.safetensors")
    peft = {f"base_model.model.{key.removeprefix('unet.')}": v for key, v in with_up.items()}
    save_file(peft, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidRequest, match="needs this file"):
        read_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "use_rslora": true}')
    assert read_lora(tmp_path).unet[QUERY].strength == pytest.approx(6 / 2**0.5)
    for damaged in ('{"alpha_pattern": {"(": 1}}', '{"lora_alpha": []}', "[1]", "{"):
        (tmp_path / "adapter_config.json").write_text(damaged)
        with pytest.raises(InvalidRequest, match=r"damaged|JSON"):
            read_lora(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["lora_up.weight", "alpha"])
def test_numbers_that_are_not_finite_are_refused_when_read(tmp_path, value, role):
    tensors = load_file(write_lora(random_lora(), tmp_path / "x.safetensors"))
    name = next(key for key in tensors if key.endswith(role))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match=rf"x\.safetensors.*{name}.*not finite"):
        read_lora(tmp_path / "x.safetensors")


def test_a_broken_lora_is_refused_before_weights_are_read(tmp_path, pipe, monkeypatch):
    picture, torn = tmp_path / "png.safetensors", tmp_path / "torn.safetensors"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    torn.write_bytes(write_lora(random_lora(), torn).read_bytes()[:-1])
    half = tmp_path / "half.safetensors"
    save_file({f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)}, half)
    monkeypatch.setattr(lora, "_load", None)  # would be a TypeError
    for file in (picture, torn, half):
        with pytest.raises(InvalidRequest, match=file.name):
            Request(prompt="x", loras=[file])
        with pytest.raises(InvalidRequest, match=file.name):
            pipe.load_lora(file)


# The header.


def test_the_header_has_what_the_field_looks_for(tmp_path):
    told = lora_metadata(
        title="ink",
        base_model="toy",
        rank=4,
        alpha=2.0,
        prediction_type="v_prediction",
        resolution=128,
        trigger_phrase="in ink",
        manifest={"steps": 3},
    )
    one = replace(random_lora(), metadata=told)
    file = write_lora(one, tmp_path / "x.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    minimum = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha")
    assert all(f"ss_{name}" in header for name in (*minimum, "network_args"))
    assert header["ss_network_dim"] == "4"
    assert header["ss_network_alpha"] == "2"
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header["modelspec.prediction_type"] == "v"
    assert header["modelspec.trigger_phrase"] == "in ink"
    assert header["modelspec.resolution"] == "128x128"
    assert json.loads(header["latentgen.manifest"]) == {"steps": 3}
    assert "modelspec.author" not in header
    data = file.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    digest = hashlib.sha256(body).hexdigest()
    assert header["sshs_model_hash"] == digest
    assert header["modelspec.hash_sha256"] == f"0x{digest}"
    assert len(header["sshs_legacy_hash"]) == 8
    assert read_lora(file).metadata["modelspec.title"] == "ink"
    (use,) = lorafolder.resolve([lorafolder.parse([file])], {})
    assert use.webui_hash == digest[:12]
    assert use.sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_without_metadata_gets_kohyas_minimum(tmp_path):
    header = read_lora(write_lora(random_lora(), tmp_path / "x.safetensors")).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2")
    mixed = random_lora(ranks=(4, 2), alphas=(1.0, 2.0))
    header = read_lora(write_lora(mixed, tmp_path / "x.safetensors")).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_lora(random_lora(0), tmp_path / "x.safetensors")
    before = file.read_bytes()

    def fails(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("latentgen.outputs.os.fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_lora(random_lora(1), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*x.safetensors*")] == ["x.safetensors"]


# Drawing.


@pytest.mark.usefixtures("stock_convolutions")
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "parts", [("unet",), ("text_encoder",), ("unet", "text_encoder")], ids=" and ".join
)
def test_pictures_are_those_of_stock_diffusers(tmp_path, pipe, layout, parts):
    file = write_lora(random_lora(parts=parts), tmp_path / "x.safetensors", layout)
    stock = StableDiffusionPipeline(
        **copy.deepcopy(fakes.parts()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(file))
    options = {"num_inference_steps": 2, "output_type": "np"}
    options["generator"] = [torch.Generator("cpu").manual_seed(3)]
    expected = stock("a red apple", **options).images
    plain = draw(pipe)
    pipe.load_lora(file)
    found = draw(pipe)
    np.testing.assert_array_equal(found, expected)
    assert not near(found, plain)


def test_dora_pictures_are_those_of_stock_diffusers(tmp_path, pipe):
    file = write_lora(as_dora(random_lora()), tmp_path / "x.safetensors", "diffusers")
    stock = StableDiffusionPipeline(
        **copy.deepcopy(fakes.parts()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(file))
    generator = [torch.Generator("cpu").manual_seed(3)]
    expected = stock(
        "a red apple", generator=generator, num_inference_steps=2, output_type="np"
    ).images
    pipe.load_lora(file)
    assert near(draw(pipe), expected)


def test_diffusers_layout_keeps_mixed_strengths_in_stock_diffusers(tmp_path, pipe):
    one = random_lora(ranks=(4, 2, 3), alphas=(2.0, 4.0, 1.5, 3.0))
    file = write_lora(one, tmp_path / "x.safetensors", "diffusers")
    stock = StableDiffusionPipeline(
        **copy.deepcopy(fakes.parts()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.load_lora_weights(str(file), adapter_name="x")
    again = collect_lora(stock.unet, stock.text_encoder, "x")
    assert largest_difference(one, again) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 0.8), (0.5, -1.2), (0.0, 1.0)])
def test_pictures_are_those_of_weights_merged_by_hand(tmp_path, pipe, dora, weights):
    one = random_lora(ranks=(4, 2, 3), alphas=(2.0, 4.0, 1.5, 3.0))
    one = as_dora(one) if dora else one
    write_lora(one, tmp_path / "x.safetensors")
    pipe.load_lora(tmp_path / "x.safetensors", weights[0], text_encoder_weight=weights[1])
    assert near(draw(pipe), draw(merged(one, *weights)))


def test_dora_of_columns_is_applied_too(tmp_path, pipe):
    torch.manual_seed(0)
    layers = {}
    for path, module in modules(fakes.parts()["unet"]).items():
        if "to_q" in path or path.endswith("conv2"):
            columns = module.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
            stretched = columns * torch.linspace(0.7, 1.4, len(columns))
            layers[path] = replace(random_layer(module, 2, 1.0), magnitude=stretched[None])
    one = Lora(layers, {})
    file = write_lora(one, tmp_path / "x.safetensors")
    assert load_file(file)["lora_unet_" + flatten_path(CONV)[:-1] + "2.dora_scale"].ndim == 4
    pipe.load_lora(file, 0.7)
    assert near(draw(pipe), draw(merged(one, 0.7)))
    with pytest.raises(InvalidRequest, match="only kohya"):
        write_lora(one, tmp_path / "y.safetensors", "diffusers")


def test_without_an_alpha_the_strength_is_one(tmp_path, pipe):
    one = random_lora(alphas=(2.0,))
    tensors = load_file(write_lora(one, tmp_path / "x.safetensors"))
    save_file({k: v for k, v in tensors.items() if "alpha" not in k}, tmp_path / "y.safetensors")
    again = read_lora(tmp_path / "y.safetensors")
    assert {layer.strength for layer in again.layers.values()} == {1.0}
    full = Lora(
        *(
            {p: replace(x, alpha=4.0) for p, x in part.items()}
            for part in (one.unet, one.text_encoder)
        )
    )
    assert largest_difference(again, full) == 0


@pytest.mark.parametrize("linear", [False, True])
def test_linear_layers_and_convolutions_of_one_pixel_fit_each_other(tmp_path, linear):
    path = "down_blocks.1.attentions.0.proj_in"
    parts = dict(fakes.parts())
    if linear:
        config = dict(parts["unet"].config) | {"use_linear_projection": True}
        config.pop("_use_default_values")
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config(config).eval()
    torch.manual_seed(1)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    flat = Lora({path: Layer(down, up, 2.0)}, {})
    deep = Lora({path: Layer(down[..., None, None], up[..., None, None], 2.0)}, {})
    pictures = []
    for name, one in (("flat", flat), ("deep", deep)):
        pipe = LatentDiffusion(**parts)
        plain = draw(pipe)
        pipe.load_lora(write_lora(one, tmp_path / f"{name}.safetensors"))
        pictures.append(draw(pipe))
    np.testing.assert_array_equal(*pictures)
    assert not near(pictures[0], plain)


@pytest.mark.parametrize("dora", [False, True])
def test_weight_zero_and_unloading_leave_no_bit_changed(tmp_path, pipe, dora):
    one = as_dora(random_lora()) if dora else random_lora()
    file = write_lora(one, tmp_path / "x.safetensors")
    plain = draw(pipe)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    name = pipe.load_lora(file, 0.0)
    np.testing.assert_array_equal(draw(pipe), plain)
    pipe.unload_lora(name)
    pipe.load_lora(file, name="other")
    assert not near(draw(pipe), plain)
    pipe.unload_lora()
    np.testing.assert_array_equal(draw(pipe), plain)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(InvalidRequest, match="not loaded"):
        pipe.unload_lora("other")


def test_several_loras_add_up(tmp_path, pipe):
    one, two = random_lora(1), random_lora(2, ranks=(3,), alphas=(3.0,))
    first = write_lora(one, tmp_path / "one.safetensors")
    second = write_lora(two, tmp_path / "two.safetensors", "diffusers")
    expected = merged(one, 0.6)
    for part in ("unet", "text_encoder"):
        known = modules(getattr(expected, part))
        for path, layer in getattr(two, part).items():
            weight = known[path].weight.data
            weight += 0.3 * layer.change().to(weight).reshape(weight.shape)
    pipe.load_lora(first, 0.6)
    found = draw(pipe, loras=[f"{second}:0.3"])
    assert near(found, draw(expected))
    pipe.unload_lora()
    np.testing.assert_array_equal(draw(pipe, loras=[(first, 0.6), (second, 0.3)]), found)


def test_a_lora_of_another_architecture_is_refused_and_the_model_stays(tmp_path, pipe):
    plain = draw(pipe)
    wide = random_lora()
    layer = replace(wide.unet[QUERY], down=torch.randn(4, 99))
    missing = {f"up_blocks.7.resnets.{i}.conv1": layer for i in range(12)}
    for one, told in [
        (Lora({**wide.unet, QUERY: layer}, {}), rf"1 of \d+ layers.*{QUERY}: \(16, 99\), not"),
        (
            Lora({**wide.unet, **missing}, {}),
            r"12 of \d+ layers.*up_blocks\.7.*no such module.*\.\.\.",
        ),
        (Lora({}, {"encoder.layers.9.self_attn.q_proj": layer}), "encoder.layers.9"),
    ]:
        file = write_lora(one, tmp_path / "x.safetensors")
        with pytest.raises(InvalidRequest, match=told):
            pipe.load_lora(file)
        with pytest.raises(InvalidRequest, match=told):
            pipe.stream("x", loras=[file])
        np.testing.assert_array_equal(draw(pipe), plain)
    with pytest.raises(InvalidRequest) as refused:
        pipe.load_lora(write_lora(Lora(missing, {}), tmp_path / "x.safetensors"))
    assert refused.value.hint.count("no such module") == 10


def test_a_compiled_model_is_refused_as_it_would_ignore_the_lora(tmp_path):
    parts = dict(fakes.parts())
    parts["unet"] = copy.deepcopy(parts["unet"])
    parts["unet"].compile()
    file = write_lora(random_lora(parts=("unet",)), tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match="compiled"):
        LatentDiffusion(**parts).load_lora(file)


def test_threads_with_loras_of_their_own_do_not_disturb_each_other(tmp_path):
    fresh = LatentDiffusion(**copy.deepcopy(fakes.components(sample_size=4)))
    files = [write_lora(random_lora(seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    wanted = [[], [files[0]], [(files[1], 0.7)], [files[0], files[2]]]
    found: list = [[] for _ in wanted]
    ready = threading.Barrier(len(wanted))

    def work(k):
        ready.wait()
        for _ in range(5):
            found[k].append(draw(fresh, loras=wanted[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    solo = [draw(fresh, loras=loras) for loras in wanted]
    assert len({picture.tobytes() for picture in solo}) == 4
    for pictures, alone in zip(found, solo, strict=True):
        assert len(pictures) == 5
        for picture in pictures:
            np.testing.assert_array_equal(picture, alone)
    assert all(len(module._forward_hooks) <= 1 for module in fresh.unet.modules())


def test_streams_that_alternate_keep_their_own_loras(tmp_path, pipe):
    file = write_lora(random_lora(), tmp_path / "x.safetensors")
    options = {**CALL, "num_inference_steps": 4}
    expected = [pipe.generate(**options, loras=loras).images for loras in ([file], [])]
    streams = [pipe.stream(**options, loras=loras) for loras in ([file], [])]
    for pair in zip(*streams, strict=True):
        last = pair
    for step, picture in zip(last, expected, strict=True):
        np.testing.assert_array_equal(step.result.images, picture)


def test_a_drawing_under_way_finishes_with_its_lora(tmp_path, pipe):
    file = write_lora(random_lora(), tmp_path / "x.safetensors")
    name = pipe.load_lora(file)
    expected = draw(pipe)
    steps = pipe.stream(**CALL)
    next(steps)
    pipe.unload_lora(name)
    (last,) = steps
    np.testing.assert_array_equal(last.result.images, expected)


def test_without_a_lora_there_are_no_hooks(tmp_path):
    fresh = LatentDiffusion(**copy.deepcopy(fakes.components(sample_size=4)))
    draw(fresh)
    assert not any(module._forward_hooks for module in fresh.unet.modules())
    draw(fresh, loras=[write_lora(random_lora(), tmp_path / "x.safetensors")])
    assert all(len(module._forward_hooks) <= 1 for module in fresh.unet.modules())


def test_loras_are_used_without_peft():
    code = "import sys, latentgen.adapters; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ours_add_up_with_those_that_diffusers_loaded(tmp_path, pipe):
    files = [write_lora(random_lora(k), tmp_path / f"{k}.safetensors") for k in (0, 1)]
    expected = draw(pipe, loras=files)
    parts = copy.deepcopy(fakes.parts())
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none).load_lora_weights(str(files[0]))
    assert near(draw(LatentDiffusion(**parts), loras=[files[1]]), expected)
    with pytest.raises(InvalidRequest, match="use load_lora"):
        pipe.load_lora_weights(str(files[0]))
    with pytest.raises(InvalidRequest, match="use load_embedding"):
        pipe.load_textual_inversion("x.safetensors")


def test_saving_a_model_with_a_lora_saves_the_model(tmp_path, pipe):
    plain = draw(pipe)
    pipe.load_lora(write_lora(random_lora(), tmp_path / "x.safetensors"))
    draw(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = LatentDiffusion.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(draw(again), plain)


# Requests.


def test_tags_in_a_prompt_are_taken_out_and_applied(tmp_path, pipe, home):
    write_lora(random_lora(1), home / "ink.safetensors")
    file = write_lora(random_lora(2), tmp_path / "wood.safetensors")
    pipe.load_lora(file, 0.0, name="my wood")
    expected = draw(pipe, loras=[("ink", 0.5), ("my wood", 0.25, 0.75)])
    tagged = "<lora:ink:0.5>a red apple <lora:my wood:0.25:0.75>"
    result = pipe.generate(**{**CALL, "prompt": tagged})
    np.testing.assert_array_equal(result.images, expected)
    assert result.request.prompt == ("a red apple",)
    assert not near(expected, draw(pipe))


def test_a_tag_says_one_weight_for_both_parts_or_text_and_unet():
    request = Request(prompt="a <lora:x> <lora:y:0.5> <lora:z:0.1:-0.2> b")
    assert request.loras == (
        LoraUse("x", 1.0, 1.0),
        LoraUse("y", 0.5, 0.5),
        LoraUse("z", weight=-0.2, text_encoder_weight=0.1),
    )
    assert "<" not in request.prompt[0]
    assert [use.tag for use in request.loras] == ["<lora:x:1>", "<lora:y:0.5>", "<lora:z:0.1:-0.2>"]
    assert Request(prompt="two  spaces stay ").prompt == ("two  spaces stay ",)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": ["a <lora:x:1>", "b"]}, "make a call for each"),
        ({"prompt": ["a <lora:x:1>", "b <lora:x:0.5>"]}, "make a call for each"),
        ({"prompt": "a <lora:x:much>"}, "<lora:NAME:0.8>"),
        ({"prompt": "a <lora:x:1:2:3>"}, "<lora:NAME:0.8>"),
        ({"prompt": "a <lora::1>"}, "<lora:NAME:0.8>"),
        ({"prompt": "a <lora:x:1> <lora:y"}, "'<lora:y': its > is missing"),
        ({"prompt": "<lora:" * 20_000}, "its > is missing"),  # in a moment: once it took seconds
        ({"prompt": "<lora:x:1>"}, "say what to draw"),
        ({"prompt": "a <lora:x:1> <lora:x:1>"}, "named twice"),
        ({"prompt": "a", "negative_prompt": "b <lora:x:1>"}, "belongs into the prompt"),
        ({"prompt": "a", "loras": "x.safetensors"}, "a list"),
        ({"prompt": "a", "loras": ["nothing.safetensors"]}, "no such file"),
        ({"prompt": "a", "loras": ["folder/x"]}, "no such file"),
        ({"prompt": "a", "loras": ["x.ckpt"]}, "pickle"),
        ({"prompt": "a", "loras": ["x:nan"]}, "must be a number"),
        ({"prompt": "a", "loras": ["x:"]}, "must be a number"),
        ({"prompt": "a", "loras": ["x:abc"]}, "'x:abc': its weight.*not 'abc'"),
        ({"prompt": "a", "loras": ["x:1e30"]}, "from -100 to 100"),
        ({"prompt": "a <lora:x:1e30>"}, "<lora:x:1e30>"),
        ({"prompt": "a", "loras": ["x:1:2:3"]}, "'x:1:2:3': write FILE:0.8"),
        ({"prompt": "a", "loras": ["x.safetensors:1:2:3"]}, "write FILE:0.8"),
        ({"prompt": "a", "loras": [("x", True)]}, "must be a number"),
        ({"prompt": "a", "loras": [3]}, "file or name"),
    ],
)
def test_wrong_loras_are_refused_before_any_model(asked, told):
    with pytest.raises(InvalidRequest, match=told):
        Request(**asked)


def test_loras_whose_files_are_called_alike_are_called_as_their_folders(tmp_path, pipe):
    for name in ("ink", "wood"):
        (tmp_path / name).mkdir()
        write_lora(random_lora(len(name)), tmp_path / name / "pytorch_lora_weights.safetensors")
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("ink", "wood")]
    assert [use.name for use in map(lorafolder.parse, files)] == ["ink", "wood"]
    peft = write_lora(random_lora(), tmp_path / "reed", "peft") / "unet" / files[0].name
    assert lorafolder.parse(files[0].rename(peft)).name == "reed"
    files[0] = peft
    assert not near(draw(pipe, loras=files), draw(pipe, loras=files[:1]))


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_a_lora_of_changed_weights_is_refused(tmp_path, begun, layout):
    path = write_lora(random_lora(parts=("unet",)), tmp_path / "x.safetensors", layout)
    if layout == "peft":
        settings = path / "unet" / "adapter_config.json"
        settings.write_text(
            json.dumps(json.loads(settings.read_text()) | {"init_lora_weights": begun})
        )
    else:
        header = {"unet.lora_alpha": 2, "unet.init_lora_weights": begun}
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(
        InvalidRequest, match=f"x.* init_lora_weights is '{begun}': such a LoRA belongs"
    ):
        read_lora(path)


def test_a_name_found_nowhere_lists_those_there_are_and_names_stay_in_the_folder(pipe, home):
    write_lora(random_lora(), home / "ink.safetensors")
    write_lora(random_lora(), home.parent / "outside.safetensors")
    pipe.load_lora(home / "ink.safetensors", name="mine")
    for name in ("wood", "../outside", str(home.parent / "outside"), "outside"):
        with pytest.raises(InvalidRequest, match=r"there are: ink, mine \(in .*loras"):
            pipe.stream(f"a <lora:{name}:1>")
    with pytest.raises(InvalidRequest, match="already loaded"):
        pipe.load_lora(home / "ink.safetensors", name="mine")


def test_a_file_with_the_name_of_another_that_is_loaded_is_refused(pipe, tmp_path):
    """It would take the place of the other one, and they are said to add up."""
    first, second = tmp_path / "ink.safetensors", tmp_path / "o" / "ink.safetensors"
    second.parent.mkdir()
    write_lora(random_lora(), first)
    write_lora(random_lora(), second)
    pipe.load_lora(first, 0.5)
    with pytest.raises(InvalidRequest, match="another file of that name is loaded"):
        pipe.stream("a cat", loras=[f"{second}:0.8"])
    request = Request(prompt="a cat", loras=[f"{first}:0.8"])
    assert [use.weight for use in pipe.resolve(request).loras] == [0.8]
    pipe.load_lora(second, 0.8, name="other")
    assert [use.name for use in pipe.resolve(Request(prompt="a cat")).loras] == ["ink", "other"]


def test_the_folder_of_loras_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("LATENTGEN_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert lorafolder.folder() == tmp_path / "latentgen" / "loras"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert lorafolder.folder().parts[-4:] == (".local", "share", "latentgen", "loras")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Application Support" in lorafolder.folder().parts


# Metadata.


def test_the_infotext_and_the_record_name_the_loras(tmp_path, pipe, home):
    file = write_lora(random_lora(), home / "ink.safetensors")
    options = {**CALL, "output_type": "pil", "prompt": "a red apple <lora:ink:0.5:0.25>"}
    result = pipe.generate(**options)
    lines = metadata.infotext(result, 0).split("\n")
    assert lines[0] == "a red apple <lora:ink:0.5:0.25>"
    digits = read_lora(file).metadata["sshs_model_hash"][:12]
    assert metadata.parse_infotext("\n".join(lines)).fields["Lora hashes"] == f"ink: {digits}"
    (path,) = result.save(tmp_path / "x.png")
    known = metadata.read(path).record
    assert known["request"]["prompt"] == ["a red apple"]
    assert known["request"]["loras"] == [
        {
            "name": "ink",
            "weight": 0.25,
            "text_encoder_weight": 0.5,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    ]
    assert str(tmp_path) not in json.dumps(known)
    again = pipe.draw(metadata.request_from_record(known))
    *_, last = again
    assert last.result.image.tobytes() == result.image.tobytes()
    assert metadata.differences(known, last.result) == []
    info = metadata.parse_infotext(metadata.infotext(result, 0))
    request, notes = metadata.request_from_infotext(info)
    assert request.loras[0].path == file
    assert request.loras[0].weight == 0.25
    assert notes == []


def test_another_or_a_missing_lora_is_told(tmp_path, pipe, home):
    file = write_lora(random_lora(), home / "ink.safetensors")
    result = pipe.generate(**{**CALL, "output_type": "pil", "loras": ["ink:0.5"]})
    known = json.loads(json.dumps(metadata.record(result, 0)))
    info = metadata.parse_infotext(metadata.infotext(result, 0))
    file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(InvalidRequest, match="no LoRA of that name"):
        pipe.draw(metadata.request_from_record(known))
    request, notes = metadata.request_from_infotext(info)
    assert notes == ["the LoRA ink, which is not here"]
    assert request.loras == ()

    request = metadata.request_from_record(known, [tmp_path / "moved.safetensors"])
    *_, last = pipe.draw(request)
    assert last.result.image.tobytes() == result.image.tobytes()
    assert metadata.differences(known, last.result) == []

    write_lora(random_lora(9), file)
    *_, last = pipe.draw(metadata.request_from_record(known))
    told = "the LoRA ink is not the one that it was made with"
    assert metadata.differences(known, last.result) == [told]
    assert metadata.request_from_infotext(info)[1] == [told]


@pytest.mark.parametrize("told", [["ink"], [{"name": "ink"}], 3, [{"name": [], "sha256": {}}]])
def test_a_damaged_record_of_loras_is_refused(pipe, told):
    result = pipe.generate(**{**CALL, "output_type": "pil"})
    known = json.loads(json.dumps(metadata.record(result, 0)))
    assert "loras" not in known["request"]
    known["request"]["loras"] = told
    with pytest.raises(InvalidRequest, match="damaged"):
        metadata.request_from_record(known)


# Textual inversion.


@pytest.fixture
def learner():
    """A pipeline whose tokenizer and text encoder may be changed."""
    return LatentDiffusion(**copy.deepcopy(fakes.parts()))


@pytest.mark.parametrize("key", ["<cat>", "emb_params"])
@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_is_a_word_of_the_prompt(tmp_path, learner, key, count):
    torch.manual_seed(0)
    vectors = torch.randn(count, 16)
    save_file({key: vectors}, tmp_path / "mycat.safetensors")
    plain = draw(learner, prompt="a cat")
    token = learner.load_embedding(tmp_path / "mycat.safetensors")
    assert token == ("mycat" if key == "emb_params" else "<cat>")
    table = learner.text_encoder.get_input_embeddings().weight
    words = [token, *(f"{token}_{i}" for i in range(1, count))]
    ids = learner.tokenizer.convert_tokens_to_ids(words)
    assert torch.equal(table[ids], vectors)
    np.testing.assert_array_equal(draw(learner, prompt="a cat"), plain)
    found = draw(learner, prompt=f"a {token}")
    seen = learner.tokenizer(learner._expand(f"a {token}"), add_special_tokens=False).input_ids
    assert seen[1:] == ids
    assert not near(found, plain)


@pytest.mark.parametrize("count", [1, 2])
def test_a_word_of_letters_is_found_only_where_it_stands_alone(tmp_path, learner, count):
    save_file({"emb_params": torch.ones(count, 16)}, tmp_path / "Cat.safetensors")
    assert learner.load_embedding(tmp_path / "Cat.safetensors") == "Cat"
    first = learner.tokenizer.convert_tokens_to_ids("Cat")

    def ids(text):
        return learner.tokenizer(learner._expand(text), add_special_tokens=False).input_ids

    for text in ("concatenate", "cats", "cat_7", "bobcat"):
        assert max(ids(text)) < first
        assert "embeddings" not in learner.generate(text, num_inference_steps=1).settings
    for text in ("cat", "(cat:1.2)", "CAT,"):
        assert [i for i in ids(text) if i >= first] == list(range(first, first + count))
        assert "Cat: " in learner.generate(text, num_inference_steps=1).settings["embeddings"]


@pytest.mark.parametrize(("long", "short"), [("bad_v2-neg", "bad_v2"), ("<v1>", "v1")])
def test_a_word_inside_of_another_is_left_alone(tmp_path, learner, long, short):
    save_file({long: torch.randn(2, 16)}, tmp_path / "long.safetensors")
    learner.load_embedding(tmp_path / "long.safetensors")
    call = {"prompt": f"a {long} (cat:1.2)", "num_inference_steps": 1}
    plain = draw(learner, **call)
    save_file({short: torch.randn(3, 16)}, tmp_path / "short.safetensors")
    learner.load_embedding(tmp_path / "short.safetensors")
    assert learner._expand(call["prompt"]) == f"a {long} {long}_1 (cat:1.2)"
    assert learner._expand(f"{short} {long}") == f"{short} {short}_1 {short}_2 {long} {long}_1"
    np.testing.assert_array_equal(draw(learner, **call), plain)
    result = learner.generate(**call)
    assert result.settings["embeddings"].startswith(f"{long}: ")
    assert f"{short}: " not in result.settings["embeddings"]


@pytest.mark.parametrize("token", ["<floral-style>", "<explorations>", "<lora-girl>", "lora_girl"])
def test_a_word_may_have_lora_in_it(tmp_path, learner, token):
    save_file({token: torch.randn(1, 16)}, tmp_path / "x.safetensors")
    assert learner.load_embedding(tmp_path / "x.safetensors") == token


@pytest.mark.parametrize("token", ["[V]", "(x)", "BadDream(v1)"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_brackets_of_a_word_are_no_weights(tmp_path, learner, token, count):
    plain = draw(learner, prompt=f"a {token}")
    save_file({token: torch.randn(count, 16)}, tmp_path / "x.safetensors")
    assert learner.load_embedding(tmp_path / "x.safetensors") == token
    [pieces] = emphasis.read(learner._expand(f"a {token} (here:1.3)"))
    ids = learner.tokenizer(pieces[0][0], add_special_tokens=False).input_ids
    first = learner.tokenizer.convert_tokens_to_ids(token)
    assert [i for i in ids if i >= first] == list(range(first, first + count))
    assert not near(draw(learner, prompt=f"a {token}"), plain)


def test_a_word_with_a_space_is_refused_before_it_is_learnt(learner):
    with pytest.raises(InvalidRequest, match="a word without spaces"):
        add_word(learner.tokenizer, "my cat", 1)


def test_embeddings_are_told_in_the_metadata(tmp_path, learner):
    save_file({"<cat>": torch.ones(1, 16)}, tmp_path / "x.safetensors")
    learner.load_embedding(tmp_path / "x.safetensors")
    plain = learner.generate("a dog", num_inference_steps=1)
    assert "embeddings" not in plain.settings
    result = learner.generate("a <cat>", num_inference_steps=1)
    digits = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()[:12]
    assert result.settings["embeddings"] == f"<cat>: {digits}"
    text = metadata.infotext(result, 0)
    assert metadata.parse_infotext(text).fields["TI hashes"] == f"<cat>: {digits}"
    known = metadata.record(result, 0)
    without = replace(result, settings=plain.settings)
    assert metadata.differences(known, without) == [f"embeddings was <cat>: {digits}, is None"]


def test_an_embedding_that_does_not_fit_changes_nothing(tmp_path, learner):
    before = len(learner.tokenizer)
    rows = learner.text_encoder.get_input_embeddings().weight.shape
    cases = [
        ({"<cat>": torch.ones(1, 17)}, None, "not 16"),
        ({"<cat>": torch.ones(1, 16), "<dog>": torch.ones(1, 16)}, None, "one word"),
        ({"<cat>": torch.full((1, 16), torch.nan)}, None, "not finite"),
        ({"<cat>": torch.ones(1, 2, 16)}, None, "not vectors"),
        ({"a": torch.ones(1, 16)}, None, "has this word already"),
        ({"<cat>": torch.ones(1, 16)}, " ", "without spaces"),
        ({"<cat>": torch.ones(1, 16)}, "my cat", "without spaces"),
        ({"<cat>": torch.ones(1, 16)}, 7, "without spaces"),
        ({"A": torch.ones(1, 16)}, None, "has this word already"),  # as "a" at a word's end
        ({"<cat>": torch.ones(1, 16, dtype=torch.int32)}, None, "int32"),
        ({"<cat>": torch.ones(0, 16)}, None, "not vectors"),
        ({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 20)}, None, "16 and 20 numbers"),
        ({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(2, 20)}, None, "1 and 2 vectors"),
        ({f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)}, None, "use it with --lora"),
    ]
    for tensors, token, told in cases:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InvalidRequest, match=told):
            learner.load_embedding(tmp_path / "x.safetensors", token)
    for nothing in (tmp_path / "nothing.safetensors", None, 3, ""):
        with pytest.raises(InvalidRequest, match=r"no such file|path of a \.safetensors"):
            learner.load_embedding(nothing)
    with pytest.raises(InvalidRequest, match="pickle"):
        learner.load_embedding(tmp_path / "x.pt")
    assert len(learner.tokenizer) == before
    assert learner.text_encoder.get_input_embeddings().weight.shape == rows


# The command line.


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "toy"
    LatentDiffusion(**fakes.parts()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0):
        outcome = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert outcome.exit_code == status, outcome.output
        return outcome

    return run


def test_flags_and_tags_reach_the_drawing_and_replay_finds_them(run, model, home):
    write_lora(random_lora(1), "one.safetensors")
    write_lora(random_lora(2), home / "two.safetensors", "diffusers")
    save_file({"emb_params": torch.ones(2, 16)}, "cat.safetensors")
    run(
        *("generate", "a cat <lora:two:0.3>", "-m", model, "--steps", 2, "-o", "x.png"),
        *("--lora", "one.safetensors:0.1:0.8", "--embedding", "cat.safetensors", "--seed", 1),
    )
    known = metadata.read("x.png").record
    told = [
        (use["name"], use["text_encoder_weight"], use["weight"])
        for use in known["request"]["loras"]
    ]
    assert told == [("one", 0.1, 0.8), ("two", 0.3, 0.3)]
    assert "embeddings" in known["settings"]
    words = ("replay", "x.png", "-m", model)
    assert "--lora FILE" in run(*words, status=2).stderr
    more = ("--lora", "one.safetensors", "--embedding", "cat.safetensors")
    outcome = run(*words, *more)
    assert "largest pixel difference: 0\n" in outcome.stdout
    assert "not reproduced" not in outcome.stdout
    assert "embeddings was" in run(*words, *more[:2], status=1).stdout


def test_replay_refuses_a_lora_that_the_picture_was_not_made_with(run, model):
    write_lora(random_lora(1), "one.safetensors")
    write_lora(random_lora(2), "two.safetensors")
    words = ("generate", "a cat", "-m", model, "--steps", 1, "-o")
    run(*words, "x.png", "--lora", "one.safetensors")
    run(*words, "plain.png")
    refused = run("replay", "plain.png", "-m", model, "--lora", "one.safetensors", status=2)
    assert "was not made with it" in refused.stderr
    both = ("--lora", "one.safetensors", "--lora", "two.safetensors")
    refused = run("replay", "x.png", "-m", model, *both, status=2)
    assert refused.stderr.startswith("error: lora='two.safetensors': the picture was not made")


def test_broken_files_are_refused_before_the_model_is_read(run, model, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    Path("png.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    for flag in ("lora", "embedding", "model"):
        refused = run("generate", "x", f"--{flag}", "png.safetensors", status=2)
        assert refused.stderr.startswith(f"error: {flag}='png.safetensors': damaged or not a")
        assert refused.stderr.count("\n") == 1
    write_lora(random_lora(), "x.safetensors")
    refused = run("generate", "x", "--model", "x.safetensors", status=2)
    assert "model='x.safetensors': this is a LoRA; use it with --lora" in refused.stderr


def test_a_wrong_lora_ends_with_status_2(run, model):
    outcome = run("generate", "x", "-m", model, "--lora", "no.safetensors", status=2)
    assert outcome.stderr.strip().split("\n") == ["error: lora='no.safetensors': no such file"]


@pytest.mark.parametrize("source", lora.LAYOUTS)
@pytest.mark.parametrize("to", lora.LAYOUTS)
def test_convert_proves_that_nothing_changed(run, source, to):
    one = random_lora(ranks=(4, 2), alphas=(1.0, 3.0))
    one = replace(one, metadata={"modelspec.title": "ink", "ss_seed": "3"})
    write_lora(one, "in.safetensors", source)
    outcome = run("lora", "convert", "in.safetensors", "--to", to, "-o", "out.safetensors")
    assert "differs by 0 at most" in outcome.stdout
    again = read_lora("out.safetensors")
    assert again.layout == to
    assert again.metadata["ss_seed"] == "3"
    assert largest_difference(one, again) == 0


def test_convert_tells_what_rounding_did(run):
    one = random_lora()
    write_lora(one, "in.safetensors")
    arguments = ("lora", "convert", "in.safetensors", "--to", "kohya")
    run(*arguments, "--dtype", "float16", "-o", "half.safetensors")
    half = read_lora("half.safetensors")
    largest = largest_difference(one, half)
    assert 0 < largest < 0.05
    assert half.layers[QUERY].down.dtype == torch.float16
    assert "choose another name" in run(*arguments, "-o", "in.safetensors", status=2).stderr
    wrong = run(*arguments[:-1], "a1111", "-o", "y.safetensors", status=2).stderr
    assert wrong.startswith("error: to='a1111': one of kohya")
    assert wrong.count("\n") == 1
    wrong = run(*arguments, "-o", "y.bin", status=2).stderr
    assert wrong.startswith("error: output='y.bin': the name must end in .safetensors")


def test_convert_writes_nothing_over_another_kind_and_names_the_output(run, tmp_path):
    write_lora(random_lora(), "in.safetensors")
    Path("folder.safetensors").mkdir()
    Path("file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for to, output, told in [
        ("kohya", "no/such/x.safetensors", "No such file or directory"),
        ("kohya", "folder.safetensors", "it is a folder"),
        ("peft", "file", "is a file; name a folder"),
        ("peft", "file/x", "is a file; name a folder"),
    ]:
        refused = run("lora", "convert", "in.safetensors", "--to", to, "-o", output, status=2)
        assert refused.stderr.startswith(f"error: output='{output}': cannot be written (")
        assert told in refused.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("file").read_text() == "mine"


def test_inspect_says_what_is_in_a_file(run):
    told = lora_metadata(
        title="ink",
        base_model="toy",
        rank=4,
        alpha=2.0,
        prediction_type="epsilon",
        resolution=(64, 32),
        trigger_phrase="in ink",
    )
    one = replace(random_lora(ranks=(4, 2), parts=("unet",)), metadata=told)
    write_lora(one, "x.safetensors")
    shown = run("lora", "inspect", "x.safetensors").stdout
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines() if line[:6] != "text e")
    assert lines["layout"] == "kohya"
    assert f"{len(one.unet)} layers, rank 2 to 4, alpha 2," in lines["U-Net"]
    assert lines["trigger"] == "phrase  in ink"
    assert lines["base"] == "model      toy"
    assert "sshs_model_hash" not in shown
    assert "sshs_model_hash = " in run("lora", "inspect", "x.safetensors", "--metadata").stdout
    assert "no such file" in run("lora", "inspect", "y.safetensors", status=2).stderr


def test_the_commands_about_loras_answer_without_torch():
    code = (
        "import sys; from latentgen import cli\n"
        "sys.argv = ['latentgen', 'lora', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "import latentgen.request\n"
        "heavy = {'torch', 'diffusers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
