"""Every Python snippet and every loopos command of the README and the docs runs, in its order."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from loopos.config import Computation, Data, ModelKeys
from loopos.data import gguf_tokenizer
from loopos.methods import fine_tuning, pretraining
from loopos.models import gguf, gguf_file
from loopos.models.adapter import LoraConfig
from loopos.models.config import TransformerConfig
from loopos.models.families import FAMILIES
from loopos.models.rope import ROPE_KINDS, RopeScaling
from loopos.training.resume import MAY_CHANGE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Commands that install, or that take minutes: .ci/run runs them as they stand.
ELSEWHERE = ("pip install", "loopos demo", "pytest")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return [(kind, body) for kind, body in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    python, commands = [], []
    for kind, body in blocks(page):
        if kind == "python":
            python.append(body)
        else:
            lines = [shlex.split(line) for line in body.splitlines() if line.strip()]
            commands += [c for c in lines if not " ".join(c).startswith(ELSEWHERE)]
    if python:  # one session, as a reader would type it
        script = tmp_path / "page.py"
        script.write_text("\n".join(python), encoding="utf-8")
        done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=env,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for command in commands:
        assert command[0] == "loopos", command
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize(
    "kind",
    [TransformerConfig, ModelKeys, RopeScaling, Computation, Data, fine_tuning.Options,
     pretraining.Options, LoraConfig],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)  # fmt: skip
def test_every_key_is_in_the_configuration_page(kind):
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    missing = [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in page]
    assert [name for name in missing if name != "family"] == []


def test_what_is_read_and_what_may_change_is_named():
    models, safety = ((ROOT / "docs" / f"{n}.md").read_text("utf-8") for n in ("models", "safety"))
    kinds = [kind.name for kind in gguf_file._KINDS.values()]
    assert ", ".join(sorted(kinds)) == ", ".join(sorted(re.search(
        r"types of tensors \| (.*) \|", models)[1].split(", ")))  # fmt: skip
    types = [t for family in FAMILIES.values() for t in family.model_types]
    for name in (*types, *gguf._MODEL_TYPES, *gguf_tokenizer._SPLITTINGS):
        assert f"`{name}`" in models, name
    assert all(f'`"{kind}"`' in models for kind in ROPE_KINDS)
    assert all(f"`{name}`" in safety for name in MAY_CHANGE)


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install . && loopos demo" in text
    assert "pip install '.[test]' && pytest" in text


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
