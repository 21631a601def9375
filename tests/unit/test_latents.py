"""Encoding and decoding: scaling factors, who draws what, and pictures that came out as nothing."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from fakes import autoencoder_tiny, parts

from latentgen import DecodeError, latents

SHAPE = (4, 4, 4)


@pytest.fixture
def vae():
    return copy.deepcopy(parts()["vae"])


@pytest.fixture
def image():
    return torch.rand(1, 3, 32, 32, generator=torch.manual_seed(5)) * 2 - 1


def test_noise_of_a_seed_is_torchs_own_on_the_cpu_in_float32():
    noise = latents.draw_noise(
        latents.make_generators([7, 8]), SHAPE, torch.empty(0, dtype=torch.float16)
    )
    for row, seed in zip(noise, (7, 8), strict=True):
        expected = torch.randn(1, *SHAPE, generator=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(row, expected[0].half())


def test_encoding_samples_the_posterior_of_each_picture_from_its_own_generator(vae, image):
    rows = latents.encode(vae, image, latents.make_generators([1, 2]))
    with torch.no_grad():
        posterior = vae.encode(image).latent_dist
    for row, seed in zip(rows, (1, 2), strict=True):
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
        expected = vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
        torch.testing.assert_close(row[None], expected)


def test_an_autoencoder_whose_weights_are_offloaded_is_given_pixels_where_it_runs(vae, image):
    expected = latents.encode(vae, image, latents.make_generators([1]))
    cpu_offload(vae, torch.device("cpu"))
    assert vae.device.type == "meta"
    found = latents.encode(vae, image, latents.make_generators([1]), torch.device("cpu"))
    assert torch.equal(found, expected)


def test_an_autoencoder_without_a_posterior_gives_the_same_row_and_draws_nothing(image):
    vae = autoencoder_tiny()
    generators = latents.make_generators([1, 2])
    before = [generator.get_state() for generator in generators]
    rows = latents.encode(vae, image, generators)
    assert torch.equal(rows[0], rows[1])
    assert not latents.has_posterior(vae)
    for generator, state in zip(generators, before, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_decoding_undoes_the_scaling_factor(vae):
    sample = torch.randn(2, *SHAPE, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(sample / vae.config.scaling_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latents.decode(vae, sample), expected)


class Decoder:
    """An autoencoder of one colour, or of none in half precision."""

    def __init__(self, value, half=None, dtype=torch.float32):
        self.value, self.half, self.dtype = value, half, dtype
        self.config = parts()["vae"].config

    def float(self):
        self.dtype = torch.float32
        return self

    def decode(self, sample, return_dict):
        value = self.value if self.dtype == torch.float32 else self.half
        return (torch.full((len(sample), 3, 8, 8), value, dtype=self.dtype) + 0 * sample.mean(),)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf, -1.0])
def test_half_precision_that_draws_nothing_is_decoded_again_in_float32(broken):
    vae = Decoder(0.5, half=broken, dtype=torch.float16)
    pixels = latents.decode(vae, torch.zeros(2, *SHAPE, dtype=torch.float16))
    assert torch.equal(pixels, torch.full((2, 3, 8, 8), 0.75))
    assert vae.dtype == torch.float16  # another thread may be using it


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, -3.0])
def test_black_or_not_finite_also_in_float32_is_an_error(value, dtype):
    with pytest.raises(DecodeError, match="also in float32"):
        latents.decode(Decoder(value, half=value, dtype=dtype), torch.zeros(1, *SHAPE))


def test_one_black_picture_among_good_ones_is_an_error(vae, monkeypatch):
    good = torch.zeros(2, 3, 8, 8)
    good[1] = -1
    monkeypatch.setattr(vae, "decode", lambda sample, return_dict: (good,))
    with pytest.raises(DecodeError, match="black"):
        latents.decode(vae, torch.zeros(2, *SHAPE))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_named_as_the_cause(vae, value):
    with pytest.raises(DecodeError, match="latents are not finite"):
        latents.decode(vae, torch.full((1, *SHAPE), value))


def test_a_dark_picture_that_is_not_black_is_fine():
    pixels = latents.decode(Decoder(-0.99), torch.zeros(1, *SHAPE))
    np.testing.assert_allclose(pixels, 0.005, atol=1e-6)


def test_previews_are_never_an_error():
    pixels = latents.decode_unchecked(Decoder(-1.0), torch.zeros(1, *SHAPE))
    assert (pixels == 0).all()
