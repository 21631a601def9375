"""Python looks for garbage when everything is loaded, and not among what stays."""

import contextlib
import gc
import sys

import pytest
from fakes import components

from latentgen import LatentDiffusion, cli, startup


@pytest.fixture(autouse=True)
def collector():
    gc.unfreeze()  # what commands that ran in this process before have frozen
    assert gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LatentDiffusion(**components()).save_pretrained(folder)
    return str(folder)


def state():
    return gc.isenabled(), gc.get_freeze_count() > 0


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["latentgen", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_generate_loads_without_and_draws_with_the_collector(monkeypatch, model, tmp_path):
    states = []
    load, draw = LatentDiffusion.from_pretrained, LatentDiffusion.draw

    def noted_load(*args, **kwargs):
        states.append(state())
        return load(*args, **kwargs)

    def noted_draw(pipe, request):
        states.append(state())
        return draw(pipe, request)

    monkeypatch.setattr(LatentDiffusion, "from_pretrained", noted_load)
    monkeypatch.setattr(LatentDiffusion, "draw", noted_draw)
    picture = tmp_path / "a.png"
    run(monkeypatch, "generate", "a cat", "--model", model, "--steps", "1", "-o", str(picture))
    assert states == [(False, False), (True, True)]
    assert picture.is_file()


def test_a_server_listens_with_the_collector(monkeypatch, model, tmp_path):
    pytest.importorskip("uvicorn")
    from latentgen.server import run as server

    states = []
    monkeypatch.setattr(server, "listen", lambda settings: [])
    monkeypatch.setattr(server.Server, "run", lambda *args: states.append(state()))
    monkeypatch.setenv("LATENTGEN_HOME", str(tmp_path))
    monkeypatch.setattr(server, "log_as_json", lambda: None)
    run(monkeypatch, "serve", "--model", model)
    assert states == [(True, True)]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_library_leaves_the_collector_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    with contextlib.suppress(ImportError), startup.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == enabled
