"""The JSON Schema of configurations: it agrees with what load_config takes, and so do the docs."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from loopos.config import Computation, Data, load_config, shipped_configs
from loopos.errors import ConfigError
from loopos.methods import (
    METHODS,
    chain_of_thought,
    dpo,
    fine_tuning,
    pretraining,
    reward_model,
    rlhf,
    sft,
    verifiable,
)
from loopos.models.adapter import LoraConfig
from loopos.models.config import TransformerConfig
from loopos.models.rope import RopeScaling
from loopos.schema import descriptions, json_schema

ROOT = Path(__file__).parents[1]
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
LORA = {"lora": {"rank": 4, "target_modules": ["q", "v"]}}


def reference():
    spec = importlib.util.spec_from_file_location(
        "make_reference", ROOT / "tools" / "make_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configuration(**changes):
    """Return a whole configuration, as a person would write it, with some sections changed."""
    values = {
        "model": {},
        "computation": {"method": "fine_tuning"},
        "training": {},
        "data": {"training_data": "train.csv", "pretrained_weights": "base"},
    }
    return {
        name: {**values.get(name, {}), **changes.get(name, {})} for name in {**values, **changes}
    }


def faults(values):
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}"
            for e in VALIDATOR.iter_errors(values)]  # fmt: skip


def accepts(values, directory):
    path = directory / "c.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    try:
        load_config(path)
    except ConfigError:
        return False
    return True


def test_the_schema_is_one_and_made_of_json():
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert set(SCHEMA["$defs"]) == {method for _, method in METHODS}


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_fit_it(name):
    assert faults(json.loads(shipped_configs()[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "kind",
    [TransformerConfig, Computation, Data, fine_tuning.Options, pretraining.Options, sft.Options,
     chain_of_thought.Options, reward_model.Options, dpo.Options, rlhf.Options, verifiable.Options,
     LoraConfig, RopeScaling],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)  # fmt: skip
def test_every_field_has_a_description(kind):
    missing = {f.name for f in dataclasses.fields(kind)} - set(descriptions(kind))
    assert missing == set()


def test_every_key_has_type_description_and_default():
    found = [(n, k) for part in [SCHEMA["properties"][s] for s in ("model", "computation", "data")]
             + list(SCHEMA["$defs"].values()) for n, k in part["properties"].items()]  # fmt: skip
    assert len(found) > 90
    for name, key in found:
        assert {"type", "enum", "anyOf"} & set(key), name
        assert key["description"].endswith("."), name
    options = SCHEMA["$defs"]["fine_tuning"]["properties"]
    assert options["learning_rate"] == {
        "type": "number",
        "description": "The highest rate of the schedule.",
        "default": 5e-5,
    }
    assert options["optimizer"]["enum"] == ["adamw", "adam", "sgd"]
    assert options["betas"]["default"] == [0.9, 0.999]
    assert (options["betas"]["minItems"], options["betas"]["maxItems"]) == (2, 2)
    assert options["train"]["anyOf"] == [{"enum": ["all", "head"]}, {"type": "integer"}]
    assert options["lora"]["anyOf"][0]["properties"]["rank"]["default"] == 8
    assert SCHEMA["properties"]["model"]["properties"]["norm"]["enum"] == ["layer_norm", "rms_norm"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimiser": "adamw"}},
        {"training": {"batch_size": "16"}},
        {"training": {"batch_size": True}},
        {"training": {"scheduler": "cosin"}},
        {"training": {"betas": [0.9]}},
        {"training": {"lora": {"ranks": 4}}},
        {"training": {"lora": {"rank": 4.5}}},
        {"training": {"sequence_length": 8}},
        {"model": {"d_modell": 64}},
        {"model": {"norm": "batch_norm"}},
        {"model": {"positions": "rope", "rope_scaling": {"kind": "yarn", "factor": 2.0}}},
        {"model": {"rope_scaling": {"factor": 2.0}}},
        {"computation": {"method": "fine_tunning"}},
        {"computation": {"mode": "pretraining"}},
        {"computation": {"seed": "0"}},
        {"data": {"training_data": 7}},
        {"data": {"preferences": "p.jsonl"}},
        {"data": {"pretrained_weights": None}},
        {"trainings": {}},
    ],
    ids=str,
)
def test_what_is_wrong_fits_neither(changes, tmp_path):
    values = configuration(**changes)
    assert faults(values)
    assert not accepts(values, tmp_path)


@pytest.mark.parametrize("missing", ["computation", "data"])
def test_sections_that_are_needed(missing, tmp_path):
    values = configuration()
    del values[missing]
    assert faults(values)
    assert not accepts(values, tmp_path)


SIZES = dict.fromkeys(("d_model", "num_heads", "num_layers", "d_ff", "vocab_size"), 8)
FRESH = {"data": {"pretrained_weights": None}}


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"training": LORA}, True),
        ({"training": {"lora": None, "train": 2}}, True),
        ({"training": {"train": "head", "class_weights": [1, 2.5]}}, True),
        ({"model": {"rope_scaling": {"kind": "linear", "factor": 2}}}, True),
        ({"data": {"training_data": ["a.csv", "b.jsonl"]}}, True),
        ({**FRESH, "model": SIZES}, True),
        ({**FRESH, "model": SIZES, "training": LORA}, False),
        ({"computation": {"method": "autoregressive", "mode": "pretraining"}}, True),
        ({"computation": {"method": "autoregressive"}}, False),
        ({"computation": {"method": "autoregressive", "mode": "pretraining"},
          "training": {"sequence_length": 8}}, True),
        ({"computation": {"method": "autoregressive", "mode": "pretraining"},
          "training": {"pooling": "mean"}}, False),
        ({"computation": {"method": "autoregressive", "mode": "pretraining"},
          "model": {"num_classes": 2}}, False),
        ({"computation": {"method": "autoregressive", "mode": "pretraining"},
          "model": {"num_classes": None}}, True),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_depend_on_others(changes, fits, tmp_path):
    values = configuration(**changes)
    assert (faults(values) == []) == fits
    assert accepts(values, tmp_path) == fits


def _keys():
    for mode, method in METHODS:
        own = {"computation": {"mode": mode, "method": method}}
        sections = {n: SCHEMA["properties"][n] for n in ("model", "computation", "data")}
        for section, part in (sections | {"training": SCHEMA["$defs"][method]}).items():
            for key in part["properties"]:
                yield pytest.param(own, section, key, id=f"{method}-{section}.{key}")


@pytest.mark.parametrize(("own", "section", "key"), list(_keys()))
def test_nothing_that_load_config_takes_is_refused(own, section, key, tmp_path):
    """The schema knows no ranges; of types it says what load_config says."""
    for value in (None, True, 1, 0.5, "x", "all", [], [0.5, 0.5], ["x"], {}):
        changed = configuration(**own)
        changed[section][key] = value
        if accepts(changed, tmp_path):
            assert faults(changed) == [], value


def test_a_schema_key_is_for_editors_only(tmp_path):
    plain = configuration()
    assert faults({"$schema": "configuration.schema.json", **plain}) == []
    for name, text in {
        "c.json": json.dumps({"$schema": "configuration.schema.json", **plain}),
        "c.yaml": "$schema: here\ncomputation: {method: fine_tuning}\n"
        "data: {training_data: train.csv, pretrained_weights: base}\n",
        "c.toml": '"$schema" = "here"\n[computation]\nmethod = "fine_tuning"\n'
        '[data]\ntraining_data = "train.csv"\npretrained_weights = "base"\n',
    }.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        loaded = load_config(path)
        assert loaded.data.training_data == "train.csv"
        assert "$schema" not in loaded.as_dict()


def test_only_that_key_is_ignored(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"$id": "x", **configuration()}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.json:1: \$id: unknown section"):
        load_config(path)


def test_configs_prints_it():
    command = [sys.executable, "-m", "loopos", "configs", "--schema"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout) == SCHEMA
    done = subprocess.run([*command, "--show", "demo"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: give one of --show, --copy and --schema\n")


def test_the_examples_of_the_page_are_whole_configurations(tmp_path):
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```(json|toml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in examples] == ["json", "toml"]
    for kind, body in examples:
        path = tmp_path / f"c.{kind}"
        path.write_text(body, encoding="utf-8")
        assert load_config(path).computation.method == "fine_tuning"
        values = json.loads(body) if kind == "json" else tomllib.loads(body)
        assert faults(values) == []


def test_the_published_schema_and_the_reference_are_up_to_date():
    made = reference()
    hint = "run python tools/make_reference.py"
    assert made.SCHEMA.read_text(encoding="utf-8") == made.schema_text(), hint
    page = made.PAGE.read_text(encoding="utf-8")
    assert page == made.page_text(page), hint
    for section in made.GROUPS:
        assert f"<!-- begin: {section} -->" in page
