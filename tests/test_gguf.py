"""Models in GGUF files: parity with what was written, with transformers, and what is refused."""

import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from loopos.data.batch import Batch
from loopos.errors import InputError, LooposError, MissingFileError, ModelFormatError
from loopos.models import TransformerConfig, load_config, load_model
from loopos.models.families import FAMILIES
from loopos.models.gguf_file import GgufFile
from loopos.models.rope import RopeScaling
from loopos.models.transformer import Transformer
from loopos.models.weights import to_hf_tensors

TYPES = gguf.GGMLQuantizationType
#: Hugging Face's names after ``model.layers.N.`` and GGUF's after ``blk.N.``.
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
BODY = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleave(rows, heads):
    """Reorder the rows of each head: 0, half, 1, half + 1, and so on, as llama.cpp stores them."""
    size = len(rows) // heads
    order = []
    for head in range(heads):
        for pair in range(size // 2):
            order += [head * size + pair, head * size + size // 2 + pair]
    return rows[order]


def gguf_tensors(tensors, config, interleaved=True):
    """Return Hugging Face's tensors under GGUF's names, query and key rows reordered."""
    renamed = {}
    for name, array in tensors.items():
        if name in BODY:
            renamed[BODY[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        plain, ending = rest.rsplit(".", 1)
        if interleaved and plain.endswith(("q_proj", "k_proj")):
            heads = config.num_heads if plain.endswith("q_proj") else config.kv_heads
            array = interleave(array, heads)
        renamed[f"blk.{layer}.{LAYER[plain]}.{ending}"] = array
    return renamed


def add_config(writer, config, architecture="llama"):
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if architecture != "llama":
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)


def write_gguf(path, tensors, fill=None, kinds=None, architecture="llama"):
    """Write tensors (by GGUF's names), those in `kinds` quantised; `fill` adds the metadata.

    A value of `kinds` is a type, or a pair of type and raw bytes.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if fill is not None:
        fill(writer)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        elif isinstance(kind, tuple):
            writer.add_tensor(name, kind[1], raw_dtype=kind[0])
        else:
            writer.add_tensor(name, quantize(np.asarray(array, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = TransformerConfig(
    d_model=32, num_heads=4, num_kv_heads=2, num_layers=2, d_ff=64, vocab_size=40, max_seq_len=64,
    norm="rms_norm", norm_eps=1e-5, activation="swiglu", positions="rope", rope_theta=5000.0,
    attention_bias=False, mlp_bias=False, tied=True, family="llama",
)  # fmt: skip
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]


def drawn(config, seed=0):
    """Return a model all of whose parameters differ from those of a fresh one."""
    model = Transformer(config, seed=seed)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters().values():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
    return model


def hf_tensors(model, family="llama"):
    arrays = {name: parameter.data for name, parameter in model.parameters().items()}
    return to_hf_tensors(FAMILIES[family], model.config, arrays, "model.")


def written(path, model, fill=None, kinds=None, drop=(), extra=None):
    """Write a Llama as a GGUF file."""
    tensors = gguf_tensors(hf_tensors(model), model.config)
    tensors = {n: a for n, a in tensors.items() if n not in drop} | (extra or {})

    def metadata(writer):
        add_config(writer, model.config)
        if fill is not None:
            fill(writer)

    return write_gguf(path, tensors, metadata, kinds)


def equal(model, other):
    ours, theirs = model.parameters(), other.parameters()
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert np.array_equal(parameter.data, theirs[name].data), name


def logits(model):
    return model.forward(Batch.from_sequences(SEQUENCES)).data


# -- what is written is what is read ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ],
    ids=["tied", "head", "every key", "one key", "biases"],
)
def test_a_float_file_gives_the_same_parameters_and_configuration(tmp_path, changes, dtype):
    model = drawn(replace(LLAMA, **changes))
    path = written(tmp_path / "m.gguf", model)
    read = load_model(path, dtype)
    assert read.dtype == dtype
    assert read.config == model.config
    assert load_config(str(path)) == model.config
    equal(read, model)


def test_the_rows_of_queries_and_keys_matter(tmp_path):
    model = drawn(LLAMA)
    names = gguf_tensors(hf_tensors(model), LLAMA, interleaved=False)
    path = write_gguf(tmp_path / "m.gguf", names, lambda w: add_config(w, LLAMA))
    assert np.abs(logits(load_model(path)) - logits(model)).max() > 0.1


QUANTISED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_are_those_that_the_library_gives(tmp_path, kind):
    model, kind = drawn(LLAMA), TYPES[kind]
    tensors = gguf_tensors(hf_tensors(model), LLAMA)
    kinds = {name: kind for name, array in tensors.items() if array.ndim == 2}
    read = load_model(written(tmp_path / "m.gguf", model, kinds=kinds))
    for name, array in hf_tensors(read).items():
        source = hf_tensors(model)[name]
        if array.ndim == 2:  # quantised by rows, so the order of rows does not matter to it
            expected = dequantize(quantize(source, kind), kind).reshape(source.shape)
            assert not np.array_equal(expected, source)
            assert np.abs(expected - source).max() < 0.2
            source = expected
        assert np.array_equal(array, source), name


def blocks(kind, count, seed=0):
    """Return random bytes that are blocks of a type whose scales are finite float16 numbers."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    scale = rng.standard_normal((count, 2)).astype("<f2").view(np.uint8)
    where = {"Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210), "Q2_K": (80, 84),
             "Q3_K": (108, 110)}[kind.name]  # fmt: skip
    raw[:, slice(*where)] = scale[:, : where[1] - where[0]]
    return raw


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K"])
def test_blocks_of_256_are_those_that_the_library_gives(tmp_path, kind):
    kind = TYPES[kind]
    model = drawn(replace(LLAMA, d_ff=256, num_layers=1))
    raw = blocks(kind, 32)  # ffn_down: 32 rows of 256
    path = written(tmp_path / "m.gguf", model, kinds={"blk.0.ffn_down.weight": (kind, raw)})
    found = load_model(path).parameters()["layers.0.mlp.down.weight"].data
    expected = dequantize(raw, kind)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 1
    assert np.array_equal(found, expected)


def test_a_tensor_read_in_parts_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("loopos.models.gguf_file._CHUNK", 100)  # three rows of 32 at a time
    model = drawn(LLAMA)
    equal(load_model(written(tmp_path / "m.gguf", model)), model)


def test_the_header_is_read_as_the_library_reads_it(tmp_path):
    def fill(writer):
        writer.add_array("a.numbers", [1, -2, 3])
        writer.add_array("a.floats", [0.5, 1.5])
        writer.add_array("a.words", ["x", "", "naïve"])
        writer.add_bool("a.true", True)
        writer.add_float64("a.double", 0.1)
        writer.add_int8("a.small", -3)
        writer.add_uint64("a.large", 2**40)

    path = written(tmp_path / "m.gguf", drawn(LLAMA), fill)
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, value in file.metadata.items():
        found = value.tolist() if isinstance(value, np.ndarray) else value
        expected = fields[key]
        if key.endswith("epsilon"):  # read as the shortest decimal of the same float32
            found, expected = np.float32(found), np.float32(expected)
        assert found == expected, key
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors} == {
        name: file.shape(name) for name in file.names
    }


# -- beside transformers ---------------------------------------------------------------------------


def torch_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([s])).logits[0].numpy() for s in SEQUENCES]
    return np.concatenate(found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_one_that_transformers_loads(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    model = drawn(replace(LLAMA, tied=tied))

    def ids(writer):
        writer.add_bos_token_id(7)
        writer.add_eos_token_id(8)

    read = load_model(written(tmp_path / "m.gguf", model, ids))
    read.save(tmp_path / "saved")
    other, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(other).__name__ == "LlamaForCausalLM"
    assert (other.config.bos_token_id, other.config.eos_token_id) == (7, 8)
    assert other.config.tie_word_embeddings == tied
    ours = logits(model)
    assert np.abs(torch_logits(other) - ours).max() <= 1e-5 * np.abs(ours).max()
    again = load_model(tmp_path / "saved")
    equal(again, model)
    assert again.config == model.config


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_other_architectures_come_with_their_families(tmp_path, name):
    """The file is written from what transformers' own model holds."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    other = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tensors = {key: value.numpy() for key, value in other.state_dict().items()}
    ours = replace(LLAMA, norm_eps=1e-6, rope_theta=10000.0)
    path = write_gguf(
        tmp_path / "m.gguf", gguf_tensors(tensors, ours, interleaved=False),
        lambda w: add_config(w, ours, name), architecture=name,
    )  # fmt: skip
    expected = torch_logits(other)
    found = logits(load_model(path))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# -- what is refused -------------------------------------------------------------------------------


def refused(path, *words, error=ModelFormatError, read=load_model):
    """Assert one sentence that names the file and holds the words."""
    with pytest.raises(error) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), ["rope_scaling", "yarn"]),
        (lambda w: w.add_expert_count(8), ["'llama.expert_count' is 8"]),
        (
            lambda w: w.add_array("llama.expert_count", [0, 0]),
            ["'llama.expert_count' is an array of 2"],
        ),
        (lambda w: w.add_sliding_window(16), ["'llama.attention.sliding_window' is 16"]),
        (lambda w: w.add_uint32("llama.block_cuont", 2), ["block_cuont", "mean 'block_count'"]),
        (lambda w: w.add_value_length(4), ["'llama.attention.value_length' is 4", "8"]),
        (lambda w: w.add_uint16("split.count", 3), ["one of 3 parts"]),
        (lambda w: w.add_key_length(7), ["rope.dimension_count", "7"]),
    ],
)
def test_what_is_not_computed_is_refused_by_key(tmp_path, fill, words):
    model = drawn(LLAMA)
    refused(written(tmp_path / "m.gguf", model, fill), *words)


def test_keys_that_change_nothing_are_taken(tmp_path):
    def fill(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_expert_count(0)
        writer.add_vocab_size(40)

    model = drawn(LLAMA)
    equal(load_model(written(tmp_path / "m.gguf", model, fill)), model)


def test_scaled_frequencies_of_llama_3_are_never_ignored(tmp_path):
    model = drawn(LLAMA)
    ones = {"rope_freqs.weight": np.ones(4)}
    equal(load_model(written(tmp_path / "ones.gguf", model, extra=ones)), model)
    any_ = {"rope_freqs.weight": np.array([1, 1, 2, 3])}
    refused(written(tmp_path / "any.gguf", model, extra=any_), "rope_freqs.weight")
    model = drawn(replace(LLAMA, rope_theta=4e5))
    factors = []  # as llama.cpp's conversion computes them, from Llama 3.2's numbers
    for pair in range(4):
        length = 2 * np.pi * 4e5 ** (2 * pair / 8)
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        inside = 1 / ((1 - smooth) / 32.0 + smooth)
        factors.append(1.0 if length < 8192 / 4 else 32.0 if length > 8192 else inside)
    assert factors[0] == 1 < factors[2] < 32 == factors[3]  # all of the formula is used
    path = written(tmp_path / "three.gguf", model, extra={"rope_freqs.weight": np.array(factors)})
    scaling = load_config(path).rope_scaling
    assert scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_a_linear_factor_is_computed(tmp_path):
    path = written(tmp_path / "m.gguf", drawn(LLAMA), lambda w: w.add_rope_scaling_factor(4.0))
    assert load_config(path).rope_scaling == RopeScaling("linear", 4.0)


def test_architectures_and_libraries_that_are_not_there_are_named(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", {}, architecture="lama")
    refused(path, "'general.architecture' is 'lama'", "llama, qwen2, qwen3", "mean 'llama'")
    refused(tmp_path / "n.gguf", "no such file", "mean 'm.gguf'", error=MissingFileError)
    path = written(tmp_path / "whole.gguf", drawn(LLAMA))
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(path, "pip install 'loopos[gguf]'", error=InputError)
    assert load_config(path) == LLAMA  # which needs no library


@pytest.mark.parametrize(
    ("drop", "extra", "words"),
    [
        (["blk.1.ffn_up.weight"], {}, ["'blk.1.ffn_up.weight' is missing", "mean 'blk."]),
        (["token_embd.weight"], {}, ["'token_embd.weight' is missing"]),
        ([], {"blk.1.ffn_upp.weight": np.ones(3)}, ["'blk.1.ffn_upp.weight'", "ffn_up.weight'"]),
        ([], {"blk.2.ffn_up.weight": np.ones(3)}, ["unexpected", "with 2 layers"]),
        (["output_norm.weight"], {"output_norm.weight": np.ones(5)}, ["shape [5]", "[32]"]),
        (["output_norm.weight"], {"output_norm.weight": np.full(32, np.nan)}, ["nan at [0]"]),
        (["output_norm.weight"], {"output_norm.weight": np.full(32, np.inf)}, ["inf at [0]"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, drop, extra, words):
    path = written(tmp_path / "m.gguf", drawn(LLAMA), drop=drop, extra=extra)
    refused(path, *words)


def test_types_that_are_not_read_are_named_with_the_tensor(tmp_path):
    raw = np.zeros((64, 18), np.uint8)
    kinds = {"blk.0.ffn_up.weight": (TYPES.IQ4_NL, raw)}
    path = written(tmp_path / "m.gguf", drawn(LLAMA), kinds=kinds)
    refused(path, "'blk.0.ffn_up.weight' is of type IQ4_NL", "Q4_K")


def test_a_nan_in_a_quantised_scale_is_refused(tmp_path):
    raw = quantize(np.ones((64, 32), np.float32), TYPES.Q8_0)
    raw[5, :2] = np.array([np.nan], "<f2").view(np.uint8)
    kinds = {"blk.0.ffn_up.weight": (TYPES.Q8_0, raw)}
    path = written(tmp_path / "m.gguf", drawn(LLAMA), kinds=kinds)
    refused(path, "'blk.0.ffn_up.weight' is nan at [5, 0]")


def test_a_directory_that_holds_only_a_gguf_file_says_so(tmp_path):
    written(tmp_path / "m.gguf", drawn(LLAMA))
    with pytest.raises(MissingFileError, match=r"to read m.gguf, give the path of that file"):
        load_model(tmp_path)


# -- damaged and hostile files ---------------------------------------------------------------------


def test_more_layers_than_tensors_are_refused_before_they_are_listed(tmp_path):
    tensors = gguf_tensors(hf_tensors(drawn(LLAMA)), LLAMA)
    path = write_gguf(tmp_path / "m.gguf", tensors, lambda w: add_config(w, replace(LLAMA,
        num_layers=9000)))  # fmt: skip
    refused(path, "'llama.block_count' is 9000", "20 tensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = written(tmp_path_factory.mktemp("gguf") / "m.gguf", drawn(LLAMA))
    return path.read_bytes()


@settings(max_examples=150)
@given(st.data())
def test_a_changed_or_cut_file_is_read_or_refused(tmp_path_factory, whole, data):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            where = data.draw(st.integers(0, min(len(changed), 2500) - 1))
            changed[where] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(changed))
    try:
        model = load_model(path)
    except LooposError as error:
        named = str(error).startswith(f"{path}: ")
    else:
        named = all(np.isfinite(p.data).all() for p in model.parameters().values())
    assert named


def test_a_cut_file_is_always_refused(tmp_path, whole):
    path = tmp_path / "m.gguf"
    for size in range(0, len(whole) - 32, 97):  # the file may end with padding
        path.write_bytes(whole[:size])
        refused(path)
