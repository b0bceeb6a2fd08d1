"""`load(quantization=…)`: original weights are quantized once, when asked for or when they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest

import moelocal
from hub.repos import connected
from hub.server import Repo
from moelocal.errors import CheckpointError, ModelNotFound, RequestError
from moelocal.formats import QuantizedArray
from moelocal.hub import EMBEDDED
from moelocal.quantize import once
from moelocal.quantize.once import prepared
from moelocal.quantize.sizes import WORKING, Memory

SMALL = '[formats]\ndefault = "4 bits"\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def folder(tmp_path):
    """The embedded model as a user's folder."""
    return shutil.copytree(EMBEDDED, tmp_path / "mine")


def room(monkeypatch, nbytes: int) -> None:
    """A machine that has so many bytes for weights."""
    monkeypatch.setattr(
        Memory, "here", classmethod(lambda cls: Memory(1 << 40, nbytes + WORKING, "a test says"))
    )
    monkeypatch.setattr(once, "LEAST_CONTEXT", 16)


def test_weights_that_fit_are_run_as_they_are(folder, cache):
    assert prepared(None, "auto") == EMBEDDED
    assert prepared(folder, "auto") == folder
    assert prepared(folder, "none") == folder
    assert not cache.exists()


def test_a_recipe_is_made_once_and_then_found(folder, cache, monkeypatch):
    first = prepared(folder, "4bit", progress=False)
    assert first.parent == cache and first.name.startswith("mine-")
    times = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    assert prepared(folder, "4bit", progress=False) == first
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == times
    assert prepared(folder, "8bit", progress=False) != first
    model = moelocal.load(folder, quantization="4bit", progress=False)
    assert isinstance(model.decoder.head, QuantizedArray) and model.folder == first
    assert moelocal.generate(model, "Hello!", max_tokens=4).tokens


def test_a_source_that_changed_is_quantized_anew(folder):
    first = prepared(folder, "4bit", progress=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    assert prepared(folder, "4bit", progress=False) != first


def test_files_that_are_not_of_the_model_do_not_quantize_it_anew(folder):
    first = prepared(folder, "4bit", progress=False)
    (folder / ".DS_Store").write_text("a look at the folder")
    (folder / "out").mkdir()
    (folder / "README.md").symlink_to("nowhere")
    assert prepared(folder, "4bit", progress=False) == first


def test_weights_that_do_not_fit_are_quantized_by_the_first_recipe_that_does(folder, monkeypatch, capsys):
    room(monkeypatch, 5_000_000)
    made = prepared(folder, "auto")
    assert "-balanced-" in made.name
    err = capsys.readouterr().err
    assert err.startswith(
        f"{folder}: 9.2 MB of weights do not fit the 5.0 MB that this machine has for them: "
    )
    assert "quantizing them once to balanced, 3.2 MB" in err and f"`moelocal inspect {folder}`" in err
    assert prepared(folder, "auto", progress=False) == made
    assert capsys.readouterr().err == ""
    room(monkeypatch, 3_100_000)
    assert "-small-" in prepared(folder, "auto", progress=False).name


def test_weights_that_do_not_fit_in_any_way_are_refused(folder, monkeypatch):
    room(monkeypatch, 1_000_000)
    with pytest.raises(
        RequestError, match=r"9\.2 MB of weights, or 3\.\d MB as small, do not fit the 1\.0 MB"
    ):
        prepared(folder, "auto", progress=False)
    assert prepared(folder, "none") == folder


def test_a_quantized_checkpoint_is_never_quantized_again(folder, monkeypatch):
    made = prepared(folder, "4bit", progress=False)
    room(monkeypatch, 1_000)
    assert prepared(made, "auto", progress=False) == made
    with pytest.raises(CheckpointError, match="is quantized already"):
        prepared(made, "8bit", progress=False)


def test_an_unknown_recipe_is_named(folder):
    with pytest.raises(moelocal.MoelocalError, match="5bits"):
        moelocal.load(folder, quantization="5bits")


@pytest.fixture
def server(tmp_path, monkeypatch):
    files = {file.name: file.read_bytes() for file in EMBEDDED.iterdir()}
    with connected(monkeypatch, tmp_path / "hub", Repo(files)) as server:
        yield server


def test_a_repository_that_does_not_fit_is_streamed_and_kept_quantized_alone(server, monkeypatch, tmp_path):
    room(monkeypatch, 5_000_000)
    made = prepared("owner/name", "auto", progress=False)
    assert made.name.startswith("owner--name-balanced-")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    requests = len(server.requests)
    assert prepared("owner/name", "auto", progress=False) == made
    assert prepared("owner/name", "balanced", offline=True, progress=False) == made
    assert len(server.requests) == requests, "what was quantized is found without a network"
    with pytest.raises(ModelNotFound):
        prepared("owner/name", "none", offline=True)


def test_a_repository_that_fits_is_downloaded_as_it_is(server, tmp_path):
    found = prepared("owner/name", "auto", progress=False)
    assert (found / "model.safetensors").read_bytes() == (EMBEDDED / "model.safetensors").read_bytes()
    assert tmp_path / "hub" in found.parents
