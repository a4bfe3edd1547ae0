"""Checkpoints are there whole or not at all, and what is damaged is never read."""

import hashlib
import json
import logging
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import loopos
from loopos.autograd import Parameter
from loopos.errors import CheckpointError, OutputError
from loopos.training.checkpoint import (
    _digest,
    damage,
    find_checkpoint,
    frozen_sha256,
    list_checkpoints,
    load_checkpoint,
    prune,
    recover,
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
    assert np.array_equal(others["a.weight"].data, parameters["a.weight"].data)
    assert np.array_equal(others["b"].data, model(9)["b"].data)  # frozen: as it was
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
    del missing["a.weight"]
    with pytest.raises(CheckpointError, match="parameter 'a.weight' is not in the model"):
        load_checkpoint(path, missing)
    surplus = model(9) | {"c": Parameter(np.ones(2, np.float32), "c")}
    before = surplus["a.weight"].data.copy()
    with pytest.raises(CheckpointError, match=r"parameter 'c' is not in .*model.safetensors"):
        load_checkpoint(path, surplus)
    assert np.array_equal(surplus["a.weight"].data, before)
    shaped = model(9) | {"a.weight": Parameter(np.ones((3, 5), np.float32), "a.weight")}
    message = r"'a.weight' is float32\[3, 4\], expected float32\[3, 5\]"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, shaped)
    typed = model(9) | {"a.weight": Parameter(np.ones((3, 4)), "a.weight")}
    with pytest.raises(CheckpointError, match=r"is float32\[3, 4\], expected float64\[3, 4\]"):
        load_checkpoint(path, typed)


def test_frozen_parameters_are_not_written_whatever_their_size(tmp_path):
    parameters = model(1) | {"base": Parameter(np.ones((1000, 100), np.float32), "base")}
    parameters["base"].requires_grad = False
    optimizer = loopos.AdamW({"a.weight": parameters["a.weight"]})
    path = save_checkpoint(tmp_path, parameters, optimizer, {"step": 1})
    assert list(load_file(path / "model.safetensors")) == ["a.weight"]
    assert sum(file.stat().st_size for file in path.iterdir()) < 2000


def digests(**changes):
    parameters = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2, np.float32)} | changes
    return frozen_sha256({n: Parameter(p, n, requires_grad=False) for n, p in parameters.items()})


def test_one_digest_of_names_dtypes_shapes_and_bytes():
    plain = np.arange(6.0).reshape(2, 3)
    header = [b'["a", "<f8", [2, 3]]', b'["b", "<f4", [2]]']
    expected = header[0] + plain.tobytes() + header[1] + np.ones(2, np.float32).tobytes()
    assert digests() == hashlib.sha256(expected).hexdigest()
    assert digests(a=np.asfortranarray(plain)) == digests(a=plain) == digests()
    others = [plain.reshape(3, 2), plain.astype(np.float32), plain + 1e-15, np.zeros((2, 0))]
    found = {digests(a=array) for array in others} | {digests(c=plain), digests()}
    assert len(found) == 6
    assert frozen_sha256({"a": Parameter(plain, "a")}) is None
    trained = {"c": Parameter(plain, "c"), "b": Parameter(np.ones(2), "b", requires_grad=False)}
    assert frozen_sha256(trained) == frozen_sha256({"b": trained["b"]})


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


def rewrite(path, name, change):
    """Change a JSON file of a checkpoint, and the manifest with it."""
    value = json.loads((path / name).read_text())
    change(value)
    (path / name).write_text(json.dumps(value))
    manifest = json.loads((path / "manifest.json").read_text())
    raw = (path / name).read_bytes()
    manifest[name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_later_format_says_who_wrote_it(root):
    path = root / "step-00000002"
    rewrite(path, "state.json", lambda s: s.update(format=3, loopos_version="9.1"))
    assert damage(path) is None
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model(9))
    assert str(caught.value) == (
        f"{path}/state.json: format 3 was written by loopos 9.1; "
        f"loopos {loopos.__version__} reads formats 1 to 2"
    )


@pytest.mark.parametrize("value", [None, "2", True, 1.5, [2]])
def test_what_has_no_format_is_no_checkpoint(root, value):
    path = root / "step-00000002"
    rewrite(path, "state.json", lambda s: s.update(format=value))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model(9))
    assert str(caught.value) == (
        f"{path}/state.json: has no format number, so it is of no checkpoint of loopos"
    )
    rewrite(path, "state.json", lambda s: s.pop("format"))
    with pytest.raises(CheckpointError, match="has no format number"):
        load_checkpoint(path, model(9))


def test_weights_whose_checksum_fits_but_which_are_none_are_one_sentence(root):
    path = root / "step-00000002"
    (path / "model.safetensors").write_bytes(b"\xff" * 40)
    raw = (path / "model.safetensors").read_bytes()
    digest = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest = json.loads((path / "manifest.json").read_text()) | {"model.safetensors": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read \("):
        load_checkpoint(path, model(9))


NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@given(st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_found(name, place, bit):
    with tempfile.TemporaryDirectory() as directory:
        path = save_checkpoint(directory, *trained(), {"step": 1})
        raw = bytearray((path / name).read_bytes())
        raw[int(place * len(raw))] ^= 1 << bit
        (path / name).write_bytes(raw)
        found = damage(path)
        if name == "manifest.json" and found is None:  # white space, or a digit's name
            assert json.loads(raw) == {n: _digest(path / n) for n in NAMES[:3]}
            return
        assert found is not None
        assert found.startswith(str(path))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, model(9))
        assert str(caught.value) == found


@given(st.sampled_from(NAMES), st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_found(name, place):
    with tempfile.TemporaryDirectory() as directory:
        path = save_checkpoint(directory, *trained(), {"step": 1})
        raw = (path / name).read_bytes()
        kept = raw[: int(place * len(raw))]
        (path / name).write_bytes(kept)
        # Of the manifest alone, the line break at its end may be missed.
        whole = name == "manifest.json" and kept == raw.rstrip()
        assert (damage(path) is None) == whole


def test_files_of_another_checkpoint_are_found(root):
    first, second = root / "step-00000001", root / "step-00000002"
    for name in NAMES:
        kept, other = ((path / name).read_bytes() for path in (second, first))
        if kept == other:  # the optimizer was given the same gradients
            assert name == "optimizer.safetensors"
            continue
        (second / name).write_bytes(other)
        assert damage(second) is not None
        assert find_checkpoint(root) == first
        (second / name).write_bytes(kept)
    assert find_checkpoint(root) == second


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


@pytest.mark.parametrize(
    ("newest", "best", "left"),
    [
        (5, 5, {4, 5}),
        (5, None, {4, 5}),
        (5, 2, {2, 5}),
        (5, 4, {4, 5}),
        (4, 4, {3, 4}),
        (1, 1, {1}),
    ],
)
def test_prune_keeps_the_newest_the_best_and_another(root, newest, best, left):
    """What is newer than the newest is damaged: the run did not continue from it."""
    for step in (3, 4, 5):
        save_checkpoint(root, *trained(3), {"step": step})
    places = [None if step is None else root / f"step-{step:08d}" for step in (newest, best)]
    prune(root, *places)
    assert {int(p.name[5:]) for p in root.iterdir()} == left


def test_state_is_plain_json(root):
    state = json.loads((root / "step-00000002" / "state.json").read_text())
    assert state["optimizer_steps"] == 1


def test_prune_leaves_what_is_no_checkpoint(root):
    (root / "step-by-step-notes").mkdir()
    prune(root, root / "step-00000001")
    names = sorted(p.name for p in root.iterdir())
    assert names == ["step-00000001", "step-by-step-notes"]


def test_what_killed_runs_left_is_cleared_and_nothing_else(root):
    mine = [".step-00000003.tmp", ".step-00000003.1234abcd.tmp.bak", ".notes.1234abcd.tmp"]
    for name in [*mine, ".step-00000003.1234abcd.tmp", ".step-00000002.1234abcd.old.tmp"]:
        (root / name).mkdir()
    recover(root)
    assert sorted(p.name for p in root.iterdir()) == sorted(
        [*mine, "step-00000001", "step-00000002"]
    )


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
    with pytest.raises(OutputError, match=r"step-00000002: cannot be deleted \(Permission denied"):
        prune(root, root / "step-00000001")


@pytest.mark.parametrize("steps", [None, {}, "2", True, -1])
def test_a_state_that_was_written_so_is_still_checked(root, steps):
    from loopos.training.checkpoint import _digest

    path = root / "step-00000002"
    state = json.loads((path / "state.json").read_text()) | {"optimizer_steps": steps}
    (path / "state.json").write_text(json.dumps(state))
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    (path / "manifest.json").write_text(json.dumps({name: _digest(path / name) for name in files}))
    parameters, optimizer = trained(3)
    with pytest.raises(CheckpointError, match=r"state.json: key 'optimizer_steps' is .*, expected"):
        load_checkpoint(path, parameters, optimizer)
