"""Rotary frequencies, plain and scaled, and the keys of files that describe them."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from loopos.config import load_config as load_run_config
from loopos.errors import ConfigError, InputError, ModelFormatError
from loopos.models import Transformer, TransformerConfig, load_config, load_model
from loopos.models.rope import RopeScaling, inverse_frequencies
from loopos.runner import run

FIXTURES = Path(__file__).parent / "fixtures"
LINEAR = RopeScaling("linear", 4.0)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=64)
#: Of a head of 12 and theta 10000, as transformers computes it with the scaling LLAMA3 in float32.
GOLDEN = [1.0, 0.10198934, 0.0058019855, 0.00125, 0.00026930429, 5.8019868e-05]

CONFIG = TransformerConfig(
    d_model=12,
    num_heads=2,
    num_layers=1,
    d_ff=8,
    vocab_size=31,
    norm="rms_norm",
    activation="swiglu",
    positions="rope",
    attention_bias=False,
    mlp_bias=False,
    rope_scaling=LLAMA3,
)


def test_plain_frequencies_fall_by_one_ratio_and_linear_scaling_divides_them():
    plain = inverse_frequencies(8, 10000.0)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-14)
    np.testing.assert_array_equal(inverse_frequencies(8, 10000.0, LINEAR), plain / 4)


def test_llama3_keeps_fast_waves_divides_slow_ones_and_goes_over_in_between():
    plain = inverse_frequencies(12, 10000.0)
    found = inverse_frequencies(12, 10000.0, LLAMA3)
    np.testing.assert_allclose(found, GOLDEN, rtol=2e-7)
    assert found[0] == plain[0]  # a wave of 6.3 tokens; those below 64 / 4 are fast
    assert plain[1] / 8 < found[1] < plain[1]  # 29 tokens
    np.testing.assert_array_equal(found[2:], plain[2:] / 8)  # 135 and more; above 64 are slow
    waves = 2 * np.pi / inverse_frequencies(128, 500000.0)
    ratio = inverse_frequencies(128, 500000.0, replace(LLAMA3, original_max_seq_len=8192))
    ratio *= waves / (2 * np.pi)
    assert np.all(np.diff(ratio) <= 1e-15)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(1 / 8)


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.5},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


@pytest.mark.parametrize("keys", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 500000.0), (10, 10000.0), (128, 77.0)])
def test_frequencies_are_those_of_transformers(keys, head_dim, theta, tmp_path):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": head_dim}
    sizes |= {"max_position_embeddings": 131072, "rope_parameters": keys | {"rope_theta": theta}}
    config = transformers.LlamaConfig(**sizes)
    config.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    found = inverse_frequencies(head_dim, ours.rope_theta, ours.rope_scaling)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


WRONG = [
    ({"kind": "yarn"}, "rope_scaling.kind is 'yarn', expected one of linear, llama3"),
    ({"kind": "lama3"}, r"rope_scaling\.kind is 'lama3'.*did you mean 'llama3'\?"),
    ({"factor": 0.5}, r"rope_scaling\.factor is 0\.5, expected a finite number of at least 1"),
    ({"factor": float("inf")}, "factor is inf"),
    ({"factor": True}, "factor is True"),
    ({"factor": "8"}, "factor is '8'"),
    ({"low_freq_factor": None}, "low_freq_factor is None"),
    ({"low_freq_factor": 0}, "low_freq_factor is 0.0, expected more than 0 and less than"),
    ({"low_freq_factor": 4.0}, r"less than high_freq_factor, which is 4\.0"),
    ({"high_freq_factor": "4"}, "high_freq_factor is '4'"),
    ({"original_max_seq_len": None}, "original_max_seq_len is None, expected a whole number"),
    ({"original_max_seq_len": 64.0}, r"original_max_seq_len is 64\.0"),
    ({"kind": "linear"}, r"rope_scaling\.low_freq_factor belongs to kind 'llama3', not 'linear'"),
    ({"facter": 2.0}, "rope_scaling has the unknown key 'facter'; did you mean 'factor'"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_a_wrong_scaling_names_its_key(change, text):
    with pytest.raises(ConfigError, match=text):
        replace(CONFIG, rope_scaling=asdict(LLAMA3) | change)


def test_a_scaling_without_kind_or_factor_is_refused():
    with pytest.raises(ConfigError, match="rope_scaling has no key 'kind'"):
        RopeScaling.from_dict({"factor": 2.0})
    with pytest.raises(ConfigError, match="rope_scaling has no key 'factor'"):
        RopeScaling.from_dict({"kind": "linear"})


def test_a_scaling_survives_json_and_counts_in_equality():
    values = json.loads(json.dumps(asdict(CONFIG)))
    assert values["rope_scaling"]["kind"] == "llama3"
    again = TransformerConfig.from_dict(values)
    assert again == CONFIG
    assert hash(again) == hash(CONFIG)
    assert isinstance(again.rope_scaling, RopeScaling)
    assert replace(CONFIG, rope_scaling=LINEAR) != CONFIG
    assert replace(CONFIG, rope_scaling=None) != CONFIG


# -- the keys of config.json -----------------------------------------------------------------------

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = {"original_max_position_embeddings": 64}
READ = [
    ({"rope_parameters": None}, 10000.0, None),
    ({"rope_parameters": {}, "rope_scaling": {}}, 10000.0, None),
    ({"rope_parameters": None, "rope_theta": 500.0}, 500.0, None),
    ({"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": None}, 500.0, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0, None),
    ({"rope_parameters": {"rope_theta": 9.0}, "rope_theta": 9.0}, 9.0, None),
    ({"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0}}, 9.0, None),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}}, 1e4, LINEAR),
    (
        {"rope_parameters": None, "rope_theta": 9.0}
        | {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
        9.0,
        LINEAR,
    ),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
    ({"rope_parameters": SCALED | LENGTH | {"rope_theta": 9.0}}, 9.0, LLAMA3),
    ({"rope_parameters": None, "rope_scaling": SCALED | LENGTH}, 1e4, LLAMA3),
    ({"rope_parameters": SCALED | LENGTH, "rope_scaling": SCALED | LENGTH}, 1e4, LLAMA3),
    ({"rope_parameters": SCALED, "max_position_embeddings": 64}, 1e4, LLAMA3),
    ({"rope_parameters": SCALED | {"original_max_position_embeddings": 8}} | LENGTH, 1e4, LLAMA3),
]


@pytest.fixture
def directory(tmp_path):
    """Return a function that writes Llama's ``config.json`` with some keys changed."""

    def write(change):
        with np.load(FIXTURES / "family_llama.npz") as file:
            config = json.loads(str(file["config"])) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize(("change", "theta", "scaling"), READ)
def test_old_and_new_keys_are_read(change, theta, scaling, directory):
    config = load_config(directory(change))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


OLD = {"rope_parameters": None}
REFUSED = [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "has rope_type 'yarn', which"),
    (OLD | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "has rope_type 'dynamic', which"),
    ({"rope_parameters": {"rope_type": "longrope"}}, r"'longrope'.*computes default, linear, lla"),
    ({"rope_parameters": {"rope_type": ["linear"]}}, r"has rope_type \['linear'\]"),
    (OLD | {"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "has rope_type 'mrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "of rope_type 'linear' has no 'factor'"),
    ({"rope_parameters": LENGTH | {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
    ({"rope_parameters": {"factor": 2.0}}, "of rope_type 'default' has 'factor' 2.0, which"),
    ({"rope_parameters": SCALED | {"attention_factor": 2.0}}, "has 'attention_factor' 2.0, which"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has 'partial_rotary_factor' 0.5, which"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5, expected"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "has 'full_attention'"),
    ({"rope_parameters": "default"}, "is 'default', expected an object"),
    ({"rope_theta": 77.0}, "'rope_theta' 77.0 and 'rope_parameters' .* disagree"),
    (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "'rope_parameters' .* and 'rope_scaling' .* disagree",
    ),
]


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(change, text, directory):
    with pytest.raises(ModelFormatError, match=rf"config\.json: key.*{text}") as error:
        load_config(directory(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3])
def test_a_scaling_is_written_for_transformers_4_and_5(scaling, tmp_path):
    Transformer(replace(CONFIG, rope_scaling=scaling, rope_theta=500.0)).save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    old, new = values["rope_scaling"], values["rope_parameters"]
    assert values["rope_theta"] == 500.0
    assert new == old | {"rope_theta": 500.0}
    expected = {"rope_type": "linear", "factor": 4.0} if scaling is LINEAR else SCALED | LENGTH
    assert old == expected


def test_another_scaling_is_written_over_the_loaded_one(directory, tmp_path):
    Transformer(replace(CONFIG, family="llama")).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LENGTH))
    for scaling in (LINEAR, replace(LLAMA3, original_max_seq_len=32), None):
        model = load_model(tmp_path)
        model.config = replace(model.config, rope_scaling=scaling)
        model.save(tmp_path)
        assert load_config(tmp_path) == model.config


# -- the configuration of a run --------------------------------------------------------------------

RUN = {
    "model": {
        "d_model": 12,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 8,
        "vocab_size": 300,
        "positions": "rope",
        "qk_norm": True,
        "rope_scaling": {"kind": "linear", "factor": 4.0},
    },
    "computation": {"mode": "pretraining", "method": "autoregressive", "backend": "numpy"},
    "training": {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 1},
    "data": {"training_data": "t.txt", "validation_fraction": 0, "output_dir": "out"},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes a run's configuration and data."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("one two three four five six seven\n" * 20, encoding="utf-8")

    def write(**sections):
        values = copy.deepcopy(RUN)
        for section, change in sections.items():
            values[section] |= change
        Path("run.json").write_text(json.dumps(values, indent=1))
        return load_run_config("run.json")

    return write


def test_a_scaling_of_the_model_section_is_trained_with_and_found_again(written):
    config = written()
    assert config.as_dict()["model"]["rope_scaling"] == asdict(LINEAR)
    run(config)
    found = load_config("out/model")
    assert found.rope_scaling == LINEAR
    assert found.qk_norm
    data = {"pretrained_weights": "out/model", "output_dir": "again"}
    run(written(data=data))
    other = {"rope_scaling": {"kind": "linear", "factor": 2.0}}
    with pytest.raises(InputError, match=r"run\.json:\d+: model\.rope_scaling: .*factor=2\.0"):
        run(written(model=other, data=data | {"output_dir": "third"}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("linear", 'expected an object or null, found "linear"'),
        ({"kind": "linear", "factor": 0}, "rope_scaling.factor is 0, expected a finite number"),
        ({"kind": "liner", "factor": 2}, "did you mean 'linear'"),
        ({"kind": "linear", "faktor": 2}, "unknown key 'faktor'; did you mean 'factor'"),
    ],
)
def test_a_wrong_scaling_of_the_model_section_names_line_and_key(written, value, text):
    with pytest.raises(ConfigError) as caught:
        written(model={"rope_scaling": value})
    assert str(caught.value).startswith("run.json:10: model.rope_scaling: ")
    assert text in str(caught.value)
