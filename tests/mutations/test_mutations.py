"""The mistakes we are afraid of, each with the test that notices it.

Every row breaks one line in a copy of the package; the named test must then fail. The default run
only checks that the rows still fit the source. All of them, some minutes:

    pytest -m mutation tests/mutations
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARITY = "parity/test_against_diffusers.py::"
TRAINING = "unit/test_training.py::"
TUNING = "unit/test_finetune.py::"
LORA = "unit/test_lora.py::"


@dataclass(frozen=True)
class Mutation:
    what: str
    module: str
    source: str
    broken: str
    test: str  # the node id, below tests/


TABLE = [
    Mutation("swap the halves of guidance", "denoise", "uncond, cond = prediction.chunk(2)",
             "cond, uncond = prediction.chunk(2)", "unit/test_denoise.py::test_the_body"),
    Mutation("swap negative and positive embeddings", "pipeline",
             "for words in [*negative, *positive]", "for words in [*positive, *negative]",
             PARITY + "test_text_to_image[euler-solo-guided]"),
    Mutation("guidance formula off by one", "guidance",
             "return uncond + guidance_scale * (cond - uncond)",
             "return cond + guidance_scale * (cond - uncond)",
             "unit/test_guidance.py::test_guidance_by_hand"),
    Mutation("guide at scale 1 too", "pipeline", "guided = request.guidance_scale > 1 and",
             "guided = request.guidance_scale >= 1 and",
             "unit/test_guidance.py::test_scale_one_makes"),
    Mutation("rescale over the whole batch", "guidance", "dims = list(range(1, cond.ndim))",
             "dims = list(range(cond.ndim))", "unit/test_guidance.py::test_rescale_treats"),
    Mutation("rescale without phi", "guidance",
             "return guidance_rescale * (guided * factor) + (1 - guidance_rescale) * guided",
             "return guided * factor", "unit/test_guidance.py::test_rescale_by_hand"),
    Mutation("forget to rescale", "denoise", "if guidance_rescale > 0:", "if guidance_rescale > 1:",
             PARITY + "test_zero_terminal_snr"),
    Mutation("forget scaling_factor in encode", "latents",
             "return vae.config.scaling_factor * torch.cat(rows)", "return torch.cat(rows)",
             PARITY + "test_image_to_image[euler-solo]"),
    Mutation("forget scaling_factor in decode", "latents",
             "vae.decode(latents / vae.config.scaling_factor, return_dict=False)",
             "vae.decode(latents, return_dict=False)", PARITY + "test_text_to_image[euler-solo]"),
    Mutation("forget the shift from [-1, 1]", "latents", "(pixels * 0.5 + 0.5).clamp(0, 1)",
             "pixels.clamp(0, 1)", PARITY + "test_text_to_image[euler-solo]"),
    Mutation("take the posterior's mean", "latents",
             "[encoded.latent_dist.sample(generator) for generator in generators]",
             "[encoded.latent_dist.mode() for generator in generators]",
             "unit/test_latents.py::test_encoding_samples"),
    Mutation("one posterior for all pictures", "latents",
             "[encoded.latent_dist.sample(generator) for generator in generators]",
             "[encoded.latent_dist.sample(generators[0])] * len(generators)",
             "property/test_alone_or_together.py::test_so_is_one_drawn_from_a_picture"),
    Mutation("the same seed for all pictures", "request",
             "[self.seed + i for i in range(", "[self.seed for i in range(",
             PARITY + "test_text_to_image[euler-pair]"),
    Mutation("one generator for all pictures", "latents",
             "randn_tensor((len(generators), *shape), generator=generators, dtype=torch.float32)",
             "torch.randn(len(generators), *shape, generator=generators[0])",
             "property/test_alone_or_together.py::test_starting_noise"),
    Mutation("scale the mask channels", "denoise",
             "model_input = rows if extra_channels is None else torch.cat([rows, extra_channels], "
             "dim=1)",
             "model_input = rows if extra_channels is None else torch.cat([rows, "
             "scheduler.scale_model_input(extra_channels, t)], dim=1)",
             "unit/test_denoise.py::test_mask_channels"),
    Mutation("masked picture before the mask", "conditioning",
             "[mask.expand(len(masked_image_latents), -1, -1, -1), masked_image_latents]",
             "[masked_image_latents, mask.expand(len(masked_image_latents), -1, -1, -1)]",
             PARITY + "test_inpainting[euler-9-channel-solo]"),
    Mutation("show the inside of the mask", "pipeline", "picture * (pixel_mask < 0.5)",
             "picture * (pixel_mask >= 0.5)", PARITY + "test_inpainting[euler-9-channel-solo]"),
    Mutation("blend at the time of the step before", "denoise",
             "blend(scheduler, latents, timesteps[i + 1 : i + 2])",
             "blend(scheduler, latents, timesteps[i : i + 1])",
             "unit/test_denoise.py::test_the_body"),
    Mutation("never end on the clean original", "denoise",
             "blend(scheduler, latents, timesteps[i + 1 : i + 2])",
             "blend(scheduler, latents, timesteps[i + 1 :][:1] if i + 1 < len(timesteps) else "
             "timesteps[i : i + 1])",
             PARITY + "test_inpainting[ddim-4-channel-solo]"),
    Mutation("blend with the mask inverted", "conditioning",
             "return (1 - self.mask) * outside + self.mask * latents",
             "return self.mask * outside + (1 - self.mask) * latents",
             "unit/test_denoise.py::test_the_blend"),
    Mutation("no blend", "denoise", "if blend is not None:", "if False:",
             PARITY + "test_inpainting[euler-4-channel-solo]"),
    Mutation("lose thin masks", "conditioning", "if not small.any():", "if False:",
             "unit/test_denoise.py::test_a_mask_too_thin"),
    Mutation("do not draw the masked picture's posterior", "pipeline",
             "if latents.has_posterior(self.vae):\n            latents.draw_noise",
             "if False:\n            latents.draw_noise",
             PARITY + "test_inpainting[euler_a-4-channel-solo]"),
    Mutation("noise before the posterior", "pipeline",
             "encoded = latents.encode(self.vae, images.to_tensor(request.image), generators)\n"
             "            noise = latents.draw_noise(generators, shape, like)",
             "noise = latents.draw_noise(generators, shape, like)\n            encoded = "
             "latents.encode(self.vae, images.to_tensor(request.image), generators)",
             PARITY + "test_image_to_image[euler-solo]"),
    Mutation("forget init_noise_sigma", "pipeline",
             "return noise * scheduler.init_noise_sigma, None, None", "return noise, None, None",
             PARITY + "test_text_to_image[euler-solo]"),
    Mutation("forget init_noise_sigma in inpainting", "pipeline",
             "start = noise * scheduler.init_noise_sigma", "start = noise",
             PARITY + "test_inpainting[euler-9-channel-solo]"),
    Mutation("forget scale_model_input", "denoise", "rows = scheduler.scale_model_input(rows, t)",
             "pass", PARITY + "test_text_to_image[euler-solo]"),
    Mutation("step from the scaled sample", "denoise",
             "scheduler.step(prediction, t, latents, **options)",
             "scheduler.step(prediction, t, rows[: len(latents)], **options)",
             "unit/test_denoise.py::test_the_body"),
    Mutation("drop the generators from step", "pipeline",
             "accepted(scheduler.step, generator=generators, eta=request.eta)",
             "accepted(scheduler.step, eta=request.eta)",
             PARITY + "test_text_to_image[euler_a-solo]"),
    Mutation("drop eta", "pipeline",
             "accepted(scheduler.step, generator=generators, eta=request.eta)",
             "accepted(scheduler.step, generator=generators)", PARITY + "test_eta"),
    Mutation("round strength up in the request", "request",
             "return int(self.num_inference_steps * strength)",
             "return round(self.num_inference_steps * strength)",
             "property/test_strength.py::test_a_strength_that_leaves"),
    Mutation("round strength in the plan", "schedulers",
             "(num_inference_steps - int(num_inference_steps * strength)) * scheduler.order",
             "(num_inference_steps - round(num_inference_steps * strength)) * scheduler.order",
             PARITY + "test_image_to_image[euler-solo]"),
    Mutation("forget the order of the scheduler", "schedulers",
             "int(num_inference_steps * strength)) * scheduler.order",
             "int(num_inference_steps * strength))", PARITY + "test_image_to_image[heun-solo]"),
    Mutation("forget begin_index", "schedulers", "scheduler.set_begin_index(first)", "pass",
             "property/test_strength.py::test_a_second_order"),
    Mutation("noise to the second timestep", "pipeline",
             "return scheduler.add_noise(encoded.to(like), noise, timesteps[:1]), None, None",
             "return scheduler.add_noise(encoded.to(like), noise, timesteps[1:2]), None, None",
             PARITY + "test_image_to_image[ddim-solo]"),
    Mutation("clip the latents", "schedulers", 'config.get("clip_sample", False)', "True",
             PARITY + "test_text_to_image[ddpm-solo]"),
    Mutation("no repair of old configurations", "pipeline",
             '{"steps_offset": 1, "clip_sample": False}', "{}",
             "unit/test_schedulers.py::test_old_configurations"),
    Mutation("lose options that were the old class's defaults", "schedulers",
             "return cls.from_config(config, **{k: v for k, v in options.items() if k in known})",
             "return cls.from_config({**config, **{k: v for k, v in options.items() if k in "
             "known}})",
             "unit/test_schedulers.py::test_a_name_means_the_same"),
    Mutation("share one scheduler", "pipeline",
             "scheduler = schedulers.create(request.scheduler, self._scheduler_config())",
             "scheduler = self.__dict__.setdefault('_s', schedulers.create(request.scheduler, "
             "self._scheduler_config()))",
             "property/test_alone_or_together.py::test_two_streams"),
    Mutation("cut the prompt after 75 tokens", "text",
             "starts = range(0, max(1, len(tokens)), size - 2)", "starts = [0]",
             "property/test_prompts_whole.py"),
    Mutation("chunks of 77 overlap their marks", "text",
             "starts = range(0, max(1, len(tokens)), size - 2)",
             "starts = range(0, max(1, len(tokens)), size - 3)",
             "property/test_prompts_whole.py"),
    Mutation("attend to what fills up a shorter prompt", "pipeline",
             "if len(set(lengths)) > 1:", "if False:",
             "property/test_alone_or_together.py::test_a_long_prompt"),
    Mutation("one length for all prompts of a call", "text",
             "longest = max(map(len, family))",
             "longest = max(len(c) for kinds in read for texts in kinds for c in texts)",
             "unit/test_text.py::test_another_prompt_of_the_call"),
    Mutation("weights are read and forgotten", "text",
             "hidden = _weighted(hidden, weights.to(hidden))\n", "pass\n",
             "unit/test_emphasis.py::test_the_states_of_a_word"),
    Mutation("the mean is restored where there is none", "text",
             "torch.where(tells, mean / mean_after, torch.ones_like(mean))", "mean / mean_after",
             "unit/test_emphasis.py::test_only_a_mean"),
    Mutation("pad with zero", "text", "tokenizer.pad_token_id)", "0)",
             "unit/test_text.py::test_every_chunk"),
    Mutation("pictures before prompts", "pipeline",
             "for words in [*negative, *positive]  # none of `negative` without guidance\n"
             "            for _ in range(request.num_images)",
             "for part in (negative, positive)\n"
             "            for words in part * request.num_images",
             "property/test_alone_or_together.py::test_prompts_come_before"),
    Mutation("no pixels of the original", "pipeline",
             'if request.mode == "inpaint":\n            array', "if False:\n            array",
             "property/test_masks.py::test_the_whole_pipeline"),
    Mutation("composite inverted", "images", "alpha * painted + (1 - alpha) * below",
             "alpha * below + (1 - alpha) * painted",
             "property/test_masks.py::test_a_thousand"),
    Mutation("soft edge leaks outside", "images", "distance_transform_edt(alpha)",
             "distance_transform_edt(alpha + 1)", "property/test_masks.py::test_a_thousand"),
    Mutation("soft edge leaves thin strokes as they were", "images",
             "alpha = (inside / (mask_blur + 1)).clip(0, 1)",
             "alpha = ((inside - 1) / (mask_blur + 1)).clip(0, 1)",
             "property/test_masks.py::test_a_soft_edge_leaves"),
    Mutation("bytes are cut, not rounded", "images", "(pixels * 255).round()", "(pixels * 255)",
             "unit/test_images.py::test_floats_are_rounded"),
    Mutation("no second decoding in float32", "latents",
             "if _drew_nothing(pixels) and vae.dtype != torch.float32:", "if False:",
             "unit/test_latents.py::test_half_precision"),
    Mutation("a black picture is a picture", "latents",
             "brightest * 255 >= 0.5)", "brightest * 255 >= 0)",
             "unit/test_latents.py::test_one_black"),
    Mutation("the VAE of all threads becomes float32", "latents", "copy.deepcopy(vae).float()",
             "vae.float()", "unit/test_latents.py::test_half_precision"),
    Mutation("estimate as epsilon always", "denoise", 'case "v_prediction":', 'case "never":',
             "unit/test_exact_physics.py::test_the_estimate"),
    Mutation("NaN is a number", "request", "if not low <= float(value) <= high:",
             "if float(value) < low or float(value) > high:",
             "unit/test_request.py::test_refused_before"),
    Mutation("transparency on black", "images", 'Image.new("RGBA", image.size, "white")',
             'Image.new("RGBA", image.size, "black")',
             "unit/test_images.py::test_transparency_is"),
    Mutation("a bomb is decoded first", "images", "_check_size(image.size, source, field)", "pass",
             "unit/test_images.py::test_a_bomb"),
    Mutation("min-SNR of epsilon for v", "training/objective",
             '"v_prediction": snr + 1,', '"v_prediction": snr,',
             TRAINING + "test_min_snr_weight_by_hand"),
    Mutation("the rows' mean before their weights", "training/objective",
             "weight.flatten(1).sum(1)  # (B,)", "weight.sum()  # (B,)",
             TRAINING + "test_loss_weighs_each_row"),
    Mutation("the second half of a batch sees the first's noise", "training/data",
             "torch.randn((self._total, *shape), generator=self._generator)[self._places]",
             "torch.randn((self._total, *shape), generator=self._generator)[: len(self.rows)]",
             TRAINING + "test_shares_of_a_batch"),
    Mutation("every epoch in the same order", "training/data",
             "generator=step_generator(seed, epoch, purpose=1)",
             "generator=step_generator(seed, 0, purpose=1)",
             TRAINING + "test_every_epoch_is"),
    Mutation("processes train on the same rows", "training/loop",
             "(micro_batch * accelerator.num_processes + accelerator.process_index) * share",
             "micro_batch * accelerator.num_processes * share",
             TRAINING + "test_two_processes_are"),
    Mutation("NaN trains on", "training/loop", "if not torch.isfinite(shared):", "if False:",
             TRAINING + "test_what_is_not_finite"),
    Mutation("an infinite gradient trains on", "training/loop",
             "accelerator.scaler is None and not torch.isfinite(norm)", "False",
             TRAINING + "test_what_is_not_finite"),
    Mutation("the average is not resumed", "training/checkpoint",
             "state.ema[name].copy_(value)", "pass",
             TRAINING + "test_four_steps_equal"),
    Mutation("the moments are not resumed", "training/checkpoint",
             "state.optimizer.state[parameter][name] = int(value) if whole_number else value",
             "pass",
             TRAINING + "test_four_steps_equal"),
    Mutation("a damaged checkpoint is read", "training/checkpoint",
             "if _sha256(checkpoint / n) != sha", "if False",
             TRAINING + "test_a_missing_or_damaged"),
    Mutation("other settings go on", "training/checkpoint", "    if changed:", "    if False:",
             TRAINING + "test_another_run_cannot"),
    Mutation("the result is not the average", "training/run",
             "put_weights(state, state.ema)", "pass",
             TRAINING + "test_intervals_may_change"),
    Mutation("retrieval among the wrong axis", "evaluate",
             "similarity = seen @ texts.T", "similarity = -seen @ texts.T",
             "unit/test_evaluate.py::test_right_pictures"),
    Mutation("diversity counts a picture against itself", "evaluate",
             "others = ~torch.eye(each, dtype=torch.bool)",
             "others = torch.ones((each, each), dtype=torch.bool)",
             "unit/test_evaluate.py::test_diversity_is"),
    Mutation("a LoRA as strong as its alpha", "lora", "return self.alpha / self.rank",
             "return self.alpha", LORA + "test_pictures_are_those_of_weights"),
    Mutation("no alpha means 1, not the rank", "lora", "return float(rank)", "return 1.0",
             LORA + "test_without_an_alpha"),
    Mutation("one alpha for all layers", "lora", "alpha = own\n", "pass\n",
             LORA + "test_every_layout"),
    Mutation("the square root of rs-LoRA is forgotten", "lora",
             "module.scaling[adapter] * down.shape[0]",
             "module.lora_alpha[adapter]", LORA + "test_what_peft_trains"),
    Mutation("hash the header too", "lora", "data[behind_header:]", "data",
             LORA + "test_the_header_has"),
    Mutation("a flat name cut at every underscore", "lorakeys",
             '*("conv_in", "conv_out", "conv_shortcut", ',
             '*("conv_out", "conv_shortcut", ', LORA + "test_kohyas_flat_names"),
    Mutation("a LoRA stays when the call is over", "adapters", "_applied.reset(token)", "pass",
             LORA + "test_streams_that_alternate"),
    Mutation("all processes draw the same share of the class", "training/finetune",
             "missing[accelerator.process_index :: accelerator.num_processes]",
             "missing[:: accelerator.num_processes]",
             "unit/test_finetune.py::test_two_processes_share"),
    Mutation("a signature worked out in every call", "once",
             'function.__dict__["__signature__"] = inspect.signature(function)', "pass",
             "unit/test_once.py::test_the_signature"),
    Mutation("words read again in every step", "once",
             "known = made[module] = (x, ", "known = (x, ",
             "unit/test_once.py::test_keys_and_values"),
    Mutation("random numbers taken by the trial", "once", "nn.utils.skip_init(nn.Conv2d, ",
             "nn.Conv2d(", "unit/test_once.py::test_operations"),
    Mutation("weights laid out again in every step", "once", "if key not in made", "if True",
             "unit/test_once.py::test_weights_of_convolutions"),
    Mutation("large models laid out as well", "once", "<= MOST_PARAMETERS", "> 0",
             "unit/test_once.py::test_weights_are_not_rearranged"),
    Mutation("the words of other rows", "once", "known is None or known[0] is not x",
             "known is None", "property/test_alone_or_together.py::test_a_long_prompt"),
    Mutation("SDXL's last layer", "text", "told.hidden_states[-2]", "told.hidden_states[-1]",
             PARITY + "test_text_to_image_with_sdxl[ddim-solo-]"),
    Mutation("SDXL's sizes upside down", "pipeline",
             "size = (request.height, request.width)", "size = (request.width, request.height)",
             PARITY + "test_text_to_image_with_sdxl[ddim-solo-]"),
    Mutation("SDXL reads that there is no negative prompt", "pipeline",
             "words if text else words.silenced()", "words",
             PARITY + "test_text_to_image_with_sdxl[ddim-solo-guided-]"),
    Mutation("SDXL's words of other rows", "text",
             "return {name: _of_rows(part, rows) for name, part in value.items()}",
             "return {name: part[: len(rows)] for name, part in value.items()}",
             "unit/test_xl.py::test_a_long_prompt"),
    Mutation("a ControlNet that adds nothing", "conditioning",
             'kwargs["down_block_additional_residuals"] = down', "pass",
             PARITY + "test_text_to_image_with_a_controlnet[ddim-more0-solo]"),
    Mutation("a ControlNet one step too long", "controlnet", "(i + 1) / steps <= end",
             "i / steps <= end", "unit/test_controlnet.py::test_it_works_in_the_steps"),
    Mutation("a ControlNet that sees the mask's channels", "conditioning", "sample[:, :channels]",
             "sample", "unit/test_controlnet.py::test_it_sees_what_the_unet_sees"),
    Mutation("all threads see one LoRA", "adapters",
             'ContextVar("applied", default={})',
             'type("Shared", (), {"now": {}, "get": lambda self: self.now, "set": lambda self, '
             'now: setattr(self, "now", now), "reset": lambda self, _: None})()',
             LORA + "test_threads_with"),
    Mutation("two hooks on a module", "adapters",
             "if _add_changes not in module._forward_hooks.values():", "if True:",
             LORA + "test_without_a_lora_there"),
    Mutation("DoRA stretches the bias", "adapters", "if module.bias is not None:", "if False:",
             LORA + "test_pictures_are_those_of_weights"),
    Mutation("DoRA of columns as of rows", "adapters",
             "rows = changed.transpose(0, 1) if layer.magnitude.ndim == 2 else changed",
             "rows = changed", LORA + "test_dora_of_columns"),
    Mutation("the text encoder's part is left out", "pipeline",
             "with adapters.applied(of_text):", "with adapters.applied({}):",
             LORA + "test_pictures_are_those_of_stock"),
    Mutation("a tag's weights change places", "lorafolder",
             'text_encoder, unet = (weights[0], weights[-1]) if weights else ("1", "1")',
             'unet, text_encoder = (weights[0], weights[-1]) if weights else ("1", "1")',
             LORA + "test_a_tag_says"),
    Mutation("another LoRA is not told", "metadata", "if before.get(use.name) != _told(use):",
             "if False:", LORA + "test_another_or_a_missing"),
    Mutation("masks are ignored", "training/finetune",
             "instance_mask = None if mask is None else mask[own]", "instance_mask = None",
             TUNING + "test_the_loss_of_a_batch"),
    Mutation("the class weighs as much as the subject", "training/finetune",
             "return instance + self.config.prior_loss_weight * of_class",
             "return instance + of_class", TUNING + "test_the_loss_of_a_batch"),
    Mutation("min-SNR does not reach the loss", "training/finetune",
             "self.config.snr_gamma or None, self.config.loss)", "None, self.config.loss)",
             TUNING + "test_the_loss_of_a_batch"),
    Mutation("no noise offset", "training/finetune", "if self.config.noise_offset:", "if False:",
             TUNING + "test_the_loss_of_a_batch"),
    Mutation("a mirrored picture keeps its mask", "training/finetune",
             "torch.where(column, mask.flip(-1), mask)", "mask",
             TUNING + "test_pictures_are_mirrored"),
    Mutation("another model repeats the run", "training/finetune",
             '_expect("the model", config.expect_model or None, found.hashes())', "pass",
             TUNING + "test_the_file_tells"),
    Mutation("the class is drawn again", "training/lesson",
             "missing = [file for file in files if not file.exists()]", "missing = files",
             TUNING + "test_dreambooth_draws"),
    Mutation("a word learns at the LoRA's rate", "training/methods",
             "return Method(adapt, export, lambda name: rate / config.learning_rate)",
             "return Method(adapt, export)", TUNING + "test_pivotal"),
    Mutation("the text encoder learns at the U-Net's rate", "training/methods",
             'return share if name.startswith("text_encoder.") else 1.0', "return 1.0",
             TUNING + "test_settings_reach"),
    Mutation("the text encoder's half is not in the file", "training/methods",
             "collect_lora(pipe.unet, pipe.text_encoder if config.train_text_encoder else None)",
             "collect_lora(pipe.unet, None)", TUNING + "test_a_lora_learns"),
    Mutation("rank-stabilised is forgotten", "training/methods",
             "use_rslora=config.use_rslora,\n        init", "init", TUNING + "test_kinds_of"),
    Mutation("repeats are ignored", "training/lesson",
             "rows[inside].repeat_interleave(repeats[inside])",
             "rows[inside]", TUNING + "test_pictures_are_mirrored"),
    Mutation("pictures are stretched", "training/data",
             "ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)",
             "image.resize(size[::-1], Image.Resampling.LANCZOS)", TRAINING + "test_pixels_are"),
    Mutation("dropout draws on from where it was", "training/loop",
             "torch.manual_seed(step_generator(config.seed, state.step, start + 2).initial_seed())",
             "pass", TUNING + "test_a_run_killed"),
    Mutation("the last is taken for the best", "training/run",
             "if state.step > 0 and loss < best_loss(config.output_dir):", "if state.step > 0:",
             TUNING + "test_the_best_checkpoint"),
    Mutation("a checkpoint is written in place", "training/checkpoint",
             'partial = config.output_dir / f".{final.name}.partial"', "partial = final",
             TRAINING + "test_killed_two_hundred"),
    Mutation("a picture may be held out and trained on", "training/lesson", "seen=self._seen,", "",
             TUNING + "test_what_is_wrong"),
    Mutation("a resume that finds no checkpoint begins", "training/checkpoint",
             'if not (chosen / "state.json").is_file():', "if False:",
             TRAINING + "test_without_a_checkpoint_nothing_goes_on"),
    Mutation("a resume from the beginning asks nothing", "training/checkpoint",
             "if now.get(name) != then.get(name) and name not in FREE_TO_CHANGE",
             "if now.get(name) != then.get(name) and name not in FREE_TO_CHANGE and facts['step']",
             TRAINING + "test_without_a_checkpoint_nothing_goes_on"),
    Mutation("class pictures of another model are taken", "training/lesson",
             'if self._drawn("model") not in (None, hashes):', "if False:",
             TUNING + "test_dreambooth_draws_its_class_once"),
    Mutation("a repeated run reads kohya's flags again", "training/config",
             " and files.repeat is None:", ":",
             TUNING + "test_what_the_kohya_file_says_of_the_run_is_done"),
    Mutation("a LoRA of changed weights is taken for a plain one", "lora",
             "        _check_plain(path, config)", "        pass",
             LORA + "test_a_lora_of_changed_weights_is_refused"),
    Mutation("clients that wait hold their pictures", "server/openai",
             "    job = await service.submit(_edit, asked, files, service)",
             "    job = await service.submit(_edit, asked, files, service)\n"
             '    kept = [open_picture(files["image"], "image", service.settings) for _ in "ab"]',
             "server/test_found.py::test_clients_that_wait_hold_no_pictures_in_memory"),
    Mutation("a picture of another model counts as drawn", "batch",
             'known["model"].get("hash"), then', "pipe.model.hash(), then",
             "unit/test_batch.py::test_other_pictures_are_not_drawn_over"),
    Mutation("a picture of another dtype counts as drawn", "batch",
             'if k in ("dtype", "embeddings")}', 'if k == "embeddings"} | {"dtype": dtype}',
             "unit/test_batch.py::test_other_pictures_are_not_drawn_over"),
    Mutation("the drawing is as important as the answers", "server/process", "NICE = 5", "NICE = 0",
             "server/test_jobs.py::test_drawing_gives_way"),
    Mutation("weights that nothing reads are no matter", "controlnet",
             'if more := sorted(told["unexpected_keys"]):', "if more := []:",
             "unit/test_controlnet.py::test_weights_that_are_missing"),
    Mutation("a prompt's own seed is not its seed", "promptfile",
             "mine if mine is not None else first + passed", "first + passed",
             "unit/test_batch.py::test_every_prompt_becomes_the_picture_of_its_seed"),
    Mutation("a ratio of medians, not of what was side by side", "bench",
             'statistics.median(mine["picture"] / its["picture"] for mine, its in pairs)',
             'self.median("picture") / other.median("picture")',
             "unit/test_bench.py::test_a_ratio_is_the_median"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.what)
def test_the_table_fits_the_source(mutation):
    text = (ROOT / "latentgen" / f"{mutation.module}.py").read_text("utf-8")
    assert text.count(mutation.source) == 1
    assert mutation.broken != mutation.source
    file, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}" in (ROOT / "tests" / file).read_text("utf-8")


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """The package and its tests, to be broken; the bundled model stays where it is."""
    root = tmp_path_factory.mktemp("mutated")
    ignored = shutil.ignore_patterns("models", "__pycache__", "mutations")
    for name in ("latentgen", "training", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    (root / "latentgen" / "models").symlink_to(ROOT / "latentgen" / "models")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def passes(root, test):
    """Does the test, named by the beginning of its node id, pass in this copy?"""
    file, _, name = test.partition("::")
    chosen = [f"tests/{test}"] if "[" in name else [f"tests/{file}", "-k", name or "test"]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: some test failed
    return done.returncode == 0


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", TABLE, ids=lambda mutation: mutation.what)
def test_the_mutation_is_noticed(copy, mutation):
    module = copy / "latentgen" / f"{mutation.module}.py"
    whole = module.read_text("utf-8")
    module.write_text(whole.replace(mutation.source, mutation.broken), "utf-8")
    try:
        assert not passes(copy, mutation.test)
    finally:
        module.write_text(whole, "utf-8")


@pytest.mark.mutation
@pytest.mark.parametrize("file", sorted({mutation.test.split("::")[0] for mutation in TABLE}))
def test_without_a_mutation_the_tests_pass(copy, file):
    assert passes(copy, file)
