"""`latentgen bench`: what is measured, in which order, and what is told."""

from __future__ import annotations

import json

import fakes
import pytest
from typer.testing import CliRunner

from latentgen import InvalidRequest, LatentDiffusion, bench, cli, modelfolder
from latentgen.bench import Row, compare, read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "toy"
    LatentDiffusion(**fakes.components()).save_pretrained(folder)
    return str(folder)


def row(*seconds: float, **settings) -> Row:
    return Row(settings, [{"picture": one, "memory": 100} for one in seconds])


def test_a_ratio_is_the_median_of_what_was_measured_side_by_side():
    first, other = row(1, 10, 4), row(2, 5, 8, steps=3, num_images=2)
    assert other.ratio(first) == 2
    assert first.ratio(first) == 1
    assert (other.median("picture"), other.name) == (5, "steps=3,num_images=2")
    assert row().ratio(first) is None
    assert row().median("memory") is None


def test_settings_take_turns_and_one_that_fails_is_left(monkeypatch):
    asked = []

    def measured(model, settings):
        asked.append(settings)
        if settings.get("dtype") == "float16":
            raise RuntimeError("not on this machine")
        return {"picture": 1.0}

    monkeypatch.setattr(bench, "_measured_apart", measured)
    rows = [Row({}), Row({"dtype": "float16"}), Row({"steps": 3})]
    told = [(number, one.name) for number, one in compare(rows, "toy", {"seed": 4, "steps": 5}, 2)]
    assert told == [
        (0, "as it is"),
        (0, "dtype=float16"),
        (0, "steps=3"),
        (1, "as it is"),
        (1, "steps=3"),
    ]
    shared = {"seed": 4, "steps": 5}
    assert asked[:3] == [shared, shared | {"dtype": "float16"}, shared | {"steps": 3}]
    assert [len(one.rounds) for one in rows] == [2, 0, 2]
    assert rows[1].error == "not on this machine"


def test_settings_are_read_and_checked_before_anything_is_measured(model):
    found = modelfolder.find(model)
    own = read_settings("steps=3, guidance-scale=1.5,scheduler=euler,dtype=bfloat16", found, {})
    assert own.settings == {
        "steps": 3,
        "guidance_scale": 1.5,
        "scheduler": "euler",
        "dtype": "bfloat16",
    }
    for text, told in [
        ("stesp=3", "names are attention"),
        ("scheduler=[", "compare='scheduler=\\['"),
        ("steps", "NAME=VALUE"),
        ("steps=0", "between 1 and 1000"),
        ("height=20", "multiple of 8"),
        ("image=a.png", "names are attention"),
    ]:
        with pytest.raises(InvalidRequest, match=told):
            read_settings(text, found, {})
    with pytest.raises(InvalidRequest, match="takes no eta"):
        read_settings("eta=0.5", found, {"scheduler": "euler"})


def test_a_real_comparison_in_processes_of_its_own(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "-m", model, "--rounds", "1", "--steps", "2", "-o", "bench.json"]
    words += ["--compare", "num_images=2", "--compare", "attention=xformers"]
    outcome = CliRunner().invoke(cli.app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "attention=xformers: attention='xformers': needs an NVIDIA GPU" in outcome.stderr
    assert "toy on cpu" in outcome.stdout
    facts = json.loads((tmp_path / "bench.json").read_text())
    plain, two, none = facts["rows"]
    assert facts["settings"] == {"steps": 2, "num_images": 1}
    assert plain["ratio"] == 1
    assert two["ratio"] == pytest.approx(two["picture"] / plain["picture"])
    for measured in (plain, two):
        assert 0 < measured["picture"] < measured["start"] < 600
        assert 50e6 < measured["memory"] < 8e9  # bytes, of a process with torch
    assert (none["picture"], none["rounds"]) == (None, [])


def test_without_the_first_nothing_is_compared(model, monkeypatch):
    def fails(model, settings):
        asked.append(settings)
        raise RuntimeError("no such device")

    asked: list[dict] = []
    monkeypatch.setattr(bench, "_measured_apart", fails)
    outcome = CliRunner().invoke(cli.app, ["bench", "-m", model])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr == "as it is: no such device\n"
    assert len(asked) == 1
