"""What is built runs on any x86-64-v2 machine and hides its symbols; what is not says why."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loopos.backends import available_backends

ROOT = Path(__file__).parents[1]
#: As a build calls it, so that what is compiled here may come from a compiler's cache.
COMMAND = " ".join(
    os.environ.get(name) or sysconfig.get_config_var(name) or ""
    for name in ("CC", "CFLAGS", "CCSHARED")
).split() or ["cc"]
COMPILER = COMMAND[0]
#: Registers of 256 or 512 bits, the masks of the latter, and whatever is encoded as VEX or EVEX.
WIDE = re.compile(r"%[yz]mm\d|%k[0-7]\b|\t(?:\{vex\} )?v[a-z0-9]+ ")
#: These begin with a v too, and are as old as x86-64.
OLD = re.compile(r"\tver[rw] |\tvm[a-z]+ ")

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64")
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason="there is no C compiler")
needs_objdump = pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")


@pytest.fixture(scope="module")
def build():
    """``setup.py`` as a module."""
    spec = importlib.util.spec_from_file_location("loopos_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(source, target, flags, *include):
    done = subprocess.run(
        [*COMMAND, *(f"-I{path}" for path in include), "-c", str(source), "-o", str(target),
         *flags], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def instructions(path, *options):
    done = subprocess.run(["objdump", "-d", "--no-show-raw-insn", *options, str(path)], check=True,
                          capture_output=True, text=True)  # fmt: skip
    return [line for line in done.stdout.splitlines() if "\t" in line]


def wide(path):
    return [line for line in instructions(path) if WIDE.search(line) and not OLD.search(line)]


def objects_of(build, target, *more):
    """Compile each C source as a build does, but for warnings; return objects and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOOPOS_LEVELS", raising=False)  # all of them, whatever was built here
        levels = build.levels()
    macros = [f"-DLOOPOS_HAVE_{level.upper()}" for level in levels]
    flags = dict.fromkeys(("pool", "arena", "dispatch"), macros)
    flags |= {f"level_{level}": its for level, its in levels.items()}

    def made(name):
        path, its = target / f"{name}.o", [*build.FLAGS, *build.WARNINGS, *flags[name], *more]
        return path, compiled(build.SOURCES / f"{name}.c", path, its, build.SOURCES)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(flags, threads.map(made, flags), strict=True))


@pytest.fixture(scope="module")
def objects(build, tmp_path_factory):
    return objects_of(build, tmp_path_factory.mktemp("objects"))


@needs_compiler
def test_sources_compile_without_warnings(objects):
    assert {name: said for name, (_, said) in objects.items() if said} == {}


@needs_x86
@needs_compiler
@needs_objdump
def test_the_baseline_uses_no_wider_registers(objects):
    for name in ("pool", "arena", "dispatch", "level_v2"):
        path, _ = objects[name]
        assert len(instructions(path)) > 100
        assert wide(path) == [], name
    narrower = wide(objects["level_v3"][0])
    assert len(narrower) > 500  # so it would be seen
    assert not any("%zmm" in line for line in narrower)


TALL = ("tile", "few_rows", "packed_8", "packed_16", "packed_32")
TILES = {("v3", 5): TALL, ("v3", 6): TALL, ("v4", 11): TALL, ("v4", 12): TALL}
THIN = {(level, rows): ("thin_8", "thin_16") for level in ("v3", "v4") for rows in (1, 2, 3)}


def assert_sums_stay_in_registers(objects, kinds):
    """A tile's rows are written out, and no product is added to memory: else it is slow."""
    for (level, rows), names in kinds.items():
        for name in (f"{kind}_{rows}" for kind in names):
            code = instructions(objects[f"level_{level}"][0], f"--disassemble={name}")
            sums = [line for line in code if "vfmadd" in line]
            assert len(sums) >= (2 * rows if names == TALL else 8), name
            in_memory = [line for line in sums if re.search(r"\(%r[sb]p[,)]", line)]
            assert len(in_memory) <= len(sums) // 50, name


@needs_x86
@needs_compiler
@needs_objdump
def test_the_sums_of_a_tile_stay_in_registers(objects):
    assert_sums_stay_in_registers(objects, TILES | THIN)


@needs_x86
@needs_compiler
@needs_objdump
def test_the_door_uses_no_wider_registers(build, tmp_path):
    pytest.importorskip("Cython")
    import numpy as np

    door = tmp_path / "kernels.c"
    source = ROOT / build.KERNELS / "kernels.pyx"
    command = [sys.executable, "-m", "cython", "-3", "-I", str(ROOT), str(source), "-o", str(door)]
    subprocess.run(command, check=True)
    include = (build.SOURCES, np.get_include(), sysconfig.get_path("include"))
    compiled(door, tmp_path / "kernels.o", build.kernels().extra_compile_args, *include)
    assert wide(tmp_path / "kernels.o") == []


@needs_x86
@needs_objdump
@pytest.mark.skipif(not shutil.which("clang"), reason="there is no clang")
def test_clang_compiles_the_sources_as_well(build, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "COMMAND", ["clang", "-fPIC"])
    found = objects_of(build, tmp_path, "-O1")
    assert {name: said for name, (_, said) in found.items() if said} == {}
    assert_sums_stay_in_registers(found, TILES)  # the thin ones want more of Clang than -O1


@pytest.mark.skipif("cython" not in available_backends(), reason="the kernels are not there")
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF with nm")
def test_only_the_entry_of_the_module_is_seen():
    from loopos._ext import kernels

    done = subprocess.run(["nm", "-D", "--defined-only", kernels.__file__], check=True,
                          capture_output=True, text=True)  # fmt: skip
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    # Older linkers name the ends of sections.
    assert names - {"_init", "_fini", "__bss_start", "_edata", "_end"} == {"PyInit_kernels"}


def test_universal_binaries_get_each_half_its_own_flags(build, monkeypatch):
    monkeypatch.delenv("LOOPOS_LEVELS", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("ARCHFLAGS", "-arch arm64 -arch x86_64")
    levels = build.levels()
    assert list(levels) == ["generic", "v2", "v3", "v4", "amx"]
    assert levels["v3"] == ["-Xarch_x86_64", "-march=x86-64-v3"]
    monkeypatch.setenv("ARCHFLAGS", "-arch arm64")
    assert build.levels() == {"generic": []}
    monkeypatch.setenv("ARCHFLAGS", "-arch x86_64")
    assert list(build.levels()) == ["v2", "v3", "v4", "amx"]
    monkeypatch.setenv("LOOPOS_LEVELS", "amx")  # its other kernels are those of v4
    assert list(build.levels()) == ["v2", "v4", "amx"]
    monkeypatch.setenv("LOOPOS_LEVELS", "v3,v2")
    assert list(build.levels()) == ["v2", "v3"]
    monkeypatch.setenv("LOOPOS_LEVELS", "v3")  # without v2 nothing would be left to fall back to
    assert list(build.levels()) == ["v2", "v3"]
    monkeypatch.setenv("LOOPOS_LEVELS", "v2,v5")
    with pytest.raises(SystemExit, match="LOOPOS_LEVELS: expected some of v2, v3, v4, amx$"):
        build.levels()


# -- whole builds ------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs, with little beside the kernels."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__", "not_built.txt", "kernels.c")
    shutil.copytree(ROOT / "loopos" / "_ext", copy / "loopos" / "_ext", ignore=unbuilt)
    for name in ("__init__.py", "version.py", "py.typed"):
        shutil.copy(ROOT / "loopos" / name, copy / "loopos")
    return copy


def make(source, hook, **variables):
    """Call one of the build backend's hooks, in a process; return what it made, and its output."""
    pytest.importorskip("setuptools", "77")
    pytest.importorskip("Cython")
    env = {k: v for k, v in os.environ.items() if k not in ("LOOPOS_REQUIRE", "LOOPOS_SANITIZE",
           "PYTHONSAFEPATH", "PYTHONPATH", "LD_PRELOAD")}  # fmt: skip
    script = f"from setuptools import build_meta as b; print('made', b.{hook}('dist'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, env=env | variables,
                          capture_output=True, text=True)  # fmt: skip
    made = re.search(r"^made (.*)$", done.stdout, re.MULTILINE)
    return made and source / "dist" / made[1], done.stdout + done.stderr


def names_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("loopos/_ext/")}


@needs_compiler
def test_without_a_compiler_that_works_the_wheel_says_why_and_holds_no_old_kernels(source):
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = stale / "loopos" / "_ext" / f"kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    wheel, output = make(source, "build_wheel", CC="false")
    line = "loopos: built without its compiled kernels (the C compiler 'false' failed"
    assert line in output
    found = names_of(wheel)
    assert "loopos/_ext/not_built.txt" in found
    assert not any(name.endswith(".so") for name in found)
    with zipfile.ZipFile(wheel) as archive:
        reason = archive.read("loopos/_ext/not_built.txt").decode()
    assert reason == "the C compiler 'false' failed; 'pip install -v' shows what it said\n"


@needs_compiler
def test_a_build_that_requires_the_kernels_fails_without_them(source):
    wheel, output = make(source, "build_wheel", CC="false", LOOPOS_REQUIRE="cython")
    assert wheel is None
    assert "level_v2" in output or "level_generic" in output
    assert "built without" not in output


def test_the_source_distribution_holds_all_that_a_build_needs(source):
    archive, output = make(source, "build_sdist")
    assert archive is not None, output
    import tarfile

    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    kernels = source / "loopos" / "_ext"
    needed = {str(p.relative_to(source)) for p in kernels.rglob("*") if p.is_file()}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "not_built.txt"))]
