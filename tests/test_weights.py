"""Strictness of model directories: one sentence naming the file and the tensor."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from loopos.data.batch import Batch
from loopos.errors import (
    InputError,
    MissingFileError,
    ModelFormatError,
    NumericalError,
    OutputError,
)
from loopos.models import Transformer, TransformerConfig, load_model
from loopos.models.tensor_file import TensorFile, write_tensors

CONFIG = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=16
)
BATCH = Batch.from_sequences([[1, 2, 3, 4], [5, 6]])


@pytest.fixture
def saved(tmp_path):
    """A small GPT-2 directory, and what it holds."""
    model = Transformer(CONFIG, seed=1)
    model.save(tmp_path)
    return tmp_path, safetensors.numpy.load_file(tmp_path / "model.safetensors")


def rewrite(directory, tensors):
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def message(directory, error=ModelFormatError):
    with pytest.raises(error) as caught:
        load_model(directory)
    text = str(caught.value)
    assert "\n" not in text
    assert str(directory) in text
    return text


def test_a_missing_tensor_is_named(saved):
    directory, tensors = saved
    del tensors["transformer.h.1.ln_1.bias"]
    rewrite(directory, tensors)
    text = message(directory)
    assert "tensor 'transformer.h.1.ln_1.bias' is missing; did you mean" in text


def test_an_unexpected_tensor_is_named(saved):
    directory, tensors = saved
    rewrite(directory, tensors | {"transformer.h.2.ln_1.bias": np.zeros(12, np.float32)})
    text = message(directory)
    assert "unexpected tensor 'transformer.h.2.ln_1.bias'" in text
    assert "did you mean 'h." in text


def test_a_wrong_shape_is_named(saved):
    directory, tensors = saved
    name = "transformer.h.0.attn.c_attn.weight"
    rewrite(directory, tensors | {name: np.ascontiguousarray(tensors[name].T)})
    assert f"tensor '{name}' has shape [36, 12], expected [12, 36]" in message(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_named(saved, value):
    directory, tensors = saved
    tensors["transformer.wpe.weight"][3, 7] = value
    rewrite(directory, tensors)
    assert f"'transformer.wpe.weight' is {value} at [3, 7]" in message(directory)


def test_a_float64_too_large_for_float32_is_refused(saved):
    directory, tensors = saved
    large = tensors["transformer.wpe.weight"].astype(np.float64)
    large[0, 0] = 1e300
    rewrite(directory, tensors | {"transformer.wpe.weight": large})
    assert "is inf at [0, 0] (as float32)" in message(directory)
    exact = load_model(directory, "float64").parameters()["embeddings.positions"].data
    assert exact[0, 0] == 1e300


def test_integers_are_refused(saved):
    directory, tensors = saved
    rewrite(directory, tensors | {"transformer.ln_f.bias": np.zeros(12, np.int32)})
    assert "tensor 'transformer.ln_f.bias' is I32, expected one of F64, F32, F16" in message(
        directory
    )


@pytest.mark.parametrize("keep", [0, 5, 40, 3000, -1])
def test_a_truncated_file_is_refused(saved, keep):
    directory, _ = saved
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    text = message(directory)
    assert "cut off" in text
    assert "model.safetensors" in text


def test_a_file_that_is_something_else_is_refused(saved):
    directory, _ = saved
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\x00\x01")
    assert "not a safetensors file" in message(directory)
    path.write_bytes(struct.pack("<Q", 6) + b"[1, 2]")
    assert "not a safetensors file" in message(directory)
    bad = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(bad)) + bad + bytes(8))
    assert "tensor 'a' has 4 bytes for shape [2]" in message(directory)
    for entry in (b"null", b'{"dtype":[],"shape":[],"data_offsets":[0,0]}', b'{"dtype":"F32"}'):
        bad = b'{"a":' + entry + b"}"
        path.write_bytes(struct.pack("<Q", len(bad)) + bad)
        assert "header entry of tensor 'a' is damaged" in message(directory)


def test_missing_files_are_named(saved, tmp_path):
    directory, _ = saved
    assert "no such directory" in message(tmp_path / "nothing", MissingFileError)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nothing")
    (directory / "model.safetensors").unlink()
    assert message(directory, MissingFileError).endswith("holds no model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin is a pickle" in message(directory, MissingFileError)
    (directory / "config.json").unlink()
    assert "holds no config.json" in message(directory, MissingFileError)


def test_an_unknown_model_type_names_the_nearest(saved):
    directory, _ = saved
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt3"}))
    text = message(directory)
    known = "gpt2, llama, qwen2, qwen3, mistral, bert, loopos"
    assert f"'gpt3', expected one of {known}; did you mean 'gpt2'?" in text


def test_wrong_configurations_name_file_and_key(saved):
    directory, _ = saved
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"n_embd": None}))
    assert "config.json: key 'n_embd' is missing" in message(directory)
    path.write_text(json.dumps(values | {"n_layer": "2"}))
    assert "config.json: num_layers is '2', expected a whole number" in message(directory)
    path.write_text('{"model_type": "gpt2",\n')
    assert "config.json:2: not valid JSON" in message(directory)
    own = {"model_type": "loopos", "d_model": 12, "num_head": 3}
    path.write_text(json.dumps(own))
    assert "config.json: unknown key 'num_head'; did you mean 'num_heads'?" in message(directory)


def bf16(array):
    """Round to the nearest bfloat16; the bits as uint16."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["F64", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_floats_are_converted(saved, kind, dtype):
    directory, tensors = saved
    if kind == "BF16":
        raw = {name: bf16(array) for name, array in tensors.items()}
        expected = {k: (a.astype(np.uint32) << 16).view(np.float32) for k, a in raw.items()}
        # bfloat16 has no NumPy dtype: the header is written as uint16 and renamed.
        data = safetensors.numpy.save(raw, {"format": "pt"}).replace(b'"U16"', b'"BF16"')
        header = struct.unpack("<Q", data[:8])[0]
        grown = len(data) - len(safetensors.numpy.save(raw, {"format": "pt"}))
        data = struct.pack("<Q", header + grown) + data[8:]
        (directory / "model.safetensors").write_bytes(data)
    else:
        numpy_kind = {"F64": np.float64, "F16": np.float16}[kind]
        raw = expected = {name: array.astype(numpy_kind) for name, array in tensors.items()}
        rewrite(directory, raw)
    model = load_model(directory, dtype)
    table = model.parameters()["embeddings.tokens"].data
    assert table.dtype == dtype
    np.testing.assert_array_equal(table, expected["transformer.wte.weight"].astype(dtype))


def test_bfloat16_as_torch_writes_it(saved):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    directory, tensors = saved
    halves = {name: torch.from_numpy(a).to(torch.bfloat16) for name, a in tensors.items()}
    safetensors_torch.save_file(halves, directory / "model.safetensors", {"format": "pt"})
    found = load_model(directory).parameters()["embeddings.tokens"].data
    np.testing.assert_array_equal(found, halves["transformer.wte.weight"].float().numpy())


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(InputError, match="dtype is 'float16', expected one of float32, float64"):
        load_model(saved[0], "float16")


def test_shards_are_read_by_their_index(saved):
    directory, tensors = saved
    whole = load_model(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == file}
        safetensors.numpy.save_file(part, directory / file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name, parameter in load_model(directory).parameters().items():
        np.testing.assert_array_equal(parameter.data, whole.parameters()[name].data)
    moved = places | {names[0]: places[names[1]]}
    index.write_text(json.dumps({"weight_map": moved}))
    assert f"tensor '{names[0]}' is missing" in message(directory)
    index.write_text(json.dumps({"weight_map": {n: f for n, f in places.items() if n != names[0]}}))
    assert f"unexpected tensor '{names[0]}'" in message(directory)
    index.write_text("{}")
    assert "expected an object 'weight_map'" in message(directory)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "transposed": rng.standard_normal((4, 7)).T,
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = safetensors.numpy.load_file(tmp_path / "t.safetensors")
    file = TensorFile(tmp_path / "t.safetensors")
    header = struct.unpack("<Q", (tmp_path / "t.safetensors").read_bytes()[:8])[0]
    assert header % 8 == 0  # so that arrays can be mapped aligned
    assert file.names == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(file.read(name, array.dtype), array)


def test_saving_leaves_other_files_and_replaces_the_model(saved):
    directory, _ = saved
    (directory / "notes.txt").write_text("mine")
    other = Transformer(CONFIG, seed=2)
    other.save(directory)
    assert (directory / "notes.txt").read_text() == "mine"
    found = load_model(directory).forward(BATCH).data
    np.testing.assert_array_equal(found, other.forward(BATCH).data)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt"]


def test_weights_that_are_not_finite_are_not_saved(saved):
    directory, _ = saved
    before = (directory / "model.safetensors").read_bytes()
    model = Transformer(CONFIG)
    model.parameters()["final_norm.bias"].data[2] = np.nan
    with pytest.raises(NumericalError, match=r"parameter 'final_norm\.bias' is not finite"):
        model.save(directory)
    assert (directory / "model.safetensors").read_bytes() == before


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written") as caught:
        Transformer(CONFIG).save(tmp_path / "file" / "model")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_float64_is_saved_as_float64(tmp_path):
    model = Transformer(CONFIG, seed=4, dtype=np.float64)
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    again = load_model(tmp_path, "float64")
    np.testing.assert_array_equal(again.forward(BATCH).data, model.forward(BATCH).data)


def test_a_tokenizer_is_saved_beside_and_its_end_token_written(tmp_path):
    class Words:
        eos_id = 7

        def save(self, directory):
            (directory / "tokenizer.json").write_text("{}")

    Transformer(CONFIG).save(tmp_path, Words())
    assert (tmp_path / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    "header", [b"[" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b'{"a\\n": {}}']
)
def test_headers_that_python_cannot_read_are_no_safetensors(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelFormatError, match=r"header is not JSON|unprintable characters"):
        TensorFile(path)


def test_names_that_no_file_system_holds_are_names_of_nothing(tmp_path):
    for name in ("x" * 5000, str(tmp_path / ("x" * 400)), Path("org/" + "x" * 400)):
        with pytest.raises(MissingFileError, match="no such (path|directory)"):
            load_model(name)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        TensorFile(tmp_path / ("x" * 400))
