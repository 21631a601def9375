"""What is the same in every step of a drawing is done once."""

import copy
import inspect
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from fakes import components

from latentgen import LatentDiffusion, once

CALL = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 3, "output_type": "np"}


def test_keys_and_values_of_the_prompt_are_computed_once_for_all_steps(monkeypatch):
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    names = {module: name for name, module in pipe.unet.named_modules()}
    calls = Counter()
    real = torch.nn.Linear.forward

    def forward(self, x):
        calls[names.get(self)] += 1
        return real(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    for drawing in (1, 2):
        pipe.generate(**CALL)
        for name in names.values():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                assert calls[name] == drawing
            elif name.endswith(("attn1.to_k", "attn2.to_q")):
                assert calls[name] == 3 * drawing
    assert calls["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == 2


def test_the_signature_of_an_attention_is_worked_out_once(monkeypatch):
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    pipe.generate(**CALL)
    asked = []
    real = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda f: asked.append(f) or real(f))
    pipe.generate(**CALL)
    processors = {type(one) for one in pipe.unet.attn_processors.values()}
    told = [f.__func__ for f in asked if getattr(f, "__func__", None) is not None]
    found = [f for f in told if f in {kind.__call__ for kind in processors}]
    assert found  # diffusers still asks
    assert all(f.__signature__ == real(f) for f in found)
    assert "attn" in real(found[0]).parameters


def test_the_next_drawing_sees_other_weights():
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    before = pipe.generate(**CALL).images
    for name, value in pipe.unet.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            value.data *= -3
    after = pipe.generate(**CALL).images
    assert not np.array_equal(before, after)
    parts = {**components(), "unet": copy.deepcopy(components()["unet"])}
    parts["unet"].load_state_dict(pipe.unet.state_dict())
    np.testing.assert_array_equal(LatentDiffusion(**parts).generate(**CALL).images, after)


def test_a_copy_of_a_model_that_has_drawn_has_weights_of_its_own():
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    drawn = pipe.generate(**CALL).images
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):  # noqa: S301
        other = LatentDiffusion(**{**components(), "unet": unet})
        np.testing.assert_array_equal(other.generate(**CALL).images, drawn)
        for value in unet.parameters():
            value.data.zero_()
        assert not np.array_equal(other.generate(**CALL).images, drawn)
    np.testing.assert_array_equal(pipe.generate(**CALL).images, drawn)


def test_weights_of_convolutions_are_rearranged_once_for_all_steps(monkeypatch):
    assert once._can_pack()  # on the processors that the tests run on
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    packed, convolved = Counter(), Counter()
    pack, convolve = once._pack, once._convolve

    def counted_pack(module, shape):
        packed[module] += 1
        return pack(module, shape)

    def counted_convolve(module, x, weight):
        convolved[module] += 1
        found = convolve(module, x, weight)
        torch.testing.assert_close(found, torch.nn.Conv2d.forward(module, x), rtol=0, atol=1e-5)
        return found

    monkeypatch.setattr(once, "_pack", counted_pack)
    monkeypatch.setattr(once, "_convolve", counted_convolve)
    drawn = pipe.generate(**CALL).images
    convolutions = {m for m in pipe.unet.modules() if isinstance(m, torch.nn.Conv2d)}
    assert packed == dict.fromkeys(convolutions, 1)
    assert convolved == dict.fromkeys(convolutions, 3)
    np.testing.assert_array_equal(pipe.generate(**CALL).images, drawn)

    other = pipe.generate(**CALL | {"width": 64, "height": 32}).images  # another shape
    assert other.shape == (1, 32, 64, 3)

    # outside of a drawing, the module is what it was
    for module in convolutions:
        assert not module.weight.is_mkldnn
    convolved.clear()
    pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 16))
    assert not convolved


@pytest.mark.parametrize("case", ["large", "half", "no such operations", "other padding"])
def test_weights_are_not_rearranged_where_it_would_not_do(monkeypatch, case):
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    expected = pipe.generate(**CALL).images
    pipe = LatentDiffusion(**copy.deepcopy(components()))
    match case:
        case "large":
            monkeypatch.setattr(once, "MOST_PARAMETERS", 1000)
        case "half":
            pipe.unet.to(torch.bfloat16)
        case "no such operations":
            monkeypatch.setattr(once, "_can_pack", lambda: False)
        case "other padding":
            for module in pipe.unet.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.padding_mode = "replicate"
    monkeypatch.setattr(once, "_pack", None)
    found = pipe.generate(**CALL).images
    if case in ("large", "no such operations"):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_operations_that_are_gone_or_changed_are_noticed(monkeypatch):
    def gone(*args):
        raise AttributeError

    for change in (gone, lambda module, x, weight: 2 * torch.nn.Conv2d.forward(module, x)):
        monkeypatch.setattr(once, "_convolve", change)
        once._can_pack.cache_clear()
        assert not once._can_pack()
    monkeypatch.undo()
    once._can_pack.cache_clear()
    state = torch.get_rng_state()
    assert once._can_pack()
    assert torch.equal(torch.get_rng_state(), state)  # else it would change what is drawn next
