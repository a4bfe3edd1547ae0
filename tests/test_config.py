"""Configurations: what is accepted, what is refused, and the whole sentence that says why."""

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loopos.config import Data, RunConfig, load_config, shipped_configs
from loopos.errors import ConfigError, MissingFileError
from loopos.methods import METHODS

#: The seed's three files, as its users have them (sizes, keys, spelling).
SEED = {
    "fine_tuning": {
        "model": {"type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 4,
                  "d_ff": 1536, "vocab_size": 16000, "num_classes": 10},
        "computation": {"mode": "posttraining", "method": "fine_tuning", "description": "..."},
        "training": {"learning_rate": 0.00001, "batch_size": 16, "prefetch_batches": 2,
                     "num_workers": 2, "shuffle": True, "num_epochs": 5},
        "data": {"pretrained_weights": "...", "training_data": "data/train.jsonl",
                 "output_dir": "outputs/fine_tuned"},
    },
    "chain_of_thought": {
        "model": {"type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 6,
                  "d_ff": 1536, "vocab_size": 16000},
        "computation": {"mode": "posttraining", "method": "chain_of_thought", "description": "..."},
        "training": {"learning_rate": 0.00001, "batch_size": 16, "prefetch_batches": 2,
                     "num_workers": 2, "shuffle": True, "num_epochs": 3},
        "data": {"pretrained_weights": "...", "reasoning_examples": "data/train.jsonl",
                 "output_dir": "outputs/cot"},
    },
    "rlhf_training": {
        "model": {"type": "transformer", "d_model": 384, "num_heads": 8, "num_layers": 6,
                  "d_ff": 1536, "vocab_size": 16000},
        "computation": {"mode": "posttraining", "method": "rlhf", "description": "..."},
        "training": {"learning_rate": 0.000001, "clip_epsilon": 0.2, "kl_coefficient": 0.1,
                     "batch_size": 8, "num_epochs": 1},
        "data": {"pretrained_weights": "...", "preference_data": "data/train.jsonl",
                 "output_dir": "outputs/rlhf"},
    },
}  # fmt: skip

#: Every key of the contract with a valid value that is not its default.
KEYS = {
    "model": {
        "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "num_layers": 1,
        "d_ff": 32, "vocab_size": 300, "max_seq_len": 64, "num_classes": 2, "norm": "rms_norm",
        "activation": "swiglu", "positions": "rope", "dropout": 0.1,
    },
    "computation": {
        "mode": "posttraining", "method": "fine_tuning", "description": "mine",
        "backend": "numpy", "num_threads": 1, "seed": 7,
    },
    "training": {
        "learning_rate": 1e-3, "batch_size": 4, "batch_tokens": 64, "num_epochs": 2,
        "max_steps": 3, "optimizer": "sgd", "weight_decay": 0.1, "scheduler": "cosine",
        "warmup_steps": 1, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2,
        "shuffle": False, "prefetch_batches": 1, "num_workers": 1, "eval_steps": 2,
        "early_stopping_patience": 2, "save_steps": 2,
    },
    "data": {
        "pretrained_weights": None, "tokenizer": "tok", "training_data": "t.csv",
        "validation_data": "v.csv", "validation_fraction": 0.2, "text_field": "body",
        "label_field": "kind", "output_dir": "out",
    },
}  # fmt: skip


@pytest.fixture
def base():
    return copy.deepcopy(KEYS)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a mapping (written as indented JSON) or a text, from ``run.json`` in an empty cwd."""
    monkeypatch.chdir(tmp_path)

    def load(content, overrides=(), name="run.json") -> RunConfig:
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        Path(name).write_text(text, encoding="utf-8")
        return load_config(name, overrides)

    return load


@pytest.fixture
def refused(load):
    """Return the message with which a configuration is refused."""

    def refused(content, overrides=(), name="run.json") -> str:
        with pytest.raises(ConfigError) as caught:
            load(content, overrides, name)
        return str(caught.value)

    return refused


def line_of(content, key):
    """Return the line on which `key` stands in `content` written as indented JSON."""
    section, _, name = key.partition(".")
    lines = json.dumps(content, indent=1).splitlines()
    start = lines.index(f' "{section}": {{')
    return next(i for i, line in enumerate(lines[start:], start + 1) if f'"{name}":' in line)


# -- the seed's files ----------------------------------------------------------------------------


def test_the_seeds_fine_tuning_file_loads_unchanged(load):
    config = load(SEED["fine_tuning"])
    assert config.model == {
        "d_model": 384, "num_heads": 8, "num_layers": 4, "d_ff": 1536, "vocab_size": 16000,
        "num_classes": 10,
    }  # fmt: skip
    assert config.computation.method == "fine_tuning"
    assert config.computation.seed == 0
    training = config.training
    assert (training.learning_rate, training.batch_size, training.num_epochs) == (1e-5, 16, 5)
    assert (training.prefetch_batches, training.num_workers, training.shuffle) == (2, 2, True)
    assert config.data.training_data == "data/train.jsonl"
    assert config.output_dir == Path("outputs/fine_tuned")
    assert config.data.validation_fraction == 0.1


def test_the_seeds_chain_of_thought_file_loads_unchanged(load):
    config = load(SEED["chain_of_thought"])
    assert config.model["num_layers"] == 6
    assert (config.computation.method, config.training.num_epochs) == ("chain_of_thought", 3)
    assert config.data.reasoning_examples == "data/train.jsonl"


def test_the_seeds_rlhf_file_loads_unchanged(load):
    config = load(SEED["rlhf_training"])
    training = config.training
    assert (config.model["num_layers"], config.computation.method) == (6, "rlhf")
    assert (training.learning_rate, training.clip_epsilon, training.kl_coefficient) == (
        1e-6, 0.2, 0.1,
    )  # fmt: skip
    assert (training.batch_size, training.num_epochs) == (8, 1)
    assert training.phases == ("reward_model", "ppo")
    assert config.data.preference_data == "data/train.jsonl"
    assert config.output_dir == Path("outputs/rlhf")


# -- keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section in KEYS for key in KEYS[section]]
)
def test_every_key_of_the_contract_is_accepted_and_kept(load, section, key):
    config = load(KEYS).as_dict()
    assert config[section][key] == KEYS[section][key] or key == "pretrained_weights"


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("computation.mode", "posttraining"), ("computation.backend", "auto"),
        ("computation.seed", 0), ("computation.num_threads", None),
        ("training.optimizer", "adamw"), ("training.scheduler", "constant"),
        ("training.gradient_accumulation_steps", 1), ("training.shuffle", True),
        ("training.prefetch_batches", 2), ("training.num_workers", 0),
        ("data.validation_fraction", 0.1), ("data.text_field", "text"),
        ("data.label_field", "label"), ("model.type", "transformer"),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_contract(load, base, key, default):
    section, name = key.split(".")
    base[section].pop(name, None)
    assert load(base).as_dict()[section][name] == default


def test_what_a_run_writes_down_is_a_configuration_that_loads_as_the_same(load, base):
    config = load(base)
    again = load(config.as_dict(), name="again.json")
    assert again.as_dict() == config.as_dict()
    assert again.training == config.training


WRONG = {
    "model.d_model": ['"16"', "true", "16.0", "1.5", "null", "[16]", "{}"],
    "model.num_classes": ['"2"', "2.5", "false"],
    "model.norm": ['"RMS"', "1"],
    "model.dropout": ['"0.1"', "true"],
    "computation.seed": ['"0"', "true", "1.5", "null"],
    "computation.mode": ['"training"', "null"],
    "computation.method": ["3", "null"],
    "computation.num_threads": ['"2"', "true", "1.5"],
    "training.learning_rate": ['"1e-3"', "true", "null", "[0.1]"],
    "training.batch_size": ['"16"', "true", "1.5", "16.0", "null"],
    "training.shuffle": ['"true"', "1", "0", "null"],
    "training.optimizer": ['"adamax"', "null"],
    "training.betas": ["[0.9]", "0.9", '["0.9", 0.99]'],
    "training.train": ['"body"', "1.5", "true"],
    "data.training_data": ["3", "[]"],
    "data.validation_fraction": ['"0.1"', "true", "null"],
    "data.text_field": ["null", "3"],
}
EXPECTED = {
    "model.d_model": "an integer",
    "model.num_classes": "an integer or null",
    "model.norm": "one of 'layer_norm', 'rms_norm'",
    "model.dropout": "a number",
    "computation.seed": "an integer",
    "computation.mode": "one of 'posttraining', 'pretraining'",
    "computation.method": "text",
    "computation.num_threads": "an integer or null",
    "training.learning_rate": "a number",
    "training.batch_size": "an integer",
    "training.shuffle": "true or false",
    "training.optimizer": "one of 'adamw', 'adam', 'sgd'",
    "training.betas": "a list of 2 numbers",
    "training.train": "one of 'all', 'head' or an integer",
    "data.training_data": "text or a list of texts or null",
    "data.validation_fraction": "a number",
    "data.text_field": "text",
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_value_of_the_wrong_kind_is_refused_not_converted(refused, base, key, value):
    section, name = key.split(".")
    base[section][name] = json.loads(value)
    message = refused(base)
    line = line_of(base, key)
    expected = f"run.json:{line}: {key}: expected {EXPECTED[key]}, found {value}"
    assert message.partition("; did you mean")[0] == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.d_model", 0, "expected a whole number of at least 1, found 0"),
        ("model.vocab_size", -5, "expected a whole number of at least 1, found -5"),
        ("model.num_classes", 0, "expected a whole number of at least 1, found 0"),
        ("model.dropout", 1.0, "expected a number in [0, 1), found 1.0"),
        ("computation.seed", -1, "expected a whole number of at least 0, found -1"),
        ("computation.num_threads", 0, "expected a whole number of at least 1, found 0"),
        ("computation.num_threads", 1 << 31, "expected from 1 to 2**31 - 1, found 2147483648"),
        ("training.learning_rate", 0.0, "expected a positive number, found 0.0"),
        ("training.learning_rate", -1e-4, "expected a positive number, found -0.0001"),
        ("training.batch_size", 0, "expected at least 1, found 0"),
        ("training.num_epochs", 0, "expected at least 1, found 0"),
        ("training.warmup_steps", -1, "expected a number that is not negative, found -1"),
        ("training.label_smoothing", 1.0, "expected a number in [0, 1), found 1.0"),
        ("data.validation_fraction", 1.0, "expected a number in [0, 1), found 1.0"),
        ("data.validation_fraction", -0.1, "expected a number in [0, 1), found -0.1"),
        ("data.training_data", "", "expected a path, found ''"),
        ("data.output_dir", " ", "expected a path, found ' '"),
        ("data.text_field", "", "expected the name of a field, found ''"),
    ],
)
def test_a_value_out_of_its_range_is_refused(refused, base, key, value, expected):
    section, name = key.split(".")
    base[section][name] = value
    assert refused(base) == f"run.json:{line_of(base, key)}: {key}: {expected}"


def test_choices_name_the_nearest(refused, base):
    base["training"]["optimizer"] = "sdg"
    assert refused(base) == (
        f"run.json:{line_of(base, 'training.optimizer')}: training.optimizer: expected one of "
        "'adamw', 'adam', 'sgd', found \"sdg\"; did you mean 'sgd'?"
    )


def test_sizes_that_do_not_fit_each_other_are_found_when_the_file_is_read(refused, base):
    del base["model"]["head_dim"]
    base["model"]["num_heads"] = 3
    assert refused(base) == (
        "run.json:2: model: d_model 16 is not a multiple of num_heads 3; "
        "change one of them or give head_dim"
    )
    base["model"] |= {"num_heads": 4, "num_kv_heads": 3}
    assert refused(base) == "run.json:2: model: num_heads 4 is not a multiple of num_kv_heads 3"


def test_head_dim_frees_the_sizes_from_each_other(load, base):
    base["model"] |= {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4}
    assert load(base).model["head_dim"] == 4


def test_sizes_are_needed_without_pretrained_weights_and_all_are_named(refused, base):
    for name in ("d_model", "vocab_size"):
        del base["model"][name]
    assert refused(base) == (
        "run.json: model.d_model: is needed when data.pretrained_weights is absent\n"
        "run.json: model.vocab_size: is needed when data.pretrained_weights is absent"
    )


def test_sizes_may_be_absent_with_pretrained_weights(load, base):
    base["model"] = {}
    base["data"]["pretrained_weights"] = "base"
    assert load(base).model == {}


def test_a_language_model_has_no_classes(refused, base):
    base["computation"] |= {"mode": "pretraining", "method": "autoregressive"}
    line = line_of(base, "model.num_classes")
    assert refused(base) == f"run.json:{line}: model.num_classes: a language model has no classes"


def test_what_needs_validation_is_refused_without_it(refused, load, base):
    base["data"] |= {"validation_data": None, "validation_fraction": 0.0}
    reason = "there is no validation, as data.validation_fraction is 0"
    assert refused(base).splitlines() == [
        f"run.json:{line_of(base, f'training.{key}')}: training.{key}: {reason}"
        for key in ("eval_steps", "early_stopping_patience")
    ]
    del base["training"]["eval_steps"], base["training"]["early_stopping_patience"]
    assert load(base).data.validation_fraction == 0


# -- unknown keys --------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest(refused, base):
    base["training"]["learning_rte"] = 1
    line = line_of(base, "training.learning_rte")
    assert refused(base) == (
        f"run.json:{line}: training.learning_rte: unknown key; did you mean 'learning_rate'?"
    )


def test_a_key_far_from_any_other_has_no_suggestion(refused, base):
    base["data"]["zzz"] = 1
    line = line_of(base, "data.zzz")
    assert refused(base) == f"run.json:{line}: data.zzz: unknown key"


@pytest.mark.parametrize(
    ("key", "home"),
    [
        ("training.d_model", "it belongs to the section 'model'"),
        ("model.learning_rate", "it belongs to the section 'training'"),
        ("model.label_smoothing", "it belongs to the section 'training'"),
        ("model.num_epochs", "it belongs to the section 'training'"),
        ("data.num_classes", "it belongs to the section 'model'"),
        ("training.num_classes", "it belongs to the section 'model'"),
        ("training.seed", "it belongs to the section 'computation'"),
        ("training.output_dir", "it belongs to the section 'data'"),
        ("computation.text_field", "it belongs to the section 'data'"),
        ("training.sequence_length", "it belongs to the method 'autoregressive'"),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_place_names_its_home(refused, base, key, home):
    section, name = key.split(".")
    base[section][name] = 1
    assert refused(base) == f"run.json:{line_of(base, key)}: {key}: unknown key here; {home}"


@pytest.mark.parametrize("key", ["reasoning_examples", "preference_data"])
def test_rows_under_the_key_of_another_method_are_refused(refused, base, key):
    base["data"][key] = "t.jsonl"
    where = f"run.json:{line_of(base, f'data.{key}')}: data.{key}"
    assert refused(base) == f"{where}: the method 'fine_tuning' reads data.training_data"


def test_options_of_fine_tuning_are_not_those_of_pretraining(refused, base):
    base["computation"] |= {"mode": "pretraining", "method": "autoregressive"}
    del base["model"]["num_classes"]
    base["training"]["pooling"] = "mean"
    assert refused(base) == (
        f"run.json:{line_of(base, 'training.pooling')}: training.pooling: unknown key here; "
        "it belongs to the method 'fine_tuning'"
    )


def test_unknown_sections_and_sections_that_are_none(refused, base):
    base["trainig"] = base.pop("training")
    base["data"] = "t.csv"
    lines = json.dumps(base, indent=1).splitlines()
    places = {name: lines.index(next(x for x in lines if f'"{name}"' in x)) + 1
              for name in ("trainig", "data")}  # fmt: skip
    assert refused(base).splitlines() == [
        f"run.json:{places['data']}: data: expected a section of keys, found 't.csv'",
        f"run.json:{places['trainig']}: trainig: unknown section; did you mean 'training'?",
    ]


def test_unknown_methods(refused, base):
    base["computation"]["method"] = "finetuning"
    line = line_of(base, "computation.method")
    assert refused(base) == (
        f"run.json:{line}: computation.method: unknown method 'finetuning'; "
        f"did you mean 'fine_tuning'? (known: {', '.join(method for _, method in METHODS)})"
    )
    base["computation"] |= {"method": "fine_tuning", "mode": "pretraining"}
    line = line_of(base, "computation.mode")
    assert refused(base) == (
        f"run.json:{line}: computation.mode: the method 'fine_tuning' has the mode "
        "'posttraining', found 'pretraining'"
    )


def test_all_faults_are_told_at_once_one_a_line_in_the_order_of_sections(refused, base):
    base["model"]["d_modle"] = 1
    base["computation"]["seed"] = "1"
    base["training"] |= {"batch_size": 1.5, "epochs": 3}
    del base["data"]["training_data"]
    assert refused(base).splitlines() == [
        f"run.json:{line_of(base, 'model.d_modle')}: model.d_modle: unknown key; "
        "did you mean 'd_model'?",
        f"run.json:{line_of(base, 'computation.seed')}: computation.seed: expected an integer, "
        'found "1"',
        f"run.json:{line_of(base, 'training.batch_size')}: training.batch_size: expected an "
        "integer, found 1.5",
        f"run.json:{line_of(base, 'training.epochs')}: training.epochs: unknown key; "
        "did you mean 'num_epochs'?",
        "run.json: data.training_data: is needed",
    ]


def test_a_line_is_that_of_the_key_in_its_own_section(refused, base):
    """The same name in two sections, in a value and in a comment misleads nobody."""
    base["computation"]["description"] = '"dropuot": 3'
    base["model"]["dropuot"] = 0.1
    base["training"]["dropuot"] = 0.1
    found = [line.split(": ")[0] for line in refused(base).splitlines()]
    assert found == [f"run.json:{line_of(base, f'{s}.dropuot')}" for s in ("model", "training")]


@given(data=st.data())
def test_a_misspelling_of_any_key_is_refused_and_named(tmp_path_factory, data):
    section = data.draw(st.sampled_from(sorted(KEYS)))
    key = data.draw(st.sampled_from(sorted(KEYS[section])))
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    wrong = data.draw(
        st.sampled_from([key[:at] + key[at + 1 :], key[:at] + letter + key[at + 1 :],
                         key[:at] + letter + key[at:]])
    )  # fmt: skip
    assume(wrong and all(wrong not in names for names in KEYS.values()))
    assume(wrong not in {"eps", "train", "type"})
    config = copy.deepcopy(KEYS)
    config[section][wrong] = config[section].pop(key)
    path = tmp_path_factory.mktemp("m") / "run.json"
    path.write_text(json.dumps(config, indent=1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    place = f"{path}:{line_of(config, f'{section}.{wrong}')}: {section}.{wrong}: unknown key"
    assert any(line.startswith(place) for line in lines)


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {', "run.json:1: not valid JSON: Expecting property name enclosed in double "
         "quotes at column 12"),
        ('{\n "model": {},\n "data": {"x" 1}}', "run.json:3: not valid JSON: Expecting ':' "
         "delimiter at column 15"),
        ("", "run.json:1: not valid JSON: Expecting value at column 1"),
        ("[]", "run.json:1: expected sections, found a list"),
        ("3", "run.json:1: expected sections, found a number"),
        ('{"data": {},\n"model": {}, "data": {}}',
         "run.json:2: the key 'data' stands twice, first on line 1"),
        ('{"data": {"a": 1,\n "text_field": "x",\n "text_field": "x"}}',
         "run.json:3: the key 'data.text_field' stands twice, first on line 2"),
        ('{"training":\n{"learning_rate": NaN}}', "run.json:2: NaN is no number of JSON"),
        ('{"training":\n{"learning_rate":\n-Infinity}}', "run.json:3: -Infinity is no number of "
         "JSON"),
        ("[" * 100_000, "run.json:1: not valid JSON: nested too deeply"),
        ('{"computation": {"seed": ' + "9" * 5000 + "}}",
         "run.json:1: not valid JSON: a number with too many digits"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_is_refused_with_its_line(refused, text, message):
    assert refused(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nd_model = \n", "run.toml:2: not valid TOML: Invalid value (column 11)"),
        ("[model]\n[model]\n", "run.toml:2: not valid TOML: Cannot declare ('model',) twice "
         "(column 7)"),
        ("[model]\nd_model = 3\nd_model = 4\n", "run.toml:3: not valid TOML: Cannot overwrite a "
         "value (column 12)"),
        ("[model]\nd_modle = 3\n[computation]\nmethod = 'fine_tuning'\n[data]\n"
         "training_data = 't.csv'\npretrained_weights='b'",
         "run.toml:2: model.d_modle: unknown key; did you mean 'd_model'?"),
    ],
)  # fmt: skip
def test_toml(refused, text, message):
    assert refused(text, name="run.toml") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_model: 3\n", "run.yaml:2: not valid YAML: expected ',' or '}', but got "
         "'<stream end>'"),
        ("model:\n  d_model: 3\n  d_model: 4\n",
         "run.yaml:3: the key 'model.d_model' stands twice, first on line 2"),
        ("model: !!python/object:os.system {}\n", "run.yaml:1: not valid YAML: could not "
         "determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("model:\n  d_modle: 3\ncomputation:\n  method: fine_tuning\ndata:\n"
         "  training_data: t.csv\n  pretrained_weights: b\n",
         "run.yaml:2: model.d_modle: unknown key; did you mean 'd_model'?"),
        ("1: 2\n", "run.yaml:1: 1: unknown section"),
        ("data: {1: 2, training_data: t}\nmodel: {}\ncomputation: {method: fine_tuning}",
         "run.yaml:1: data.1: unknown key\n"
         "run.yaml: model.d_model: is needed when data.pretrained_weights is absent"),
        ("", "run.yaml:1: expected sections, found nothing"),
        ("data:\n  training_data: &a [*a]\n", "run.yaml:1: a value contains itself"),
        ("data:\n  2024-01-01: x\n", "run.yaml:1: a key is no text"),
        ("data:\n  text_field: 2024-13-45\n", "run.yaml:1: not valid YAML: month must be in "
         "1..12"),
    ],
)  # fmt: skip
def test_yaml(refused, text, message):
    assert refused(text, name="run.yaml").splitlines()[0] == message.splitlines()[0]


YAML = """
# a comment with learning_rate: 3
model: {d_model: 16, num_heads: 2, num_layers: 1, d_ff: 32, vocab_size: 300}
computation:
  method: fine_tuning
training:
  learning_rate: 1e-5
  weight_decay: 1E-2
  betas: [.9, 0.95]
  num_epochs: 3
  shuffle: false
  class_weights: null
data:
  training_data: t.csv
  text_field: 'no'
"""
TOML = """
[model]
d_model = 16
num_heads = 2
num_layers = 1
d_ff = 32
vocab_size = 300
[computation]
method = "fine_tuning"
[training]
learning_rate = 1e-5
weight_decay = 1E-2
betas = [0.9, 0.95]
num_epochs = 3
shuffle = false
[data]
training_data = "t.csv"
text_field = "no"
"""
JSON = """{"model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32,
 "vocab_size": 300}, "computation": {"method": "fine_tuning"},
 "training": {"learning_rate": 1e-5, "weight_decay": 1E-2, "betas": [0.9, 0.95],
 "num_epochs": 3, "shuffle": false, "class_weights": null},
 "data": {"training_data": "t.csv", "text_field": "no"}}"""


def test_the_three_languages_say_the_same(load):
    texts = {"a.json": JSON, "a.toml": TOML, "a.yaml": YAML, "a.yml": YAML, "B.JSON": JSON}
    configs = [load(text, name=name) for name, text in texts.items()]
    assert all(config.as_dict() == configs[0].as_dict() for config in configs)
    assert all(config.training == configs[0].training for config in configs)
    assert configs[0].training.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "data: {validation_fraction: .nan, training_data: t}"),
                       ("a.yaml", "data: {validation_fraction: .inf, training_data: t}"),
                       ("a.toml", "[data]\nvalidation_fraction = nan\ntraining_data = 't'")]
)  # fmt: skip
def test_not_a_number_is_refused_in_every_language(refused, name, text):
    assert "data.validation_fraction: expected a number in [0, 1), found" in refused(
        text, name=name
    )


def test_a_file_in_another_encoding_is_refused_with_line_and_byte(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b'{"model": {},\n "computation": {"description": "caf\xe9"}}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:2: not UTF-8 text (byte 0xe9)"


def test_a_byte_order_mark_is_no_fault(load):
    assert load("\ufeff" + JSON).model["d_model"] == 16


def test_an_unknown_ending_is_refused(refused):
    assert refused(JSON, name="run.ini") == (
        "run.ini: expected a configuration ending in .json, .toml or .yaml"
    )


def test_a_configuration_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text("{}")
    shipped = ", ".join(shipped_configs())
    for name, near in (("fine_tunning", "fine_tuning"), ("mime.json", "mine.json")):
        with pytest.raises(MissingFileError) as caught:
            load_config(name)
        assert str(caught.value) == (
            f"{name}: no such configuration; did you mean '{near}'? (shipped: {shipped})"
        )


def test_a_directory_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert str(caught.value) == f"{tmp_path}: expected a configuration, found a directory"


def test_shipped_configurations_are_found_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    shipped = {"chain_of_thought", "demo", "fine_tuning", "pretraining", "rlhf_training"}
    assert set(shipped_configs()) == shipped
    for name, path in shipped_configs().items():
        config = load_config(name)
        assert config.source == str(path)
        assert config.computation.description
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a directory of that name hides nothing
    assert load_config("demo").source == str(shipped_configs()["demo"])


# -- overrides -----------------------------------------------------------------------------------


def test_overrides_are_json_or_text_and_the_last_one_holds(load, base):
    config = load(base, [
        "training.learning_rate=1e-4", "training.shuffle=true", "training.betas=[0.8, 0.9]",
        "training.class_weights=balanced", "training.max_grad_norm=null",
        "data.text_field=a=b", "data.output_dir=2024", "computation.description=\"quoted\"",
        "training.num_epochs=7", "training.num_epochs=8",
    ])  # fmt: skip
    training = config.training
    assert (training.learning_rate, training.shuffle, training.betas) == (1e-4, True, (0.8, 0.9))
    assert (training.class_weights, training.max_grad_norm) == ("balanced", None)
    assert training.num_epochs == 8
    assert (config.data.text_field, config.data.output_dir) == ("a=b", "2024")
    assert config.computation.description == "quoted"


def test_an_override_mends_what_the_file_says_wrong(load, base):
    base["training"]["batch_size"] = "four"
    assert load(base, ["training.batch_size=4"]).training.batch_size == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "--set learning_rate=1: expected SECTION.KEY=VALUE, as in "
         "training.learning_rate=1"),
        ("training.learning_rate", "--set training.learning_rate: expected SECTION.KEY=VALUE"),
        ("=1", "--set =1: expected SECTION.KEY=VALUE"),
        ("", "--set : expected SECTION.KEY=VALUE"),
        ("trainig.seed=1", "--set trainig.seed=1: unknown section 'trainig'; "
         "did you mean 'training'? (known: model, computation, training, data)"),
        ("training.=1", "--set training.=1: expected SECTION.KEY=VALUE"),
        ("training.learning_rte=1", "--set training.learning_rte: unknown key; "
         "did you mean 'learning_rate'?"),
        ("training.batch_size=1.5", "--set training.batch_size: expected an integer, found 1.5"),
        ("training.batch_size=big", '--set training.batch_size: expected an integer, found "big"'),
        ("training.learning_rate=NaN", "--set training.learning_rate: expected a positive number, "
         "found nan"),
        ("model.d_model=null", "--set model.d_model: expected an integer, found null"),
    ],
)  # fmt: skip
def test_overrides_that_do_not_fit_are_refused(refused, base, override, message):
    assert refused(base, [override]) == message


# -- paths ---------------------------------------------------------------------------------------


def test_a_path_is_looked_for_from_here_and_then_beside_the_configuration(
    tmp_path, monkeypatch, base
):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "run.json").write_text(json.dumps(base))
    (there / "t.csv").write_text("beside")
    monkeypatch.chdir(here)
    config = load_config("../there/run.json")
    assert config.path("training_data").read_text() == "beside"
    (here / "t.csv").write_text("here")
    assert config.path("training_data").read_text() == "here"
    assert config.output_dir == Path("out")  # results go where the user stands


def test_a_missing_file_names_the_key_and_the_nearest(load, base):
    Path("train.csv").write_text("x")
    base["data"]["training_data"] = "trian.csv"
    config = load(base)
    with pytest.raises(MissingFileError) as caught:
        config.path("training_data")
    assert str(caught.value) == (
        f"run.json:{line_of(base, 'data.training_data')}: data.training_data: trian.csv: "
        "no such file or directory; did you mean 'train.csv'?"
    )


def test_the_nearest_file_is_looked_for_beside_the_configuration_too(tmp_path, monkeypatch, base):
    (tmp_path / "run.json").write_text(json.dumps(base))
    (tmp_path / "tt.csv").write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(MissingFileError, match=r"did you mean 'tt\.csv'\?$"):
        load_config(tmp_path / "run.json").path("training_data")


def test_builtin_names(load, base):
    base["data"]["training_data"] = "builtin:sentiment_train.csv"
    assert load(base).path("training_data").name == "sentiment_train.csv"
    base["data"]["training_data"] = "builtin:sentiment_trian.csv"
    with pytest.raises(MissingFileError) as caught:
        load(base).path("training_data")
    assert str(caught.value) == (
        f"run.json:{line_of(base, 'data.training_data')}: data.training_data: loopos ships no "
        "'sentiment_trian.csv'; did you mean 'sentiment_train.csv'?"
    )


def test_output_dir_is_named_after_the_method_when_it_is_not_said(load, base):
    del base["data"]["output_dir"]
    assert load(base).output_dir == Path("outputs/fine_tuning")


@pytest.mark.parametrize("key", ["training_data", "output_dir"])
def test_the_home_is_meant_by_a_tilde(load, base, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x").write_text("")
    base["data"][key] = "~/x"
    config = load(base)
    found = config.output_dir if key == "output_dir" else config.path(key)
    assert found == tmp_path / "home" / "x"
    assert load(base, ["data.output_dir=~/y"]).as_dict()["data"]["output_dir"] == str(
        tmp_path / "home" / "y"
    )


def test_a_name_that_only_begins_with_a_tilde_is_one(load, base):
    Path("~$t.csv").write_text("a lock of an office program")
    base["data"] |= {"training_data": "~$t.csv", "validation_data": "~no-such-user/v.csv",
                     "output_dir": "~no-such-user/out"}  # fmt: skip
    config = load(base)
    assert config.path("training_data") == Path("~$t.csv")
    assert config.output_dir == Path("~no-such-user/out")
    with pytest.raises(MissingFileError, match=r"~no-such-user/v\.csv: no such file or directory$"):
        config.path("validation_data")


def test_a_directory_that_may_not_be_listed_gives_no_hint(load, base, monkeypatch):
    base["data"]["training_data"] = "trian.csv"
    config = load(base)
    Path("train.csv").write_text("x")

    def cannot(self):
        raise PermissionError(13, "Permission denied", str(self))

    shipped = shipped_configs()
    monkeypatch.setattr("loopos.config.shipped_configs", lambda: shipped)
    monkeypatch.setattr(Path, "iterdir", cannot)
    with pytest.raises(MissingFileError, match=r"trian\.csv: no such file or directory$"):
        config.path("training_data")
    with pytest.raises(MissingFileError, match=r"^rum\.json: no such configuration \(shipped: "):
        load_config("rum.json")


def test_inputs_are_named_so_that_they_are_found_from_anywhere(base, tmp_path, monkeypatch):
    """Also from a directory whose name reads as a pattern, and through a link."""
    there = tmp_path / "a [b]"
    (there / "conf").mkdir(parents=True)
    for name in ("1.csv", "2.csv", "conf/v.csv"):
        (there / name).write_text("x")
    (there / "conf" / "link.csv").symlink_to(there / "1.csv")
    base["data"] |= {
        "training_data": ["*.csv", "../2.csv"], "validation_data": "v.csv",
        "pretrained_weights": "org/name", "tokenizer": "builtin:base_model",
        "reward_model": "link.csv", "output_dir": "out",
    }  # fmt: skip
    (there / "conf" / "run.json").write_text(json.dumps(base | {"computation": {"method": "rlhf"}}))
    monkeypatch.chdir(there)
    data = Data(**base["data"])
    config = dataclasses.replace(load_config("fine_tuning"), source="conf/run.json", data=data)
    found = config.inputs()
    assert found == {
        "training_data": [f"{tmp_path}/a [[]b]/*.csv", f"{there}/2.csv"],
        "validation_data": f"{there}/conf/v.csv",
        "pretrained_weights": "org/name", "tokenizer": "builtin:base_model",
        "reward_model": f"{there}/conf/link.csv",
    }  # fmt: skip
    before = config.paths("training_data")
    monkeypatch.chdir("/")
    moved = dataclasses.replace(config, data=dataclasses.replace(data, **found))
    assert moved.paths("training_data") == [(there / p).resolve() for p in before]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are no text")
def test_a_path_that_no_file_could_hold_is_left_as_it_is(load, base, tmp_path, monkeypatch):
    here = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(here)
    monkeypatch.chdir(os.fsdecode(here))
    Path("t.csv").write_text("x")
    base["data"]["training_data"] = "t.csv"
    Path("run.json").write_text(json.dumps(base))
    assert load_config("run.json").inputs()["training_data"] == "t.csv"


def test_text_that_no_file_could_hold_is_named(refused, base):
    base["data"]["text_field"] = "\ud800"
    assert refused(base) == (
        f"run.json:{line_of(base, 'data.text_field')}: data.text_field: "
        "has half a surrogate pair, so no text"
    )
