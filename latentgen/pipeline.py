"""The way from a request to pictures.

    request -> tokens -> prompt embeddings -> starting latents -> the denoising loop -> decode

`LatentDiffusion` is a diffusers pipeline (VAE, text encoder, U-Net, scheduler), so loading, saving
and offloading are diffusers'. The drawing is ours: text-to-image, image-to-image and inpainting are
one method, `_draw`, and differ only in the data they hand to the loop in `denoise.py`. LoRAs are
applied by `adapters.py`, which leaves the weights alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, Unpack

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.loaders import FromSingleFileMixin
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import (
    adapters,
    controlnet,
    emphasis,
    images,
    latents,
    lorafolder,
    modelfolder,
    schedulers,
)
from .conditioning import MaskBlend, controlled, inpainting_channels, latent_mask
from .denoise import Denoised, accepted, denoise
from .embeddings import add_word, check_word, parts_of_word, read_embedding, said
from .errors import InvalidRequest
from .guidance import guidance_embedding
from .lora import read_lora
from .lorafolder import PARTS, LoraUse
from .modelfolder import DEFAULT_MODEL, Model
from .once import once
from .request import (
    EditOptions,
    InpaintOptions,
    Options,
    Request,
    ResolvedRequest,
    StreamOptions,
)
from .text import by_length, encode_prompts

# Components of a model folder that nothing here runs.
_LEFT_OUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
ATTENTIONS = ("sdpa", "xformers", "sliced")
# One thread loads at a time: meanwhile diffusers and transformers replace functions of torch for
# the whole process. So threads that draw with one pipeline also read each ControlNet once.
_loading = RLock()

__all__ = [
    "ATTENTIONS",
    "LatentDiffusion",
    "Result",
    "Step",
    "choose_place",
    "generate",
    "img2img",
    "inpaint",
]


@dataclass(frozen=True)
class Result:
    """The pictures of one call.

    Attributes:
        images: a list of PIL images, or what `output_type` asked for.
        seeds: the seed of each picture; `num_images=1, seed=seeds[k]` starts from the same noise.
        request: the request with all defaults filled in.
        model: what drew them.
        settings: device, dtype and attention they were drawn with, and the textual inversions that
            the prompts call, with 12 digits of their hashes.
        seconds: how long it took, loading not counted.
    """

    images: Any
    seeds: list[int]
    request: ResolvedRequest
    model: Model
    settings: dict[str, str]
    seconds: float

    @property
    def image(self) -> Any:
        """The first picture."""
        return self.images[0]

    def save(self, path: str | Path, quality: int | None = None) -> list[Path]:
        """Write the pictures with their metadata; several are numbered: apple-1.png, apple-2.png.

        Args:
            path: its ending says the format: .png, .jpg, .jpeg, .webp or .avif.
            quality: 1 to 100, for the formats that lose detail.

        Returns:
            The paths written.
        """
        from .metadata import save_result

        return save_result(self, path, quality)


@dataclass(frozen=True)
class Step:
    """One step of a drawing under way.

    Attributes:
        index: which step this was, from 0.
        total: how many there are; one for each call of the U-Net.
        result: None until the last step, which brings the finished pictures.
    """

    index: int
    total: int
    result: Result | None = None
    _preview: Callable[[int], Image.Image] = field(kw_only=True, repr=False)

    def preview(self, index: int = 0) -> Image.Image:
        """Picture `index` as the model imagines it now, decoded on demand."""
        return self._preview(index)


class LatentDiffusion(DiffusionPipeline, FromSingleFileMixin):
    """A Stable Diffusion model, ready to draw.

    Make one with `from_pretrained` or `from_single_file`, or from components in memory, which may
    be of any size. Drawing leaves no state behind: several threads may draw with it at once, each
    with LoRAs of its own. `load_lora` and `load_embedding` are for before or between drawings.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = [*_LEFT_OUT, "text_encoder_2", "tokenizer_2"]  # noqa: RUF012

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        text_encoder_2=None,
        tokenizer_2=None,
        requires_safety_checker: bool = False,
        force_zeros_for_empty_prompt: bool = True,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            requires_safety_checker=False,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self.attention = "sdpa"
        self.model = self._describe()
        self._loras: dict[str, tuple[LoraUse, adapters.Adapter]] = {}
        self._embeddings: dict[str, str] = {}  # token: SHA-256 of its file
        self._controlnet: tuple[Any, Any] = (None, None)  # the last one, and what it was read from

    # Loading and saving.

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
        revision: str | None = None,
        config: str | Path | None = None,
    ) -> LatentDiffusion:
        """Load a model.

        Args:
            model: a folder in the diffusers layout, a `.safetensors` checkpoint, a name that
                `latentgen models` lists, or a hub id.
            device: "cuda", "mps", "cpu"; None takes the best there is.
            dtype: "float32", "float16", "bfloat16"; None is float16 on CUDA and float32 elsewhere.
            attention: "sdpa" (torch's own; the default), "xformers" or "sliced" (less memory).
            revision: a branch, tag or commit on the hub.
            config: for a checkpoint, as in `from_single_file`.

        Raises:
            InvalidRequest: the model is missing, damaged, of another kind or a pickle, or the
                machine has no such device or attention.
        """
        found = modelfolder.find(model, revision)
        if found.is_single_file:
            assert found.path is not None
            return cls.from_single_file(found.path, device, dtype, attention, config)
        if config is not None:
            raise InvalidRequest("config", str(config), "goes with a .safetensors checkpoint")
        device, dtype = choose_place(device, dtype, attention)
        source = str(found.path) if found.hub_id is None else found.hub_id
        how: dict[str, Any] = {"revision": revision, "dtype": dtype, "use_safetensors": True}
        load = super().from_pretrained
        try:
            encoders = {
                part: quietly(_whole_text_encoder, found, part, source, how)
                for part in ("text_encoder", *["text_encoder_2"] * found.is_xl)
            }
            how |= {**encoders, **_LEFT_OUT}
            pipe = modelfolder.of_variant(
                found.variant,
                found.hub_id,
                lambda variant: quietly(load, source, variant=variant, **how),
            )
            for part in ("vae", "unet"):  # diffusers leaves what it does not find without numbers
                parameters = getattr(pipe, part).named_parameters()
                _refuse_missing(part, [name for name, value in parameters if value.is_meta])
        except (OSError, ValueError, RuntimeError) as error:
            hint = f"its files do not fit together ({_first_line(error)})"
            raise InvalidRequest("model", str(model), hint) from error
        return pipe._settle(found, device, attention)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
        config: str | Path | None = None,
    ) -> LatentDiffusion:
        """Load a checkpoint that holds a whole Stable Diffusion model in one `.safetensors` file.

        Args:
            path: the file; its other arguments are those of `from_pretrained`.
            config: a model folder (or hub id) with the configurations and the tokenizer, which such
                files do not hold; and what it predicts, where the file does not tell. None fetches
                the usual one for its kind from the hub, once.
        """
        found = modelfolder.find(path)
        if not found.is_single_file:
            raise InvalidRequest("model", str(path), "not a file; from_pretrained loads folders")
        device, dtype = choose_place(device, dtype, attention)
        try:
            pipe = quietly(
                super().from_single_file,
                str(found.path),
                dtype=dtype,
                config=None if config is None else str(config),
                **_LEFT_OUT,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            hint = (
                f"cannot be read as a Stable Diffusion checkpoint ({_first_line(error)}); "
                "if this machine is offline, give a model folder of the same kind as --config"
            )
            raise InvalidRequest("model", str(path), hint) from error
        assert found.path is not None
        told = modelfolder.schedule_of(found.path)
        if config is None:  # the hub's is one for many files
            told = {"prediction_type": found.prediction_type, **told}
        knows = told.keys() <= pipe.scheduler.config.keys()  # PNDM knows no zero terminal SNR
        kind = type(pipe.scheduler) if knows else EulerDiscreteScheduler
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **told)
        pipe._settle(None, device, attention, name=found.name, path=found.path)
        if config is None:
            pipe.model = replace(pipe.model, height=found.height, width=found.width)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Save as a folder that every program of the field loads as a Stable Diffusion model."""
        quietly(super().save_pretrained, save_directory, **kwargs)
        file = Path(save_directory) / "model_index.json"
        index = modelfolder.read_json(file)
        kind = f"{'XL' if self._is_xl else ''}{'Inpaint' if self.model.sees_mask else ''}"
        index["_class_name"] = f"StableDiffusion{kind}Pipeline"
        others = ["safety_checker", "requires_safety_checker"]
        if not self._is_xl:
            others = ["text_encoder_2", "tokenizer_2", "force_zeros_for_empty_prompt"]
        index = {name: value for name, value in index.items() if name not in others}
        file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        self.model.write_defaults(Path(save_directory))

    def _settle(self, found: Model | None, device, attention: str | None, **facts):
        overflows = self._is_xl and self.vae.config.get("force_upcast")  # in half precision
        if overflows and self.vae.dtype == torch.float16:
            self.vae.float()
        self.to(device)
        if attention == "xformers":
            self.enable_xformers_memory_efficient_attention()
        elif attention == "sliced":
            self.enable_attention_slicing()
        self.attention = attention or "sdpa"
        self.model = found if found is not None else self._describe(**facts)
        return self

    def _describe(self, name: str = "in memory", path: Path | None = None) -> Model:
        """The facts of a model that did not come from a folder."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample = self.unet.config.sample_size or 64
        rows, columns = sample if isinstance(sample, list | tuple) else (sample, sample)
        facts: dict[str, Any] = {}
        if self._is_xl:
            facts = {"is_xl": True, "guidance_scale": modelfolder.XL_GUIDANCE}
        return Model(
            name,
            path,
            vae_scale_factor=factor,
            height=rows * factor,
            width=columns * factor,
            scheduler_class=type(self.scheduler).__name__,
            prediction_type=self.scheduler.config.get("prediction_type", "epsilon"),
            sees_mask=self.unet.config.in_channels == 9,
            embeds_guidance=self.unet.config.time_cond_proj_dim is not None,
            **facts,
        )

    @property
    def _is_xl(self) -> bool:
        return self.text_encoder_2 is not None

    @property
    def _encoders(self) -> list[tuple[Any, Any]]:
        """The tokenizers with their text encoders."""
        first = (self.tokenizer, self.text_encoder)
        return [first, (self.tokenizer_2, self.text_encoder_2)] if self._is_xl else [first]

    # LoRAs and textual inversions.

    def load_lora(
        self,
        path: str | Path,
        weight: float = 1.0,
        *,
        text_encoder_weight: float | None = None,
        name: str | None = None,
    ) -> str:
        """Load a LoRA for all drawings from now on; several add up.

        Args:
            path: a `.safetensors` file in kohya's or diffusers' layout, a folder of PEFT's, or the
                name of a file in the folder of LoRAs.
            weight: of its U-Net part; a request that names the LoRA may choose others.
            text_encoder_weight: of its text encoder part; None: the same.
            name: what requests call it; None: as the file, see `LoraUse`.

        Returns:
            The name.

        Raises:
            InvalidRequest: it is missing, damaged, made for another model, or the name is taken.
        """
        found = lorafolder.parse([path])
        name = name if name is not None else found.name
        if name in self._loras:
            hint = "already loaded; unload_lora it first, or give another name"
            raise InvalidRequest("name", name, hint)
        (use,) = lorafolder.resolve([found], {}, "path")
        of_text = weight if text_encoder_weight is None else text_encoder_weight
        use = replace(use, name=name).weighing(LoraUse(name, weight, of_text))
        self._loras[name] = (use, self._fit_lora(use))
        return name

    def unload_lora(self, name: str | None = None) -> None:
        """Forget a LoRA, or all of them; drawings under way finish with it."""
        if name is None:
            self._loras.clear()
        elif self._loras.pop(name, None) is None:
            loaded = ", ".join(self._loras) or "none"
            raise InvalidRequest("name", name, f"not loaded; there are: {loaded}")

    def load_embedding(self, path: str | Path, token: str | None = None) -> str:
        """Load a textual inversion: a word for the prompt that stands for vectors of its own.

        Args:
            path: a `.safetensors` file, of diffusers (`{token: vectors}`), the WebUI
                (`emb_params`) or for SDXL (`clip_l` and `clip_g`).
            token: the word; None: the one in the file, or else the file's name without its ending.

        Returns:
            The word.

        Raises:
            InvalidRequest: the file is missing, damaged or for another text encoder, or the word
                is in the tokenizer's vocabulary.
        """
        token, vectors = read_embedding(path, token)
        widths = [model.get_input_embeddings().embedding_dim for _, model in self._encoders]
        told = [own.shape[1] for own in vectors]
        if told != widths:
            numbers = [" and ".join(map(str, each)) for each in (told, widths)]
            hint = f"made for another model: vectors of {numbers[0]} numbers, not {numbers[1]}"
            raise InvalidRequest("path", str(path), hint)
        for tokenizer, _ in self._encoders:
            check_word(tokenizer, token, len(vectors[0]))
        for (tokenizer, text_encoder), own in zip(self._encoders, vectors, strict=True):
            ids = add_word(tokenizer, token, len(own))
            rows = max(text_encoder.get_input_embeddings().num_embeddings, len(tokenizer))
            with _loading:  # it makes a new module
                table = text_encoder.resize_token_embeddings(rows, mean_resizing=False).weight
            table.data[ids] = own.to(table)
            for module in text_encoder.modules():
                if getattr(module, "eos_token_id", None) == 2:  # it pools the largest id, which
                    module.eos_token_id = tokenizer.eos_token_id  # is that of the new word now
                    text_encoder.config.eos_token_id = tokenizer.eos_token_id
        self._embeddings[token] = modelfolder.file_sha256(Path(path).expanduser())
        return token

    def load_lora_weights(self, *args, **kwargs):
        """diffusers' name for `load_lora`: it would leave no trace in a picture's metadata."""
        raise InvalidRequest("load_lora_weights", args, "use load_lora(FILE, WEIGHT)")

    def load_textual_inversion(self, *args, **kwargs):
        """diffusers' name for `load_embedding`, with the same flaw."""
        raise InvalidRequest("load_textual_inversion", args, "use load_embedding(FILE)")

    def _fit_lora(self, use: LoraUse) -> adapters.Adapter:
        assert use.path is not None
        lora = read_lora(use.path)
        models = {part: model for part in PARTS if (model := getattr(self, part)) is not None}
        return adapters.fit(lora, models, self._execution_device, use.path)

    # Drawing.

    def generate(self, prompt, negative_prompt=None, **options: Unpack[Options]) -> Result:
        """Draw pictures from text.

        Args:
            prompt: a text or a list of texts.
            negative_prompt: what to keep away from: one text, or one for each prompt.
            options: the other fields of `latentgen.request.Request`: num_inference_steps,
                guidance_scale, scheduler, seed, num_images, height, width, eta, guidance_rescale,
                output_type, loras; controlnet, with control_image,
                controlnet_conditioning_scale, control_guidance_start and control_guidance_end.

        Raises:
            InvalidRequest: names the field, its value and what would work.
            DecodeError: the model drew black or values that are not finite.
        """
        return _last(self.stream(prompt, negative_prompt, **options))

    def img2img(self, prompt, image, **options: Unpack[EditOptions]) -> Result:
        """Redraw a picture.

        Args:
            prompt: a text or a list of texts.
            image: a PIL image, an array or a path.
            options: as for `generate`, and `strength` from 0 to 1 (default 0.8), which runs the
                last `int(num_inference_steps * strength)` steps.
        """
        return _last(self.stream(prompt, image=_given("image", image), **options))

    def inpaint(self, prompt, image, mask_image, **options: Unpack[InpaintOptions]) -> Result:
        """Repaint the white part of the mask; every other pixel comes back byte for byte.

        Args:
            prompt: a text or a list of texts.
            image: a PIL image, an array or a path.
            mask_image: the same size as `image`; white = repaint.
            options: as for `generate`; `strength` (default 1: the repainted part starts from pure
                noise); `mask_blur`, the width in pixels of a soft edge inside the mask;
                `padding_mask_crop`, to draw only the part around the mask, with that margin.
        """
        pictures = {"image": _given("image", image), "mask_image": _given("mask_image", mask_image)}
        return _last(self.stream(prompt, **pictures, **options))

    def __call__(self, prompt, negative_prompt=None, **options: Unpack[Options]) -> Result:
        """The same as `generate`."""
        return self.generate(prompt, negative_prompt, **options)

    def stream(
        self, prompt, negative_prompt=None, **options: Unpack[StreamOptions]
    ) -> Iterator[Step]:
        """Draw step by step; leave the loop to cancel.

        Args:
            options: the fields of `Request`; `image` makes it img2img, `mask_image` inpainting.

        Returns:
            An iterator of `Step`; the last one's `result` holds the pictures. The request is
            checked before it is returned.
        """
        return self.draw(Request(prompt=prompt, negative_prompt=negative_prompt, **options))

    def resolve(self, request: Request) -> ResolvedRequest:
        """The request as this model would draw it, with its LoRAs; see `Request.resolve`."""
        return request.resolve(self.model, {name: use for name, (use, _) in self._loras.items()})

    def split(self, result: Result, requests: Sequence[ResolvedRequest]) -> list[Result]:
        """Give each request that was drawn together (`latentgen.request.together`) its own
        pictures. `seconds` stays the time of all."""
        parts, first = [], 0
        for request in requests:
            last = first + len(request.seeds)
            settings = {k: v for k, v in result.settings.items() if k != "embeddings"}
            settings |= self.embeddings_in(request)
            parts.append(
                replace(
                    result,
                    images=result.images[first:last],
                    seeds=request.seeds,
                    request=request,
                    settings=settings,
                )
            )
            first = last
        return parts

    def draw(self, request: Request) -> Iterator[Step]:
        """`stream`, for a request that is made already."""
        loaded = dict(self._loras)
        resolved = self.resolve(request)
        if resolved.controlnet is not None:
            controlnet.check_fits(resolved.controlnet, self.unet.config)
        loras = []
        for use in resolved.loras:
            own, adapter = loaded.get(use.name, (None, None))
            if adapter is None or own is None or own.sha256 != use.sha256:
                adapter = self._fit_lora(use)
            loras.append((use, adapter))
        return self._draw(resolved, loras)

    def _draw(
        self, request: ResolvedRequest, loras: list[tuple[LoraUse, adapters.Adapter]]
    ) -> Iterator[Step]:
        started = time.perf_counter()
        # Asked for once: diffusers looks through all modules to tell them.
        like = torch.empty(0, dtype=self.unet.dtype, device=self._execution_device)
        generators = latents.make_generators(request.seeds)
        of_text = adapters.weighted((a.text_encoder, use.text_encoder_weight) for use, a in loras)
        with adapters.applied(of_text):
            rows, guidance_scale, unet_kwargs = self._encode_prompts(request, like)
        scheduler = schedulers.create(request.scheduler, self._scheduler_config())
        timesteps = schedulers.plan(
            scheduler,
            request.scheduler,
            request.num_inference_steps,
            request.strength,
            like.device,
            self._is_xl,
        )
        changes = adapters.weighted((adapter.unet, use.weight) for use, adapter in loras)
        unet, scales = adapters.adapted(once(self.unet), changes), None
        if request.controlnet is not None:
            net = self._load_controlnet(request.controlnet, like)
            unet = controlled(unet, once(net), net.config.in_channels)
            unet_kwargs["controlnet_cond"] = self._control_image(request, len(rows), like)
            scales = controlnet.scales(
                request.controlnet_conditioning_scale,
                request.control_guidance_start,
                request.control_guidance_end,
                len(timesteps),
            )
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1:
            unet = by_length(unet, lengths)
        start, extra_channels, blend = self._start(request, scheduler, timesteps, generators, like)

        for step in denoise(
            unet,
            scheduler,
            timesteps,
            start,
            pad_sequence(rows, batch_first=True),
            guidance_scale=guidance_scale,
            guidance_rescale=request.guidance_rescale,
            extra_channels=extra_channels,
            blend=blend,
            control_scales=scales,
            unet_kwargs=unet_kwargs,
            step_kwargs=accepted(scheduler.step, generator=generators, eta=request.eta),
        ):
            result = None
            if step.index == step.total - 1:
                finished = self._output(request, step.latents)
                seconds = time.perf_counter() - started
                settings = {
                    "device": like.device.type,
                    "dtype": str(like.dtype).removeprefix("torch."),
                    "attention": self.attention,
                    **self.embeddings_in(request),
                }
                result = Result(finished, request.seeds, request, self.model, settings, seconds)
                self.maybe_free_model_hooks()
            yield Step(step.index, step.total, result, _preview=self._previewer(request, step))

    @torch.inference_mode()
    def _encode_prompts(self, request: ResolvedRequest, like: Tensor):
        """B or 2B embeddings (tokens, dim), the scale of guidance or None, U-Net arguments."""
        unet_kwargs: dict[str, Any] = {}
        embedding_size = self.unet.config.time_cond_proj_dim
        guided = request.guidance_scale > 1 and embedding_size is None
        negatives = request.negative_prompt or [""] * len(request.prompt)
        positive, negative = encode_prompts(
            self._encoders,
            [self._expand(text) for text in request.prompt],
            [self._expand(text) for text in negatives if guided],
            like.device,
        )
        if self._is_xl and self.config.force_zeros_for_empty_prompt:
            negative = [
                words if text else words.silenced()
                for text, words in zip(negatives, negative, strict=False)
            ]
        told = [
            words
            for words in [*negative, *positive]  # none of `negative` without guidance
            for _ in range(request.num_images)
        ]
        rows = [words.states.to(like.dtype) for words in told]
        if pooled := [words.pooled for words in told if words.pooled is not None]:
            size = (request.height, request.width)
            sizes = torch.tensor([[*size, 0, 0, *size]])  # original, corner of the crop, target
            unet_kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.stack(pooled).to(like),
                "time_ids": sizes.to(like).repeat(len(told), 1),
            }
        if embedding_size is not None:
            embedding = guidance_embedding(request.guidance_scale, len(rows), embedding_size)
            unet_kwargs["timestep_cond"] = embedding.to(rows[0])
        return rows, request.guidance_scale if guided else None, unet_kwargs

    def _load_controlnet(self, found: controlnet.ControlNet, like: Tensor):
        """The ControlNet, kept until another one is asked for."""
        with _loading:
            last, net = self._controlnet
            if last != (found, found.hash(), like.dtype, like.device):
                self._controlnet = (None, None)  # two need not lie in memory together
                net = quietly(controlnet.load, found, self.unet.config, like.device, like.dtype)
                if self.attention == "xformers":
                    net.enable_xformers_memory_efficient_attention()
                elif self.attention == "sliced":
                    net.set_attention_slice("auto")
                # its hash again: from the hub it is here only now
                self._controlnet = ((found, found.hash(), like.dtype, like.device), net)
        return net

    @staticmethod
    def _control_image(request: ResolvedRequest, rows: int, like: Tensor) -> Tensor:
        """What the ControlNet sees, for each row of the U-Net's batch: (rows, 3, H, W)."""
        box = None if request.padding_mask_crop is None else request.box
        size = (request.width, request.height)
        seen = request.control_image if request.control_image is not None else request.image
        pixels = images.to_unit_tensor(seen.resize(size, Image.Resampling.LANCZOS, box))
        if request.control_image is None:  # the ControlNet is one for inpainting
            mask = images.to_unit_tensor(images.resize_mask(request.mask_image, size, box))
            pixels = pixels.masked_fill(mask > 0.5, -1.0)
        return pixels.to(like).repeat(rows, 1, 1, 1)

    def _expand(self, text: str) -> str:
        """Write textual-inversion tokens of several vectors out, where such are loaded, and keep
        the brackets of those that have some (`[V]`) from being read as weights."""
        added = self.tokenizer.added_tokens_encoder  # they may be another program's
        spelled = {}
        for token in added:
            count = 1
            while f"{token}_{count}" in added:
                count += 1
            spelled[token.lower()] = emphasis.escaped(" ".join(parts_of_word(token, count)))
        return said(*added).sub(lambda found: spelled[found[0].lower()], text)

    def embeddings_in(self, request: ResolvedRequest) -> dict[str, str]:
        """The textual inversions that the prompts call, as the WebUI writes them."""
        words = said(*self.tokenizer.added_tokens_encoder)
        texts = (*request.prompt, *(request.negative_prompt or ()))
        found = {word.lower() for text in texts for word in words.findall(text)}
        called = {
            token: sha256[:12]
            for token, sha256 in self._embeddings.items()
            if token.lower() in found
        }
        if not called:
            return {}
        return {"embeddings": ", ".join(f"{token}: {digits}" for token, digits in called.items())}

    @torch.inference_mode()
    def _start(
        self, request: ResolvedRequest, scheduler, timesteps: Tensor, generators, like: Tensor
    ):
        """Starting latents (B, C, H/8, W/8), extra U-Net channels, the blend after each step.

        Every picture draws from its own generator in the order of diffusers' pipelines: the
        posterior of the picture, the starting noise, the posterior of the masked picture.
        """
        factor = self.model.vae_scale_factor
        shape = (
            self.vae.config.latent_channels,
            request.height // factor,
            request.width // factor,
        )
        if request.mode != "inpaint":
            if request.mode == "txt2img":
                noise = latents.draw_noise(generators, shape, like)
                return noise * scheduler.init_noise_sigma, None, None
            encoded = latents.encode(
                self.vae, images.to_tensor(request.image), generators, like.device
            )
            noise = latents.draw_noise(generators, shape, like)
            return scheduler.add_noise(encoded.to(like), noise, timesteps[:1]), None, None

        size, box = (request.width, request.height), request.box
        picture = images.to_tensor(request.image.resize(size, Image.Resampling.LANCZOS, box))
        pixel_mask = images.to_tensor(images.resize_mask(request.mask_image, size, box))
        mask = latent_mask(pixel_mask, *shape[1:]).to(like)
        original: Tensor | None = None
        if not self.model.sees_mask or request.strength != 1.0:
            original = latents.encode(self.vae, picture, generators, like.device).to(like)
            original = original.contiguous()  # as diffusers' repeat() leaves it: the last bit
        noise = latents.draw_noise(generators, shape, like)
        if request.strength == 1.0:
            start = noise * scheduler.init_noise_sigma
        else:
            start = scheduler.add_noise(original, noise, timesteps[:1])
        if self.model.sees_mask:
            seen = picture * (pixel_mask < 0.5)
            masked = latents.encode(self.vae, seen, generators, like.device).to(like)
            return start, inpainting_channels(mask, masked), None
        if latents.has_posterior(self.vae):
            latents.draw_noise(generators, shape, like)  # diffusers samples the masked picture too
        assert original is not None
        return start, None, MaskBlend(original, noise, mask)

    def _output(self, request: ResolvedRequest, finished: Tensor) -> Any:
        """Decoded pictures in the form that `output_type` asks for."""
        if request.output_type == "latent":
            return finished.clone()  # an ordinary tensor, not one of inference mode
        array = self._laid(request, latents.decode(self.vae, finished))
        match request.output_type:
            case "pil":
                return images.to_pil(array)
            case "np":
                return array
            case _:
                return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))

    def _previewer(self, request: ResolvedRequest, step: Denoised) -> Callable[[int], Image.Image]:
        def preview(index: int) -> Image.Image:
            pixels = latents.decode_unchecked(self.vae, step.estimate()[index : index + 1])
            return images.to_pil(self._laid(request, pixels))[0]

        return preview

    @staticmethod
    def _laid(request: ResolvedRequest, pixels: Tensor) -> np.ndarray:
        """Decoded pictures (B, 3, H, W) as an array (B, H, W, 3); repainted parts lie over the
        picture that they are of."""
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if request.mode != "inpaint":
            return array
        mask, box = request.mask_image, request.box
        return images.composite(request.image, array, mask, request.mask_blur, box)

    def _scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler configuration, with the two repairs that diffusers makes too.

        Old configurations have `steps_offset` 0 and clip the sample; Stable Diffusion was trained
        for neither. Those of SDXL are taken as they are.
        """
        config = {**self.scheduler.config, "_class_name": type(self.scheduler).__name__}
        repairs = {} if self._is_xl else {"steps_offset": 1, "clip_sample": False}
        # diffusers' from_config forgets the entries that this one names.
        defaults = set(config.get("_use_default_values", ())) - repairs.keys()
        config["_use_default_values"] = sorted(defaults)
        return {**config, **{key: value for key, value in repairs.items() if key in config}}


def generate(prompt, negative_prompt=None, **options: Unpack[Options]) -> Result:
    """Draw with the bundled model; the arguments of `LatentDiffusion.generate`."""
    return _draw_bundled(Request(prompt=prompt, negative_prompt=negative_prompt, **options))


def img2img(prompt, image, **options: Unpack[EditOptions]) -> Result:
    """Redraw a picture with the bundled model; the arguments of `LatentDiffusion.img2img`."""
    return _draw_bundled(Request(prompt=prompt, image=_given("image", image), **options))


def inpaint(prompt, image, mask_image, **options: Unpack[InpaintOptions]) -> Result:
    """Repaint with the bundled model; the arguments of `LatentDiffusion.inpaint`."""
    pictures = {"image": _given("image", image), "mask_image": _given("mask_image", mask_image)}
    return _draw_bundled(Request(prompt=prompt, **pictures, **options))


def _draw_bundled(request: Request) -> Result:
    resolved = request.resolve(modelfolder.find(DEFAULT_MODEL))  # refused before weights are read
    return _last(_bundled().draw(resolved))


def _last(steps: Iterator[Step]) -> Result:
    *_, last = steps
    assert last.result is not None
    return last.result


def _bundled() -> LatentDiffusion:
    with _loading:
        return _bundled_once()


@cache
def _bundled_once() -> LatentDiffusion:
    return LatentDiffusion.from_pretrained(DEFAULT_MODEL)


def _given(name: str, picture: Any) -> Any:
    if picture is None:
        raise InvalidRequest(name, None, "give a PIL image, an array or a path")
    return picture


def _whole_text_encoder(found: Model, part: str, source: str | None, how: dict[str, Any]):
    """A text encoder, which transformers would fill up with random numbers where its file lacks
    some."""
    import transformers

    assert found.path is not None
    library, name = modelfolder.read_json(found.path / "model_index.json")[part]
    if library != "transformers":
        raise ValueError(f"its {part} is a {name} of {library}")
    kind = getattr(transformers, name)
    model, facts = modelfolder.of_variant(
        modelfolder.variant_of(found.path / part),
        found.hub_id,
        lambda variant: kind.from_pretrained(
            source, subfolder=part, output_loading_info=True, variant=variant, **how
        ),
    )
    _refuse_missing(part, sorted(facts["missing_keys"]))
    return model.eval()


def _refuse_missing(part: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"the weights of its {part} lack {names[0]}{more}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose_place(
    device: str | torch.device | None, dtype: torch.dtype | str | None, attention: str | None
) -> tuple[torch.device, torch.dtype]:
    """Check what the machine is asked for and fill in the best it has.

    Raises:
        InvalidRequest: there is no such device, data type or attention here.
    """
    if device is None:
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else best
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        names = ", ".join([name for name, is_there in there.items() if is_there] + ["cpu"])
        hint = f"cuda, mps or cpu; this machine has: {names}"
        if there.get(str(device).partition(":")[0]):
            hint = f"it is here and does not work: {_first_line(error)}"
        raise InvalidRequest("device", str(device), hint) from error
    if dtype is None:
        dtype = torch.float16 if picked.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        dtype = {
            "float32": torch.float32,
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
        }.get(dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise InvalidRequest("dtype", dtype, "float32, float16 or bfloat16")
    if attention not in (None, *ATTENTIONS):
        raise InvalidRequest("attention", attention, f"one of {', '.join(ATTENTIONS)}")
    if attention == "xformers" and (picked.type != "cuda" or find_spec("xformers") is None):
        hint = "needs an NVIDIA GPU and `pip install 'latentgen[xformers]'`; sdpa works everywhere"
        raise InvalidRequest("attention", attention, hint)
    return picked, dtype


def quietly(work: Callable, *args, **kwargs):
    """Load or save without the libraries' progress bars and advice: errors still come through."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    with _loading:
        before = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in loggers]
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        try:
            return work(*args, **kwargs)
        finally:
            for logger, level, shows_progress in before:
                logger.set_verbosity(level)
                if shows_progress:
                    logger.enable_progress_bar()
