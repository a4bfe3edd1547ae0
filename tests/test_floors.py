"""Imports go down only, and every module can be imported."""

import ast
import importlib
import pkgutil
from pathlib import Path

import loopos
from loopos.methods import METHODS

#: The floor of each module or package under loopos; it imports its own floor or below.
FLOORS = {
    "errors": -1, "files": -1, "hub": -1, "version": -1,
    "_ext": 0,
    "backends": 1,
    "autograd": 2, "ops": 2,
    "data": 3, "models": 3,
    "training": 4, "generation": 4,
    "methods": 5,
    "config": 6, "config_files": 6, "display": 6, "runner": 6, "demo": 6, "cli": 6,
    "__main__": 6, "config_sections": 6, "commands": 6, "rehearsal": 6, "schema": 6,
    "measure": 6, "demo_reasoning": 6, "demo_rlhf": 6, "preview": 6, "generate_commands": 6,
    "reporting": 6, "report_commands": 6, "run_directory": 6, "config_checks": 6,
}  # fmt: skip
#: Configured methods that are made of others.
COMPOSED = {"rlhf", "verifiable"}
ROOT = Path(loopos.__file__).parent


def modules():
    return sorted(m.name for m in pkgutil.walk_packages(loopos.__path__, "loopos."))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "loopos":
                yield from ((f"loopos.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def test_every_module_can_be_imported():
    for name in modules():
        importlib.import_module(name)


def test_imports_go_down_only():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if own in {"__init__", "assets", "configs"}:
            continue  # the public face names everything
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] != "loopos" or len(parts) == 1:
                continue
            if FLOORS[parts[1]] > FLOORS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, wrong


def test_no_method_imports_another_and_models_never_multiply_or_name_a_backend():
    wrong = []
    methods = {module.rpartition(".")[2] for module in METHODS.values()} | {"ppo", "grpo"}
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem not in methods - COMPOSED:
            continue  # what they share, the facade, and what is made of others
        for name, line in imported(path):
            other = name.removeprefix("loopos.methods.")
            if name.startswith("loopos.methods.") and other in methods:
                wrong.append(f"{path.name}:{line} imports {name}")
    for path in (ROOT / "models").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        wrong += [
            f"{path.name} uses {w}"
            for w in ("matmul", "numpy_backend", "cython_backend", " @ ")
            if w in text
        ]
    assert not wrong, wrong


def test_the_floor_table_is_complete():
    found = {p.stem if p.is_file() else p.name for p in ROOT.iterdir()
             if p.suffix == ".py" or (p / "__init__.py").exists()}  # fmt: skip
    assert found - {"__init__", "assets", "configs"} <= set(FLOORS)
