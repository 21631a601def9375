"""Strength: all pairs of 1 to 100 steps with every strength that is a whole number of them."""

import pytest
import torch
from fakes import SCHEDULER, drawer
from PIL import Image

from latentgen import InvalidRequest, schedulers
from latentgen.request import Request

PAIRS = [(steps, k / steps) for steps in range(1, 101) for k in range(1, steps + 1)]
PICTURE = Image.new("RGB", (32, 32))


def resolved(steps, strength):
    request = Request(prompt="x", image=PICTURE, num_inference_steps=steps, strength=strength)
    return request.resolve(drawer().model)


def planned(name, steps, strength):
    scheduler = schedulers.create(name, {**SCHEDULER, "_class_name": "DDIMScheduler"})
    return scheduler, schedulers.plan(scheduler, name, steps, strength, "cpu")


def test_there_are_5050_pairs():
    assert len(PAIRS) == 5050


def test_every_pair_runs_exactly_the_steps_of_the_formula_or_is_refused():
    refused = 0
    for steps, strength in PAIRS:
        formula = int(steps * strength)
        if formula == 0:
            with pytest.raises(InvalidRequest, match="strength"):
                resolved(steps, strength)
            refused += 1
            continue
        request = resolved(steps, strength)
        scheduler, timesteps = planned("ddim", steps, request.strength)
        assert request.steps_run == len(timesteps) == formula
        assert torch.equal(timesteps, scheduler.timesteps[steps - formula :])
    assert refused < 5  # k / steps * steps is not always k: those few are one step short


@pytest.mark.parametrize("strength", [0, 0.001, 0.0099])
def test_a_strength_that_leaves_no_step_is_refused_with_one_that_works(strength):
    with pytest.raises(InvalidRequest, match=r"give at least 0\.01 or more steps") as refused:
        resolved(100, strength)
    assert refused.value.field == "strength"
    assert resolved(100, 0.01).steps_run == 1


@pytest.mark.parametrize("steps", range(1, 101))
def test_the_strength_that_the_refusal_names_works(steps):
    with pytest.raises(InvalidRequest) as refused:
        resolved(steps, 0)
    least = float(refused.value.hint.split("at least ")[1].split()[0])
    assert resolved(steps, least).steps_run >= 1


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_a"])
@pytest.mark.parametrize(("steps", "strength"), [(10, 0.5), (10, 1.0), (7, 0.3), (50, 0.02)])
def test_a_second_order_scheduler_has_two_timesteps_a_step_but_one_for_the_last(
    name, steps, strength
):
    scheduler, timesteps = planned(name, steps, strength)
    assert len(timesteps) == 2 * int(steps * strength) - 1
    assert scheduler.begin_index == 2 * (steps - int(steps * strength))


@pytest.mark.parametrize("name", schedulers.NAMES)
def test_one_u_net_call_for_each_planned_timestep(name, pipe, picture):
    options = {"num_inference_steps": 4, "strength": 0.5, "scheduler": name, "seed": 1}
    steps = list(pipe.stream("x", image=picture, **options))
    _, timesteps = planned(name, 4, 0.5)
    assert [step.index for step in steps] == list(range(len(timesteps)))
    assert {step.total for step in steps} == {len(timesteps)}
    assert [step.result is None for step in steps] == [True] * (len(steps) - 1) + [False]
