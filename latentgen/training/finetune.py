"""Fine-tuning a model that exists: what LoRA, DreamBooth and textual inversion share.

A script says which numbers learn (`adapt`) and what file they become (`export`); this module reads
and checks the data, says what will happen, caches latents and token states, and trains. The
objective is in `objective.py`, the loop in `loop.py`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentgen.errors import DecodeError, TrainingError
from latentgen.images import contact_sheet
from latentgen.modelfolder import Model, read_json
from latentgen.pipeline import LatentDiffusion, quietly
from latentgen.training.buckets import Size
from latentgen.training.config import say, to_repeat, versions
from latentgen.training.data import Batch, cached, pixel_batches, step_generator
from latentgen.training.encoders import Captions, Encoders
from latentgen.training.lesson import (
    FineTuneConfig,
    Lesson,
    Prior,
    find_model,
    fitted_mask,
    read_pictures,
    rows_by_bucket,
)
from latentgen.training.objective import diffusion_loss, noisy_latents, prediction_target
from latentgen.training.pictures import Picture, read_folder
from latentgen.training.preflight import (
    bytes_each,
    duration,
    encoding_flops,
    expected_speed,
    forecast,
    memory_in_use,
)
from latentgen.training.run import check_start, device_of_run, precision, run, start

MEASURED = 16  # pictures that the fixed-noise loss looks at, each at FRACTIONS of the schedule
FRACTIONS = (0.1, 0.35, 0.6, 0.85)
ENCODED = 512 * 512  # pixels that the autoencoder sees at once


@dataclass(frozen=True)
class Method:
    """What is learnt.

    Attributes:
        adapt: (unet, text_encoder, tokenizer): put in the weights that learn; all others are
            frozen already. It is called once on a model without memory, to count.
        export: (model, lesson, folder, manifest): write what was learnt, ready for use.
        rate_of: the share of the learning rate that the weight of a name gets.
        whole: the U-Net's own weights learn, so they must be loaded in full precision.
    """

    adapt: Callable[[nn.Module, nn.Module, CLIPTokenizer], None]
    export: Callable[[LatentDiffusion, Lesson, Path, dict[str, Any]], None]
    rate_of: Callable[[str], float] = lambda name: 1.0
    whole: bool = False


class Denoiser(nn.Module):
    """What is trained: the U-Net and, where it learns too, the text encoder before it."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder if _learns(text_encoder) else None

    def forward(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """`noisy` (B, C, h, w); `words` (B, 77) token ids if the text encoder learns, else
        (B, 77, D) token states. Returns the prediction, (B, C, h, w)."""
        states = words if self.text_encoder is None else self.text_encoder(words)[0]
        return self.unet(noisy, timesteps, states).sample


def fine_tune(
    config: FineTuneConfig,
    method: Method,
    prepare: Callable[[Picture], Picture] = lambda picture: picture,
    prior: Prior | None = None,
) -> None:
    """Check, tell, train, export.

    Args:
        prepare: gives a picture the captions that it is trained with; those of the class have
            theirs.
        prior: pictures of the class to train on as well; those that are missing are drawn.

    Raises:
        DataError, InvalidRequest: before any weights are read.
        TrainingError: later.
    """
    found = find_model(config)
    check_start(config)
    if config.enable_xformers_memory_efficient_attention:
        _check_xformers()
    tokenizer = load_tokenizer(found)
    empty, others, encoding = _without_memory(config, method, found, tokenizer)
    pictures = [one if one.is_reg else prepare(one) for one in read_pictures(config)]
    unseen = None
    if config.validation_data_dir is not None:
        unseen = [prepare(picture) for picture in read_folder(config.validation_data_dir)]
    lesson = Lesson(config, found, tokenizer, pictures, unseen)
    if prior is None:
        _expect("the pictures", config.expect_data, lesson.fingerprint)
    elif drawn := prior.pictures():
        lesson.add_class(drawn)
    count_steps(config, lesson)
    say(lesson.describe())
    say(_cost(config, empty, others, encoding, lesson, found, prior))
    if config.dry_run:
        return

    accelerator = start(config)
    _expect("the processes", config.expect_processes, accelerator.num_processes)
    pipe = _load(config, found, accelerator, method)
    _expect("the model", config.expect_model or None, found.hashes())
    if prior is not None:
        prior.check_model(found.hashes())
        missing = prior.missing()
        accelerator.wait_for_everyone()  # each process has looked before any draws
        if missing and accelerator.is_main_process:
            prior.write_note(found.hashes())
        accelerator.wait_for_everyone()
        draw_class(pipe, prior, missing[accelerator.process_index :: accelerator.num_processes])
        accelerator.wait_for_everyone()
        if missing:
            lesson = Lesson(config, found, tokenizer, pictures, unseen)
            lesson.add_class(prior.pictures())
        _expect("the pictures", config.expect_data, lesson.fingerprint)
    denoiser = _adapted(method, pipe.unet, pipe.text_encoder, pipe.tokenizer)
    if config.gradient_checkpointing and denoiser.text_encoder is not None:
        pipe.text_encoder.gradient_checkpointing_enable()
    task = Task(config, pipe, denoiser, lesson, accelerator)
    manifest = {
        "config": to_repeat(config),
        "data": lesson.fingerprint,
        "model": found.hashes(),
        "processes": accelerator.num_processes,
        "versions": versions(),
    }

    def export(folder: Path, step: int) -> None:
        method.export(pipe, lesson, folder, manifest | {"step": step})

    run(
        denoiser,
        task.loss,
        config,
        accelerator,
        lesson.instances,
        " ".join([lesson.fingerprint, *found.hashes(), *task.encoders.keys]),
        task.validate,
        groups=lesson.groups(),
        classes=lesson.classes,
        class_groups=lesson.class_groups(),
        rate_of=method.rate_of,
        export=export,
    )
    if accelerator.is_main_process:
        export(config.output_dir, config.max_train_steps)


def count_steps(config: FineTuneConfig, lesson: Lesson) -> None:
    """Turn epochs, if they were asked for, into steps."""
    if config.num_train_epochs is not None:
        shown = config.num_train_epochs * lesson.epoch()
        config.max_train_steps = -(-shown // _pictures_a_step(config))
        config.num_train_epochs = None


def draw_class(pipe: LatentDiffusion, prior: Prior, files: list[Path]) -> None:
    """Draw pictures of the class. Picture i is drawn from seed i, so that a run which was stopped
    goes on with the same ones, by however many processes."""
    for file in files:
        partial = file.with_suffix(".partial")
        pipe.generate(prior.prompt, seed=int(file.stem)).image.save(partial, "PNG")
        partial.replace(file)


@dataclass(frozen=True)
class Example:
    """Pictures of one size: what the denoiser sees, what it should predict at these noise levels
    (B,), and how much each place counts."""

    inputs: tuple[Tensor, Tensor, Tensor]
    target: Tensor
    alphas: Tensor
    mask: Tensor | None


class Task:
    """The loss and the measurement of a run, on cached latents and token states."""

    def __init__(
        self,
        config: FineTuneConfig,
        pipe: LatentDiffusion,
        denoiser: Denoiser,
        lesson: Lesson,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.pipe, self.lesson, self.accelerator = config, pipe, lesson, accelerator
        self.device, self.dtype = accelerator.device, pipe.unet.dtype
        self.alphas_cumprod = pipe.scheduler.alphas_cumprod
        self.prediction_type = pipe.scheduler.config.prediction_type
        self.encoders = Encoders(pipe.vae.float(), pipe.text_encoder, pipe.tokenizer)
        self.latents = Latents(lesson, self.encoders, config.output_dir)
        pipe.vae.to(dtype=self.dtype)
        self.words = self._captions(denoiser.text_encoder is not None)
        self._idle = (
            [pipe.vae] if denoiser.text_encoder is not None else [pipe.vae, pipe.text_encoder]
        )
        self._move_idle("cpu")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over instances, and the weighted mean over pictures of the class."""
        x_0, mask = self.latents.draw(batch)
        words = self.words.draw(batch, self.config.proportion_empty_prompts)
        own = self._noised(batch, x_0, words, mask)
        if batch.of_class is None:
            return self._errors(model, own)[0]
        first_class = len(self.lesson.instances) + len(self.lesson.unseen)
        words = self.words.first(first_class + batch.of_class)
        others = self._noised(batch, self.latents.of_class(batch.of_class), words)
        instance, of_class = self._errors(model, own, others)
        return instance + self.config.prior_loss_weight * of_class

    def validate(self, model: nn.Module) -> tuple[dict[str, float], Image.Image | None]:
        """The loss at fixed noise and timesteps, and pictures of the same prompts and seeds."""
        generator = step_generator(0, 0)
        total, pictures = 0.0, 0
        for rows, x_0 in self.latents.measured:
            words = self.words.first(rows)
            for fraction in FRACTIONS:
                timesteps = torch.full((len(rows),), int(fraction * len(self.alphas_cumprod)))
                noise = torch.randn(x_0.shape, generator=generator)
                example = self._example(x_0, noise, timesteps, words)
                with self.accelerator.autocast():
                    (error,) = self._errors(model, example)
                total += error.item() * len(rows)
            pictures += len(rows)
        name = "held_out_loss" if self.lesson.unseen else "fixed_noise_loss"
        return {name: total / (pictures * len(FRACTIONS))}, self._samples()

    def _samples(self) -> Image.Image | None:
        prompts = self.config.validation_prompts
        if not prompts:
            return None
        self._move_idle(self.device)
        try:
            images = self.pipe.generate(prompts, seed=0).images
        except DecodeError as error:  # perhaps the pictures to learn are black
            say(f"no sample pictures: {error}")
            return None
        finally:
            self._move_idle("cpu")
        return contact_sheet(images)

    def _move_idle(self, device: torch.device | str) -> None:
        """Bring what only samples need to the device, or out of its memory."""
        for model in self._idle:
            model.to(device)

    def _noised(
        self, batch: Batch, x_0: Tensor, words: Tensor, mask: Tensor | None = None
    ) -> Example:
        noise = batch.normal(*x_0.shape[1:])
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * batch.normal(x_0.shape[1], 1, 1)
        return self._example(x_0, noise, batch.timesteps(len(self.alphas_cumprod)), words, mask)

    def _example(
        self,
        x_0: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        words: Tensor,
        mask: Tensor | None = None,
    ) -> Example:
        alphas = self.alphas_cumprod[timesteps].to(self.device)
        x_0, noise = x_0.to(self.device), noise.to(self.device)
        target = prediction_target(x_0, noise, alphas, self.prediction_type)
        noisy = noisy_latents(x_0, noise, alphas).to(self.dtype)
        words = words.to(self.device)
        words = words if words.dtype == torch.long else words.to(self.dtype)
        mask = None if mask is None else mask.to(self.device)
        return Example((noisy, timesteps.to(self.device), words), target, alphas, mask)

    def _errors(self, model: nn.Module, *examples: Example) -> list[Tensor]:
        """The loss of each; where they are of one size, the model sees them at once."""
        inputs = [one.inputs for one in examples]
        if len({noisy.shape for noisy, *_ in inputs}) == 1:
            predictions = model(*map(torch.cat, zip(*inputs, strict=True))).chunk(len(inputs))
        else:
            predictions = [model(*one) for one in inputs]
        arguments = (self.prediction_type, self.config.snr_gamma or None, self.config.loss)
        return [
            diffusion_loss(prediction, one.target, one.alphas, *arguments, mask=one.mask)
            for prediction, one in zip(predictions, examples, strict=True)
        ]

    def _captions(self, text_encoder_learns: bool) -> Captions:
        pictures = [*self.lesson.instances, *self.lesson.unseen, *self.lesson.classes]
        if text_encoder_learns:
            return Captions(pictures, self.encoders.token_ids)
        states = partial(self.encoders.cached_states, output_dir=self.config.output_dir)
        return Captions(pictures, states)


class Latents:
    """All pictures as latents, each in its bucket."""

    def __init__(self, lesson: Lesson, encoders: Encoders, output_dir: Path) -> None:
        self._lesson, self._encoders, self._output_dir = lesson, encoders, output_dir
        self._plain: dict[Size, Tensor] = {}  # (n, C, h, w)
        self._mirrored: dict[Size, Tensor] = {}
        self._masks: dict[Size, Tensor] = {}  # (n, 1, h, w)
        self._classes: dict[Size, Tensor] = {}
        self._place = torch.zeros(len(lesson.instances), dtype=torch.long)  # inside its bucket
        self._class_place = torch.zeros(len(lesson.classes), dtype=torch.long)
        self._flips = torch.tensor([picture.random_flip for picture in lesson.instances])
        for size, rows in rows_by_bucket(lesson.buckets).items():
            pictures = [lesson.instances[row] for row in rows]
            self._place[rows] = torch.arange(len(rows))
            self._plain[size] = self._encode(pictures, size)
            if any(picture.random_flip for picture in pictures):
                self._mirrored[size] = self._encode(pictures, size, mirror=True)
            if any(picture.mask is not None for picture in pictures):
                self._masks[size] = self._read_masks(pictures, size)
        for size, rows in rows_by_bucket(lesson.class_buckets).items():
            self._class_place[rows] = torch.arange(len(rows))
            self._classes[size] = self._encode([lesson.classes[row] for row in rows], size)
        self.measured = self._choose_measured()

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The batch's latents (B, C, h, w), and its masks (B, 1, h, w) if there are any."""
        size = self._lesson.buckets[int(batch.rows[0])]
        place = self._place[batch.rows]
        latents, masks = self._plain[size][place], self._masks.get(size)
        mask = None if masks is None else masks[place]
        mirror = (batch.integers(2) == 1) & self._flips[batch.rows]  # drawn always: one order
        if size in self._mirrored:
            column = mirror.reshape(-1, 1, 1, 1)
            latents = torch.where(column, self._mirrored[size][place], latents)
            mask = None if mask is None else torch.where(column, mask.flip(-1), mask)
        return latents, mask

    def of_class(self, rows: Tensor) -> Tensor:
        """Pictures of the class, all of one bucket: (B, C, h, w)."""
        return self._classes[self._lesson.class_buckets[int(rows[0])]][self._class_place[rows]]

    def _choose_measured(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of captions, and latents: of the pictures held out, or else of those trained on, by
        bucket, MEASURED of them in all."""
        lesson = self._lesson
        if lesson.unseen:
            first, buckets, pictures = len(lesson.instances), lesson.unseen_buckets, lesson.unseen
        else:
            first, buckets, pictures = 0, lesson.buckets, lesson.instances
        chosen = range(0, len(pictures), -(-len(pictures) // MEASURED))
        groups = []
        for size in sorted({buckets[i] for i in chosen}):
            inside = [i for i in chosen if buckets[i] == size]
            latents = self._encode([pictures[i] for i in inside], size)
            groups.append((torch.tensor(inside) + first, latents))
        return groups

    def _encode(self, pictures: list[Picture], size: Size, mirror: bool = False) -> Tensor:
        def make() -> Tensor:
            batches = pixel_batches(pictures, size, count=max(1, ENCODED // (size[0] * size[1])))
            flipped = (pixels.flip(-1) if mirror else pixels for pixels in batches)
            return torch.cat([self._encoders.latents(pixels) for pixels in flipped])

        files = [str(picture.file) for picture in pictures]
        facts = [self._lesson.fingerprint, self._encoders.vae_key, size, mirror, files]
        return cached(self._output_dir, json.dumps(facts), make)

    def _read_masks(self, pictures: list[Picture], size: Size) -> Tensor:
        masks = []
        for picture in pictures:
            image = fitted_mask(picture, size)
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            values = values.reshape(1, *size).float() / 255
            masks.append(F.avg_pool2d(values, size[0] // self._plain[size].shape[-2]))
        return torch.stack(masks)


def _without_memory(
    config: FineTuneConfig, method: Method, found: Model, tokenizer: CLIPTokenizer
) -> tuple[Denoiser, int, float]:
    """The model as it will train, made of nothing but shapes; how many numbers the parts have
    that only encode and decode; and the arithmetic of encoding a picture, for each pixel."""
    vae_config = read_json(_folder(found) / "vae" / "config.json")
    with torch.device("meta"):
        vae = quietly(getattr(diffusers, vae_config["_class_name"]).from_config, vae_config)
        unet = UNet2DConditionModel.from_config(found.unet_config())
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(_folder(found) / "text_encoder"))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        denoiser = _adapted(method, unet, text, tokenizer)
    others = [vae] if denoiser.text_encoder is not None else [vae, text]
    numbers = sum(p.numel() for model in others for p in model.parameters())
    return denoiser, numbers, encoding_flops(vae.encode, found.height) / found.height**2


def _cost(
    config: FineTuneConfig,
    empty: Denoiser,
    others: int,
    encoding: float,
    lesson: Lesson,
    found: Model,
    prior: Prior | None,
) -> str:
    """What the run will take. `others`: numbers of the model beside those in `empty`; `encoding`:
    see `_without_memory`."""
    device, dtype = device_of_run(), _dtype(precision(config))
    missing = [] if prior is None else prior.missing()
    classes = lesson.class_buckets + [lesson.bucket((found.width, found.height))] * len(missing)
    height, width = max(lesson.buckets + classes, key=prod)
    factor = found.vae_scale_factor
    rows = config.train_batch_size * (2 if classes else 1)
    unet = found.unet_config()
    with torch.device("meta"):
        noisy = torch.zeros(rows, unet["in_channels"], height // factor, width // factor)
        states = torch.zeros(rows, lesson.limit + 2, unet["cross_attention_dim"])
        words = states if empty.text_encoder is None else states[..., 0].long()
        told = forecast(empty, (noisy, torch.zeros(rows), words), dtype, bytes_each(config))
    memory = told.memory
    if device.type == "cpu":  # elsewhere, what only encodes leaves the device's memory
        memory += others * dtype.itemsize + memory_in_use()
    steps, batch = config.max_train_steps, _pictures_a_step(config)
    shown = f"{batch} pictures and {batch} of the class" if classes else f"{batch} pictures"
    speed = expected_speed(device, dtype)
    seconds = steps * config.gradient_accumulation_steps * told.flops / speed
    drawn = []
    if prior is not None and missing:
        passes = found.num_inference_steps * (2 if found.guidance_scale > 1 else 1)
        drawing = len(missing) * passes * told.forward_flops / rows / speed / _processes()
        drawn = [
            f"{len(missing)} pictures of {prior.prompt!r} will be drawn first, in about "
            f"{duration(drawing)}"
        ]
    pairs = zip(lesson.instances, lesson.buckets, strict=True)
    mirrored = [size for picture, size in pairs if picture.random_flip]
    encoded = [*lesson.buckets, *mirrored, *lesson.unseen_buckets, *classes]
    before = encoding * sum(map(prod, encoded)) / expected_speed(device, torch.float32)
    return "\n".join(
        [
            *drawn,
            f"{len(encoded)} pictures will be encoded, in about {duration(before)}",
            f"{told.trained:,} of {told.weights:,} weights learn",
            f"{steps} steps of {shown} are {steps * batch / lesson.epoch():.1f} epochs; "
            f"about {duration(seconds)} and {memory / 1e9:.1f} GB on this {device.type}",
        ]
    )


def _pictures_a_step(config: FineTuneConfig) -> int:
    return config.train_batch_size * config.gradient_accumulation_steps * _processes()


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_xformers() -> None:
    if device_of_run().type != "cuda" or find_spec("xformers") is None:
        raise TrainingError(
            "--enable_xformers_memory_efficient_attention needs an NVIDIA GPU and "
            "`pip install 'latentgen[xformers]'`"
        )


def _adapted(
    method: Method, unet: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer
) -> Denoiser:
    """Only what `method` puts in learns, in full precision."""
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    try:
        method.adapt(unet, text_encoder, tokenizer)
    except ValueError as error:  # target modules that are not there
        raise TrainingError(str(error).splitlines()[0]) from error
    denoiser = Denoiser(unet, text_encoder)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return denoiser


def _load(
    config: FineTuneConfig, found: Model, accelerator: Accelerator, method: Method
) -> LatentDiffusion:
    attention = "xformers" if config.enable_xformers_memory_efficient_attention else None
    dtype = torch.float32 if method.whole else _dtype(accelerator.mixed_precision)
    name = found.hub_id if found.hub_id is not None else _folder(found)
    pipe = LatentDiffusion.from_pretrained(
        name, accelerator.device, dtype, attention, config.revision
    )
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe


def _dtype(mixed_precision: str) -> torch.dtype:
    """Of weights that do not learn."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def _folder(found: Model) -> Path:
    assert found.path is not None
    return found.path


def load_tokenizer(found: Model) -> CLIPTokenizer:
    if found.hub_id is not None:
        return CLIPTokenizer.from_pretrained(
            found.hub_id, subfolder="tokenizer", revision=found.revision
        )
    return CLIPTokenizer.from_pretrained(_folder(found) / "tokenizer")


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _expect(what: str, wanted: Any, found: Any) -> None:
    if wanted is not None and wanted != found:
        raise TrainingError(f"{what}: not as in the run to repeat, {found} and not {wanted}")
