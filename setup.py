"""Build of loopos: metadata is in pyproject.toml, the version in one place, the kernels here.

The kernels are one C source, compiled once per x86-64 level into one extension that chooses at run
time. Where that cannot be built, loopos installs without it, and says why: pip hides this output,
so the reason is stored beside the kernels' place, where ``loopos info`` finds it.

``LOOPOS_REQUIRE=cython`` makes a build without the kernels a failure, ``LOOPOS_SANITIZE=1`` builds
them with the sanitizers for addresses and undefined behaviour, ``LOOPOS_LEVELS=v2,v3`` builds those
of the levels alone (v2 always), for this machine and a shorter wait. ``LOOPOS_LOWERED=1`` builds
levels v4 and amx of instructions of v3, slow, so that they can be tested where those are missing.
"""

import os
import platform
import re
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
KERNELS = Path("loopos") / "_ext"
SOURCES = KERNELS / "src"
#: Why there are no kernels, for `loopos info`; written only when they could not be built.
REASON_FILE = "not_built.txt"

# Products may be fused with sums (FMA); nothing else of -ffast-math: NaN and infinity stay.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-g0", "-pthread", "-D_GNU_SOURCE"]  # fmt: skip
WARNINGS = ["-Wall", "-Wextra"]
LINK_FLAGS = ["-pthread"]
if os.environ.get("LOOPOS_SANITIZE"):
    _SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    FLAGS += [*_SANITIZERS, "-fno-omit-frame-pointer", "-O1", "-g1"]  # lines for its messages
    LINK_FLAGS += _SANITIZERS
#: Flags of each x86-64 level. A compiler that does not know the later ones leaves them out.
X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "amx": [
        "-march=x86-64-v4",
        "-mprefer-vector-width=512",
        "-mamx-tile",
        "-mamx-bf16",
        "-mamx-int8",
        "-mavx512vnni",
    ],
}
if os.environ.get("LOOPOS_LOWERED"):
    for _level in ("v4", "amx"):
        X86_LEVELS[_level] = [*X86_LEVELS["v3"], "-include", "tests/lowered_v4.h", "-Wno-psabi"]
    FLAGS += ["-DLOOPOS_LOWERED", "-O1"]


def architectures() -> set[str]:
    """Return what is compiled for: on macOS perhaps two at once, elsewhere this machine."""
    flags = os.environ.get("ARCHFLAGS") or sysconfig.get_config_var("CFLAGS") or ""
    named = re.findall(r"-arch\s+(\S+)", flags) if sys.platform == "darwin" else []
    machine = platform.machine().lower()
    return set(named) or {"x86_64" if machine == "amd64" else machine}


def levels() -> dict[str, list[str]]:
    """Return the instruction sets to compile for, each with the compiler's flags, basic first."""
    found = architectures()
    if "x86_64" not in found:
        return {"generic": []}
    if found == {"x86_64"}:
        asked = (os.environ.get("LOOPOS_LEVELS") or ",".join(X86_LEVELS)).split(",")
        if not set(asked) <= set(X86_LEVELS):
            raise SystemExit(f"LOOPOS_LEVELS: expected some of {', '.join(X86_LEVELS)}")
        asked += ["v2"] + ["v4"] * ("amx" in asked)  # which it takes most kernels from
        return {level: flags for level, flags in X86_LEVELS.items() if level in asked}
    chosen = {
        level: [part for flag in flags for part in ("-Xarch_x86_64", flag)]
        for level, flags in X86_LEVELS.items()
    }
    return {"generic": []} | chosen


def version() -> str:
    """Read the version without importing the package."""
    source = (HERE / "loopos" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError("loopos/version.py does not define __version__")
    return match.group(1)


class BuildKernels(build_ext):
    """Compiles the kernels at each level; when that fails, the install goes on without them."""

    def run(self) -> None:
        """Build, or note why not."""
        try:
            self._cythonise()
            super().run()
        except Exception as error:  # compilers, linkers and Cython fail in ways of their own
            if "cython" in os.environ.get("LOOPOS_REQUIRE", ""):
                raise
            self._without(self._reason(error))

    def _reason(self, error: Exception) -> str:
        if isinstance(error, ImportError) and error.name:
            return f"{error.name} is not there to build with"
        if type(error).__name__ in ("CompileError", "LinkError"):  # the message is its command
            program = (getattr(self.compiler, "compiler_so", None) or ["cc"])[0]
            return f"the C compiler '{program}' failed; 'pip install -v' shows what it said"
        return f"{type(error).__name__}: {error}"

    def _cythonise(self) -> None:
        import numpy
        from Cython.Build import cythonize

        extension = self.extensions[0]
        extension.include_dirs.append(numpy.get_include())
        self.extensions = cythonize([extension], build_dir=self.build_temp, quiet=True)

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels once per level, then the extension around them."""
        ext._needs_stub = False
        (Path(self.build_temp) / SOURCES).mkdir(parents=True, exist_ok=True)

        def compiled(level: str) -> list[str] | Exception:
            try:
                return self.compiler.compile(
                    [str(SOURCES / f"level_{level}.c")], output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*FLAGS, *WARNINGS, *levels()[level]],
                )  # fmt: skip
            except Exception as error:
                return error

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            results = dict(zip(levels(), threads.map(compiled, levels()), strict=True))
        if isinstance(results.get("v4"), Exception) and "amx" in results:
            results["amx"] = results["v4"]
        for level, made in results.items():
            if not isinstance(made, Exception):
                ext.extra_objects += made
                ext.define_macros.append((f"LOOPOS_HAVE_{level.upper()}", "1"))
            elif level in ("generic", "v2"):  # the least there is
                raise made
            else:
                print(f"loopos: no kernels for x86-64-{level}: {made}", file=sys.stderr)
        super().build_extension(ext)
        self._reason_file().unlink(missing_ok=True)

    def _reason_file(self) -> Path:
        return Path(self.get_ext_fullpath("loopos._ext.kernels")).with_name(REASON_FILE)

    def _without(self, reason: str) -> None:
        reason = " ".join(reason.split())
        print(f"loopos: built without its compiled kernels ({reason}); the other backends serve",
              file=sys.stderr)  # fmt: skip
        path = self._reason_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")
        # What an earlier build left there is not what was asked for.
        Path(self.get_ext_fullpath("loopos._ext.kernels")).unlink(missing_ok=True)
        self.extensions = []


def kernels() -> Extension:
    """Return the extension around the kernels; their levels are compiled beside it."""
    return Extension(
        "loopos._ext.kernels",
        [
            str(KERNELS / "kernels.pyx"),
            *(str(SOURCES / f"{name}.c") for name in ("pool", "arena", "dispatch")),
        ],
        include_dirs=[str(SOURCES)],
        libraries=["m"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        # Quickly compiled: the door is long, and what it, the pool and the arena do is little.
        extra_compile_args=[*FLAGS, "-O1"],
        extra_link_args=LINK_FLAGS,
        depends=[
            str(path.relative_to(HERE))
            for pattern in ("src/*", "*.pxi", "*.pxd")
            for path in sorted((HERE / KERNELS).glob(pattern))
        ],
    )


if __name__ == "__main__":
    setup(version=version(), ext_modules=[kernels()], cmdclass={"build_ext": BuildKernels})
