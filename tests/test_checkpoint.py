"""Checkpoints are there whole or not at all, and what is damaged is never read."""

import json
import logging
import os

import numpy as np
import pytest

import loopos
from loopos.autograd import Parameter
from loopos.errors import CheckpointError, OutputError
from loopos.training.checkpoint import (
    damage,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)


def model(fill):
    rng = np.random.default_rng(fill)
    return {
        "a.weight": Parameter(rng.normal(size=(3, 4)).astype(np.float32), "a.weight"),
        "b": Parameter(rng.normal(size=5).astype(np.float32), "b", requires_grad=False),
    }


def trained(fill=1):
    parameters = model(fill)
    optimizer = loopos.AdamW(parameters, learning_rate=0.1)
    parameters["a.weight"].add_grad(np.ones((3, 4), np.float32))
    optimizer.step()
    return parameters, optimizer


@pytest.fixture
def root(tmp_path):
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, *trained(step), {"step": step, "seed": 7})
    return tmp_path


def test_everything_comes_back(root):
    parameters, optimizer = trained(2)
    others = model(9)
    fresh = loopos.AdamW(others, learning_rate=0.1)
    state = load_checkpoint(find_checkpoint(root), others, fresh)
    assert (state["step"], state["seed"], state["loopos_version"]) == (2, 7, loopos.__version__)
    for name, parameter in parameters.items():
        assert np.array_equal(others[name].data, parameter.data)
    ours, theirs = optimizer.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert np.array_equal(value, theirs[key])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def foreign(path):
    path.write_bytes(b"something else")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", [flip, cut, foreign, os.remove])
def test_a_damaged_one_is_skipped_with_a_warning(root, caplog, name, harm):
    harm(root / "step-00000002" / name)
    with caplog.at_level(logging.WARNING, "loopos"):
        assert find_checkpoint(root).name == "step-00000001"
    assert name in caplog.text
    parameters = model(9)
    before = parameters["b"].data.copy()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(root / "step-00000002", parameters)
    assert np.array_equal(parameters["b"].data, before)


@pytest.mark.parametrize("harm", [foreign, os.remove])
def test_a_damaged_manifest_counts_as_damage(root, harm):
    harm(root / "step-00000002" / "manifest.json")
    assert "manifest.json" in damage(root / "step-00000002")
    assert find_checkpoint(root).name == "step-00000001"


def test_none_whole_is_an_error_and_none_at_all_is_not(root, tmp_path):
    for step in (1, 2):
        cut(root / f"step-0000000{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        find_checkpoint(root)
    assert find_checkpoint(tmp_path / "elsewhere") is None


def test_other_parameters_are_named_and_nothing_is_changed(root):
    path = find_checkpoint(root)
    missing = model(9)
    del missing["b"]
    with pytest.raises(CheckpointError, match="parameter 'b' is not in the model"):
        load_checkpoint(path, missing)
    surplus = model(9) | {"c": Parameter(np.ones(2, np.float32), "c")}
    with pytest.raises(CheckpointError, match=r"parameter 'c' is not in .*model.safetensors"):
        load_checkpoint(path, surplus)
    shaped = model(9) | {"b": Parameter(np.ones(6, np.float32), "b")}
    before = shaped["a.weight"].data.copy()
    with pytest.raises(CheckpointError, match=r"'b' is float32\[5\], expected float32\[6\]"):
        load_checkpoint(path, shaped)
    assert np.array_equal(shaped["a.weight"].data, before)


def test_an_optimizer_of_another_kind_is_refused_naming_the_file(root):
    others = model(9)
    before = others["a.weight"].data.copy()
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: optimizer state '\w+/a.we"):
        load_checkpoint(find_checkpoint(root), others, loopos.SGD(others, momentum=0.9))
    assert np.array_equal(others["a.weight"].data, before)


def test_names_of_files_that_are_no_utf8_come_back(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    save_checkpoint(tmp_path, *trained(), {"step": 1, "run_config": {"output_dir": name}})
    state = load_checkpoint(find_checkpoint(tmp_path), model(9))
    assert state["run_config"]["output_dir"] == name


def test_a_later_format_says_who_wrote_it(root, monkeypatch):
    monkeypatch.setattr("loopos.training.checkpoint.FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"format 1 was written by loopos .* reads format 2"):
        load_checkpoint(root / "step-00000002", model(9))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_older_one(root, monkeypatch, call):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{call}", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(root, *trained(3), {"step": 3})
    monkeypatch.undo()
    assert find_checkpoint(root).name == "step-00000002"
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_prune_keeps_what_it_is_told(root):
    prune(root, [root / "step-00000001"])
    assert [p.name for p in root.iterdir()] == ["step-00000001"]


def test_state_is_plain_json(root):
    state = json.loads((root / "step-00000002" / "state.json").read_text())
    assert state["optimizer_steps"] == 1


def test_prune_leaves_what_is_no_checkpoint_and_clears_what_killed_runs_left(root):
    (root / "step-by-step-notes").mkdir()
    (root / ".step-00000003.1234abcd.tmp").mkdir()
    prune(root, [root / "step-00000002"])
    names = sorted(p.name for p in root.iterdir())
    assert names == ["step-00000002", "step-by-step-notes"]


def test_the_newest_goes_by_number_not_by_name(root):
    # One digit more than names are padded to, and before the other one in the alphabet.
    for step in (99_999_999, 100_000_000):
        save_checkpoint(root, *trained(3), {"step": step})
    assert find_checkpoint(root).name == "step-100000000"
    steps = [int(p.name.removeprefix("step-")) for p in list_checkpoints(root)]
    assert steps == [100_000_000, 99_999_999, 2, 1]


def test_a_full_disk_is_one_sentence_and_the_older_one_stays(root):
    resource = pytest.importorskip("resource")
    large = {"w": Parameter(np.ones((100, 100)), "w")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"step-00000003: cannot be written \("):
            save_checkpoint(root, large, loopos.SGD(large), {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_cannot_be_deleted_is_named(root, monkeypatch):
    def fail(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(OutputError, match=r"step-00000001: cannot be deleted \(Permission denied"):
        prune(root, [root / "step-00000002"])
