"""SDXL: two text encoders, sizes, and no text that is zeros; its folders, files and LoRAs."""

import copy
import json

import fakes
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import save_single_file, unet_name

from latentgen import InvalidRequest, LatentDiffusion
from latentgen.lora import Layer, Lora, largest_difference, read_lora, write_lora
from latentgen.lorakeys import place
from latentgen.modelfolder import find
from latentgen.request import Request, together

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3, "output_type": "np"}
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def pipe():
    return fakes.drawer("xl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "xl"
    fakes.drawer("xl").save_pretrained(path)
    return path


def drawn_by(stock: StableDiffusionXLPipeline) -> np.ndarray:
    """What diffusers makes of `CALL`."""
    stock.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(CALL["seed"])]
    options = {"num_inference_steps": CALL["num_inference_steps"], "output_type": "np"}
    return stock(CALL["prompt"], generator=generator, **options).images


def test_a_folder_tells_what_it_is_and_draws_the_same(pipe, folder):
    found = find(folder)
    assert (found.is_xl, found.guidance_scale, found.width) == (True, 5.0, 32)
    assert len(found.hashes()) == 4
    loaded = LatentDiffusion.from_pretrained(folder, "cpu")
    assert loaded.model == found
    assert loaded.config.force_zeros_for_empty_prompt is True
    np.testing.assert_array_equal(loaded.generate(**CALL).images, pipe.generate(**CALL).images)


@pytest.mark.usefixtures("stock_convolutions")
def test_stock_diffusers_opens_the_folder_and_draws_the_same(pipe, folder):
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    expected = drawn_by(stock)
    np.testing.assert_array_equal(pipe.generate(**CALL).images, expected)


def test_folders_of_other_models_say_nothing_of_a_second_encoder(tmp_path):
    fakes.drawer().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not {"text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"} & index.keys()


def test_a_single_file_draws_the_same_picture(pipe, folder, tmp_path):
    save_single_file(pipe, tmp_path / "one.safetensors")
    loaded = LatentDiffusion.from_single_file(tmp_path / "one.safetensors", "cpu", config=folder)
    assert (loaded.model.is_xl, loaded.model.guidance_scale) == (True, 5.0)
    found = find(tmp_path / "one.safetensors")  # from its header, as a server asks before it loads
    assert (found.is_xl, found.sees_mask, found.guidance_scale) == (True, False, 5.0)
    assert (found.width, found.height) == (1024, 1024)
    save_single_file(fakes.drawer("xl-9-channel"), tmp_path / "nine.safetensors")
    assert find(tmp_path / "nine.safetensors").sees_mask
    np.testing.assert_array_equal(loaded.generate(**CALL).images, pipe.generate(**CALL).images)


def test_a_refiner_is_refused(tmp_path):
    names = ["conditioner.embedders.0.model.text_projection", "model.diffusion_model.out.0.bias"]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match="a refiner of SDXL; give the base model"):
        find(tmp_path / "x.safetensors")


def test_no_negative_prompt_is_zeros_also_beside_one_that_has_some(pipe, tmp_path):
    """As the model was trained: what `""` encodes to is something else."""
    plain = pipe.generate(**CALL).images
    np.testing.assert_array_equal(pipe.generate(**CALL, negative_prompt="").images, plain)
    encoded = LatentDiffusion(**fakes.parts("xl"), force_zeros_for_empty_prompt=False)
    assert not np.array_equal(encoded.generate(**CALL).images, plain)
    encoded.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path, "cpu")
    assert again.config.force_zeros_for_empty_prompt is False

    asked = [Request(**CALL | more) for more in ({}, {"negative_prompt": "dark", "seed": 9})]
    both = together([pipe.resolve(request) for request in asked])
    *_, last = pipe.draw(both)
    np.testing.assert_allclose(last.result.images[0], plain[0], atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_long_prompt_changes_no_other_picture(pipe, num_images):
    """Its words, its pooled vector and its sizes go with its own rows."""
    prompts, negatives = ["a cat", "a red apple " * 20, "a dog"], ["", "blue", "a sad face " * 30]
    options = {**CALL, "num_images": num_images}
    options.pop("prompt")
    batch = pipe.generate(prompts, negatives, **options).images
    for k, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        seed = CALL["seed"] + k * num_images
        alone = pipe.generate(prompt, negative, **options | {"seed": seed}).images
        own = batch[k * num_images : (k + 1) * num_images]
        np.testing.assert_allclose(own, alone, atol=1e-5)


def test_half_precision_spares_the_autoencoder(folder):
    for overflows, dtype in ((False, torch.float16), (True, torch.float32)):
        config = folder / "vae" / "config.json"
        text = json.dumps(json.loads(config.read_text()) | {"force_upcast": overflows})
        config.write_text(text)
        pipe = LatentDiffusion.from_pretrained(folder, "cpu", "float16")
        assert (pipe.vae.dtype, pipe.unet.dtype) == (dtype, torch.float16)
    assert pipe.generate(**CALL | {"num_inference_steps": 1}).images.shape == (1, 32, 32, 3)


def test_a_controlnet_is_told_the_sizes_too(pipe, tmp_path):
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(tmp_path)
    led = pipe.generate(**CALL, controlnet=tmp_path, control_image=Image.new("RGB", (32, 32)))
    assert not np.array_equal(led.images, pipe.generate(**CALL).images)
    with pytest.raises(InvalidRequest, match="made for another model: its cross_attention_dim"):
        pipe.generate(**CALL, controlnet=fakes.controlnet(), control_image=Image.new("RGB", (8, 8)))


# LoRAs and textual inversions.


def random_lora(pipe) -> Lora:
    torch.manual_seed(5)
    layers = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        layers[part] = {
            path.removeprefix("text_model."): Layer(
                torch.randn(2, module.in_features), torch.randn(module.out_features, 2), 1.0
            )
            for path, module in getattr(pipe, part).named_modules()
            if isinstance(module, torch.nn.Linear) and path.endswith(("to_q", "q_proj"))
        }
    return Lora(**layers)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_a_lora_of_both_encoders_survives_its_file(pipe, tmp_path, layout):
    one = random_lora(pipe)
    assert one.text_encoder.keys() == one.text_encoder_2.keys()
    file = write_lora(one, tmp_path / "x.safetensors", layout)
    assert largest_difference(one, read_lora(file)) < 1e-6
    if layout == "kohya":
        names = load_file(file).keys()
        assert f"lora_te2_text_model_{TEXT.replace('.', '_')}.alpha" in names
        assert any(name.startswith("lora_te1_text_model_") for name in names)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_each_part_of_a_lora_is_the_changed_weight(pipe, tmp_path, part):
    whole = random_lora(pipe)
    one = Lora(**{"unet": {}, "text_encoder": {}, part: getattr(whole, part)})
    file = write_lora(one, tmp_path / "x.safetensors")
    found = pipe.generate(**CALL, loras=[(file, 0.5)]).images
    assert not np.array_equal(found, pipe.generate(**CALL).images)
    merged = LatentDiffusion(**copy.deepcopy(fakes.parts("xl")))
    modules = dict(getattr(merged, part).named_modules())
    for path, layer in getattr(one, part).items():
        module = modules.get(path) or modules["text_model." + path]
        module.weight.data += 0.5 * layer.change(torch.float32)
    np.testing.assert_allclose(found, merged.generate(**CALL).images, atol=1e-4)


def test_diffusers_draws_the_same_with_the_lora(pipe, tmp_path):
    file = write_lora(random_lora(pipe), tmp_path / "x.safetensors", "diffusers")
    stock = StableDiffusionXLPipeline(**copy.deepcopy(fakes.parts("xl")), add_watermarker=False)
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = drawn_by(stock)
    found = pipe.generate(**CALL, loras=[file]).images
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kohyas", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        (
            "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
        ),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_0_0_skip_connection", "up_blocks.0.resnets.0.conv_shortcut"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_1_transformer_blocks_0_ff_net_0_proj",
         "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("out_2", "conv_out"),
        ("down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
    ],
)  # fmt: skip
def test_kohyas_names_of_the_original_unet_are_understood(kohyas, path):
    assert place(f"lora_unet_{kohyas}.lora_up.weight") == ("unet", path, "up")


def test_every_module_of_sdxls_unet_is_found_by_its_original_name():
    """The whole layout of SDXL, at toy widths."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
        )
    kinds = torch.nn.Linear | torch.nn.Conv2d
    paths = [path for path, module in unet.named_modules() if isinstance(module, kinds)]
    assert len(paths) > 200
    for path in paths:
        name = unet_name(path + ".weight", unet.config).removesuffix(".weight")
        flat = "lora_unet_" + name.replace(".", "_")
        assert place(f"{flat}.lora_up.weight") == ("unet", path, "up")


def test_a_lora_of_sdxl_is_known_by_the_width_of_its_words(tmp_path):
    """So that its first text encoder is called `te1`, and programs list it for such models."""
    words = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    reads = Layer(torch.ones(2, 2048), torch.ones(640, 2), 1.0)
    own = Layer(torch.ones(2, 768), torch.ones(768, 2), 1.0)
    file = write_lora(Lora({words: reads}, {TEXT: own}), tmp_path / "x.safetensors")
    assert f"lora_te1_text_model_{TEXT.replace('.', '_')}.alpha" in load_file(file)
    assert read_lora(file).metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    narrow = Layer(torch.ones(2, 768), torch.ones(320, 2), 1.0)
    file = write_lora(Lora({words: narrow}, {TEXT: own}), tmp_path / "y.safetensors")
    assert f"lora_te_text_model_{TEXT.replace('.', '_')}.alpha" in load_file(file)
    assert read_lora(file).metadata["ss_base_model_version"] == "sd_v1"


def test_a_lora_of_sdxl_on_another_model_is_told(pipe, tmp_path):
    file = write_lora(random_lora(pipe), tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match="made for another model"):
        fakes.drawer().generate(**CALL, loras=[file])
    only = Lora({}, {}, text_encoder_2=random_lora(pipe).text_encoder_2)
    with pytest.raises(InvalidRequest, match="the model has no text_encoder_2"):
        fakes.drawer().generate(**CALL, loras=[write_lora(only, tmp_path / "y.safetensors")])


def test_a_textual_inversion_teaches_both_encoders(tmp_path):
    torch.manual_seed(0)
    vectors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 12)}
    save_file(vectors, tmp_path / "nib.safetensors")
    pipe = LatentDiffusion(**copy.deepcopy(fakes.parts("xl")))
    plain = pipe.generate(**CALL | {"prompt": "a nib"}).images
    pipe.text_encoder_2.text_model.eos_token_id = 2  # as SDXL's own configuration says
    assert pipe.load_embedding(tmp_path / "nib.safetensors") == "nib"
    for tokenizer, model, name in zip(
        (pipe.tokenizer, pipe.tokenizer_2),
        (pipe.text_encoder, pipe.text_encoder_2),
        vectors,
        strict=True,
    ):
        ids = tokenizer("nib nib_1", add_special_tokens=False).input_ids
        table = model.get_input_embeddings().weight
        assert torch.equal(table[ids], vectors[name])
    assert not np.array_equal(pipe.generate(**CALL | {"prompt": "a nib"}).images, plain)
    assert pipe.text_encoder_2.text_model.eos_token_id == pipe.tokenizer_2.eos_token_id
    pipe.save_pretrained(tmp_path / "taught")
    again = LatentDiffusion.from_pretrained(tmp_path / "taught", "cpu")
    np.testing.assert_array_equal(
        again.generate(**CALL | {"prompt": "a nib"}).images,
        pipe.generate(**CALL | {"prompt": "a nib"}).images,
    )

    pipe.tokenizer_2.add_tokens(["<y>"])
    vectors = {name: rows[:1] for name, rows in vectors.items()}
    save_file(vectors, tmp_path / "y.safetensors")
    with pytest.raises(InvalidRequest, match="has this word already"):
        pipe.load_embedding(tmp_path / "y.safetensors", "<y>")
    assert "<y>" not in pipe.tokenizer.get_vocab()  # both learn it, or none

    save_file({"<x>": torch.ones(1, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidRequest, match="vectors of 16 numbers, not 16 and 12"):
        pipe.load_embedding(tmp_path / "x.safetensors")
