"""Other people's C and Cython call the kernels: the examples of docs/embedding.md run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import loopos
from loopos.backends import available_backends

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
COMPILER = os.environ.get("CC", "cc").split()[0]


def _missing():
    if "cython" not in available_backends():
        return "the cython backend cannot run here"
    if importlib.util.find_spec("Cython") is None:
        return "Cython is not installed"
    return None if shutil.which(COMPILER) else f"there is no compiler '{COMPILER}'"


@pytest.fixture(autouse=True)
def tools():
    if (missing := _missing()) is not None:
        if "cython" in os.environ.get("LOOPOS_REQUIRE", ""):
            pytest.fail(missing)
        pytest.skip(missing)


def example(language):
    return re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def build(name, source, directory, headers=None):
    """Compile one C file to an extension module and import it."""
    target = directory / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    done = subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", *flags,
         f"-I{sysconfig.get_path('include')}", f"-I{headers or loopos.get_include()}", str(source),
         "-o", str(target)], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, done.stderr


def test_a_cython_module_multiplies_without_the_lock(tmp_path):
    (tmp_path / "stacks.pyx").write_text(example("cython"))
    installed = Path(loopos.__file__).parents[1]  # where the pxd is found
    done = subprocess.run(
        [sys.executable, "-m", "cython", "-3", "-I", str(installed), "stacks.pyx"], cwd=tmp_path,
        capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    stacks, _ = build("stacks", tmp_path / "stacks.c", tmp_path)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype("f4") for size in ((5, 40, 33), (5, 33, 70)))
    results = []
    for threads in (1, 2):
        c = np.full((5, 40, 70), np.nan, np.float32)
        stacks.multiply(a, b, c, threads)
        results.append(c)
    np.testing.assert_allclose(results[0], a.astype(float) @ b, rtol=0, atol=2e-5)
    assert np.array_equal(*results)
    with pytest.raises(ValueError, match="do not fit"):
        stacks.multiply(a, a, c, 1)


def test_a_c_module_multiplies_without_the_lock(tmp_path):
    (tmp_path / "powers.c").write_text(example("c"))
    powers, warnings = build("powers", tmp_path / "powers.c", tmp_path)
    assert warnings == ""
    rng = np.random.default_rng(1)
    matrix = (rng.normal(size=(90, 90)) / 10).astype(np.float32)
    x, y = rng.normal(size=90).astype(np.float32), np.empty(90, np.float32)
    expected = np.linalg.matrix_power(matrix.astype(float), 3) @ x
    powers.power(matrix, x, y, 3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="sizes"):
        powers.power(matrix, x, np.empty(3, np.float32), 1)


@pytest.mark.parametrize(
    ("change", "to", "version"),
    [
        (r"API_VERSION \d+\n", "API_VERSION 999\n", 999),
        (r"\} loopos_rope;", "long more;} loopos_rope;", 4),
    ],
)
def test_a_module_of_another_version_is_refused(change, to, version, tmp_path):
    (tmp_path / "powers.c").write_text(example("c"))
    for name in ("loopos.h", "loopos_import.h"):
        text = (Path(loopos.get_include()) / name).read_text()
        (tmp_path / name).write_text(re.sub(change, to, text))
    with pytest.raises(ImportError, match=f"built against version {version} of its C interface"):
        build("powers", tmp_path / "powers.c", tmp_path, tmp_path)


def test_the_include_directory_holds_the_headers_and_the_pxd_lies_above():
    directory = Path(loopos.get_include())
    assert {"loopos.h", "loopos_import.h"} <= {path.name for path in directory.iterdir()}
    assert (directory.parent / "kernels.pxd").exists()
