"""The configurations of Llama and its relatives: windows, preferred families, published models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loopos.errors import ModelFormatError
from loopos.models import TransformerConfig, load_config
from loopos.models.families import family_for
from loopos.models.rope import RopeScaling
from loopos.models.transformer import parameter_shapes

FIXTURES = Path(__file__).parent / "fixtures"
GPT2 = TransformerConfig(d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31)
#: What all of them share: here a width that is no multiple of the heads.
DECODER = replace(
    GPT2,
    d_model=14,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm="rms_norm",
    activation="swiglu",
    positions="rope",
    attention_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
)
QWEN2 = replace(DECODER, attention_bias=True)
BERT = replace(
    GPT2, norm_placement="post", causal=False, lm_head=False, token_types=2, embedding_norm=True
)


QWEN_WINDOWS = [
    ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, None),
    ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
    ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, None),
    ({"use_sliding_window": True, "sliding_window": 5}, None),  # from layer 28 on, of 2
    ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
    (
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "layer_types": ["sliding_attention"] * 2,
        },
        5,
    ),
    (
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 2,
        },
        None,
    ),
    ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "refused"),
    ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": None}, "refused"),
]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("change", "window"), QWEN_WINDOWS)
def test_the_window_of_qwen_is_honoured_or_refused(name, change, window, tmp_path):
    with np.load(FIXTURES / f"family_{name}.npz") as file:
        config = json.loads(str(file["config"]))
    for key in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    if window == "refused":
        with pytest.raises(ModelFormatError, match=r"config\.json: key 'max_window_layers' is"):
            load_config(tmp_path)
    else:
        assert load_config(tmp_path).window == window


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({}, 4),
        ({"sliding_window": None}, None),
        ({"sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, 7),
        ({"layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_the_window_of_mistral_is_honoured(change, window, tmp_path):
    with np.load(FIXTURES / "family_mistral.npz") as file:
        config = json.loads(str(file["config"])) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).window == window


def test_the_window_of_mistral_has_a_default(tmp_path):
    with np.load(FIXTURES / "family_mistral.npz") as file:
        config = json.loads(str(file["config"]))
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).window == 4096  # as transformers has it


PREFERRED = [
    (DECODER, "mistral"),  # Llama needs a width that is a multiple of the heads
    (replace(DECODER, d_model=16), "llama"),
    (replace(DECODER, d_model=16, mlp_bias=True), "llama"),
    (replace(DECODER, d_model=16, window=9), "mistral"),
    (replace(DECODER, d_model=16, family="mistral"), "mistral"),
    (replace(QWEN2, d_model=16), "qwen2"),
    (replace(QWEN2, window=9), "qwen2"),
    (replace(DECODER, d_model=16, qk_norm=True), "qwen3"),
    (replace(DECODER, qk_norm=True, window=9, family="llama"), "qwen3"),
    (replace(QWEN2, qk_norm=True), "loopos"),
    (replace(DECODER, qk_norm=True, mlp_bias=True), "loopos"),
    (replace(DECODER, window=9, mlp_bias=True), "loopos"),
    (replace(DECODER, window=9, attention_bias=True, attention_output_bias=True), "loopos"),
    (replace(QWEN2, mlp_bias=True), "loopos"),
    (replace(DECODER, causal=False), "loopos"),
    (replace(GPT2, qk_norm=True), "loopos"),
    (GPT2, "gpt2"),
    (BERT, "bert"),
    (replace(BERT, qk_norm=True), "loopos"),
]


@pytest.mark.parametrize(("config", "name"), PREFERRED)
def test_a_configuration_is_saved_as_a_family_that_expresses_it(config, name):
    assert family_for(config).name == name


def published(model_type, sizes, **others):
    """``config.json`` as such models are published: the keys of transformers 4, in bfloat16."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    values = {"model_type": model_type, "torch_dtype": "bfloat16", "hidden_act": "silu"}
    return values | {"attention_dropout": 0.0} | dict(zip(names, sizes, strict=True)) | others


#: Real models by their published configuration, and how many parameters they have.
PUBLISHED = {
    "SmolLM2-135M": (
        published(
            "llama",
            (49152, 576, 30, 1536, 9, 3, 8192),
            tie_word_embeddings=True,
            rope_theta=100000,
            rope_scaling=None,
            rope_interleaved=False,
            is_llama_config=True,
            pretraining_tp=1,
        ),
        134_515_008,
    ),
    "Llama-3.2-1B": (
        published(
            "llama",
            (128256, 2048, 16, 8192, 32, 8, 131072),
            head_dim=64,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        ),
        1_235_814_400,
    ),
    "Qwen2.5-0.5B": (
        published(
            "qwen2",
            (151936, 896, 24, 4864, 14, 2, 32768),
            tie_word_embeddings=True,
            rope_theta=1000000.0,
            max_window_layers=24,
            sliding_window=32768,
            use_sliding_window=False,
            use_mrope=False,
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        published(
            "qwen3",
            (151936, 1024, 28, 3072, 16, 8, 40960),
            head_dim=128,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_theta=1000000,
            rope_scaling=None,
            max_window_layers=28,
            sliding_window=None,
            use_sliding_window=False,
        ),
        596_049_920,
    ),
    "Mistral-7B-v0.1": (
        published(
            "mistral",
            (32000, 4096, 32, 14336, 32, 8, 32768),
            tie_word_embeddings=False,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        7_241_732_096,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_parameters_that_are_known_of_them(name, tmp_path):
    values, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()) == count
    assert config.rope_theta == values["rope_theta"]
    assert config.window == (4096 if name.startswith("Mistral") else None)
    scaled = RopeScaling("llama3", 32.0, 1.0, 4.0, original_max_seq_len=8192)
    assert config.rope_scaling == (scaled if name.startswith("Llama") else None)
    assert family_for(replace(config, family=None)).name == values["model_type"]
