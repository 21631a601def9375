"""The pictures to train on: `training/make_dataset.py` and `make_examples.py`."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
make_dataset = pytest.importorskip("make_dataset")  # icons are drawn by the extra "train"
make_examples = pytest.importorskip("make_examples")


def tarball(spec: str, folder: Path) -> Path:
    return folder / f"{spec.replace('/', '-')}.tgz"


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Three icons in each style."""
    monkeypatch.setattr(make_dataset, "fetch_package", tarball)
    folder = tmp_path / "packages"
    folder.mkdir()
    sources = [*make_dataset.ICON_PACKAGES.values(), make_dataset.LABEL_PACKAGE]
    for height, (spec, *_) in enumerate(sources, 4):
        icons = {
            key: {"body": f'<rect width="{width}" height="{height}" fill="red"/>'}
            for width, key in enumerate(("rocket", "robot", "hut"), 4)
        }
        members = {"icons.json": {"icons": icons}, "chars.json": {}, "en/data.json": []}
        with tarfile.open(tarball(spec, folder), "w:gz") as archive:
            for name, content in members.items():
                data = json.dumps(content).encode()
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return folder


def run(module, monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_data_set_that_was_interrupted_is_made_anew(packages, tmp_path, monkeypatch):
    flags = ("--package_dir", packages, "--resolution", 16, "--output_dir")
    run(make_dataset, monkeypatch, *flags, tmp_path / "whole")
    draw, drawn = make_dataset.Icon.draw, []

    def interrupted(icon, side):
        drawn.append(icon)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(icon, side)

    monkeypatch.setattr(make_dataset.Icon, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(make_dataset, monkeypatch, *flags, tmp_path / "parts")
    (tmp_path / "parts" / "train" / "left.png").write_text("of the run before")
    for _ in range(2):
        run(make_dataset, monkeypatch, *flags, tmp_path / "parts")
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_folders_of_others_are_not_touched(packages, tmp_path, monkeypatch):
    for module, name in ((make_dataset, "train"), (make_examples, "mascot")):
        own = tmp_path / module.__name__
        (own / name).mkdir(parents=True)
        (own / name / "mine.png").write_text("of years")
        with pytest.raises(SystemExit, match=f"{name} is not of this script"):
            run(module, monkeypatch, "--output_dir", own)
        assert contents(own) == {f"{name}/mine.png": b"of years"}


def test_examples_are_made_anew(tmp_path, monkeypatch):
    flags = ("--data_dir", tmp_path / "none", "--output_dir", tmp_path / "examples")
    for _ in range(2):
        run(make_examples, monkeypatch, *flags)
        made = contents(tmp_path / "examples")
        assert sorted(made) == ["EXAMPLES.txt", *(f"mascot/mascot-{n}.png" for n in range(1, 6))]
        (tmp_path / "examples" / "mascot" / "left.png").write_text("of the run before")
