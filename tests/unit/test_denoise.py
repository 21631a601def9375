"""The order of the loop's body, written down by recorders."""

import inspect

import pytest
import torch

from latentgen import denoise as module
from latentgen.conditioning import MaskBlend, inpainting_channels, latent_mask
from latentgen.denoise import accepted, denoise

TIMESTEPS = torch.tensor([900, 500, 100])
LATENTS = torch.full((1, 4, 2, 2), 8.0)
EMBEDDINGS = torch.stack([torch.zeros(3, 5), torch.ones(3, 5)])  # [negative, positive]


class Log:
    """A scheduler and a U-Net that write down what they are asked, with easy numbers."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 1000)

    class config:
        prediction_type = "epsilon"

    def __init__(self):
        self.calls = []
        self.generators = []

    def scale_model_input(self, sample, t):
        self.calls.append(("scale", int(t), len(sample), float(sample.mean())))
        return sample / 2

    def unet(self, sample, t, encoder_hidden_states, return_dict):
        self.calls.append(("unet", int(t), tuple(sample.shape)))
        self.sample, self.embeddings = sample, encoder_hidden_states
        rows = encoder_hidden_states.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return (rows.expand(-1, 4, 2, 2) + 1,)  # 1 for the negative, 2 for the positive

    def step(self, prediction, t, sample, generator=None, return_dict=True):
        self.calls.append(("step", int(t), float(prediction.mean()), float(sample.mean())))
        self.generators.append(generator)
        return (sample - 1,)

    def blend(self, scheduler, latents, next_timestep):
        assert scheduler is self
        self.calls.append(("blend", next_timestep.tolist(), float(latents.mean())))
        return latents + 0.5


def test_the_body_of_the_loop_in_its_order():
    log = Log()
    for step in denoise(
        log.unet,
        log,
        TIMESTEPS,
        LATENTS,
        EMBEDDINGS,
        guidance_scale=3.0,
        extra_channels=torch.ones(1, 5, 2, 2),
        blend=log.blend,
    ):
        log.calls.append(("yield", step.index, step.total, float(step.latents.mean())))
    expected = []
    for i, (t, following) in enumerate([(900, [500]), (500, [100]), (100, [])]):
        x = 8 - i / 2
        expected += [
            ("scale", t, 2, x),
            ("unet", t, (2, 9, 2, 2)),  # negative and positive in one batch
            ("step", t, 1 + 3.0 * (2 - 1), x),  # guided, on the unscaled sample
            ("blend", following, x - 1),
            ("yield", i, 3, x - 0.5),
        ]
    assert log.calls == expected


def test_mask_channels_come_last_and_are_never_scaled():
    log = Log()
    extra = torch.arange(5.0).reshape(1, 5, 1, 1).expand(1, 5, 2, 2)
    next(denoise(log.unet, log, TIMESTEPS, LATENTS, EMBEDDINGS, guidance_scale=2.0,
                 extra_channels=extra))  # fmt: skip
    assert torch.equal(log.sample[:, :4], torch.full((2, 4, 2, 2), 4.0))  # 8 / 2
    assert torch.equal(log.sample[:, 4:], torch.cat([extra, extra]))
    assert torch.equal(log.embeddings, EMBEDDINGS)


def test_without_guidance_each_picture_is_one_row_and_its_prediction_is_used_as_it_is():
    log = Log()
    *_, last = denoise(log.unet, log, TIMESTEPS, LATENTS, EMBEDDINGS[1:])
    assert log.calls[0] == ("scale", 900, 1, 8.0)
    assert log.calls[1] == ("unet", 900, (1, 4, 2, 2))
    assert log.calls[2] == ("step", 900, 2.0, 8.0)
    assert float(last.latents.mean()) == 5.0


def test_step_gets_the_generators_and_nothing_else_draws():
    log, generators = Log(), [torch.Generator()]
    before = torch.get_rng_state()
    list(denoise(log.unet, log, TIMESTEPS, LATENTS, EMBEDDINGS[1:],
                 step_kwargs={"generator": generators}))  # fmt: skip
    assert all(seen is generators for seen in log.generators)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_runs_before_it_is_asked_for_and_leaving_the_loop_cancels():
    log = Log()
    steps = denoise(log.unet, log, TIMESTEPS, LATENTS, EMBEDDINGS[1:])
    assert log.calls == []
    next(steps)
    steps.close()
    assert [name for name, *_ in log.calls] == ["scale", "unet", "step"]


def test_gradients_are_off_inside_and_back_on_between_steps():
    log = Log()
    for step in denoise(log.unet, log, TIMESTEPS, LATENTS, EMBEDDINGS[1:]):
        assert step.latents.is_inference()
        assert torch.is_grad_enabled()


def test_the_loop_knows_no_prompts_and_no_pictures():
    source = inspect.getsource(module)
    assert "import" in source
    for word in ("PIL", "tokenizer", "callback"):
        assert word not in source


def test_accepted_keeps_what_a_function_takes():
    assert accepted(lambda a, b=1: None, b=2, eta=3) == {"b": 2}


class AddsTime:
    """Noising as plain numbers: original + 100 * noise * timestep."""

    @staticmethod
    def add_noise(original, noise, timestep):
        return original + 100 * noise * timestep


def test_the_blend_keeps_the_outside_on_the_track_of_the_original():
    original, noise = torch.full((1, 4, 1, 2), 3.0), torch.ones(1, 4, 1, 2)
    blend = MaskBlend(original, noise, torch.tensor([[[[0.0, 1.0]]]]))
    drawn = torch.full((1, 4, 1, 2), -1.0)
    during = blend(AddsTime, drawn, torch.tensor([5]))
    assert during[0, 0, 0].tolist() == [503.0, -1.0]
    after = blend(AddsTime, drawn, torch.tensor([], dtype=torch.long))
    assert after[0, 0, 0].tolist() == [3.0, -1.0]


def test_inpainting_channels_are_the_mask_then_the_masked_picture():
    mask, masked = torch.ones(1, 1, 2, 2), torch.arange(32.0).reshape(2, 4, 2, 2)
    channels = inpainting_channels(mask, masked)
    assert channels.shape == (2, 5, 2, 2)
    assert torch.equal(channels[:, :1], torch.ones(2, 1, 2, 2))
    assert torch.equal(channels[:, 1:], masked)


@pytest.mark.parametrize("pixel", [(0, 0), (7, 3), (15, 15)])
def test_a_mask_too_thin_for_nearest_neighbour_takes_the_cell_it_touches(pixel):
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, *pixel] = 1
    small = latent_mask(mask, 2, 2)
    assert small.sum() == 1
    assert small[0, 0, pixel[0] // 8, pixel[1] // 8] == 1
