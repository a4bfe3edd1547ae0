"""Build of loopos: metadata is in pyproject.toml, the version in one place, the kernels here.

The kernels are one C source, compiled once per x86-64 level into one extension that chooses at run
time. Where that cannot be built, loopos installs without it, and says why.
"""

import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
KERNELS = Path("loopos") / "_ext"
SOURCES = KERNELS / "src"
#: Why there are no kernels, for `loopos info`; written only when they could not be built.
REASON_FILE = "not_built.txt"

X86 = platform.machine().lower() in ("x86_64", "amd64")
#: Level and the compiler's flags for it. A compiler that does not know the later ones leaves them.
LEVELS = (
    [("v2", ["-march=x86-64-v2"]),
     ("v3", ["-march=x86-64-v3"]),
     ("v4", ["-march=x86-64-v4", "-mprefer-vector-width=512"])]
    if X86 else [("generic", [])]
)  # fmt: skip
# Products may be fused with sums (FMA); nothing else of -ffast-math: NaN and infinity stay.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-g0"]  # fmt: skip


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
            if self.extensions[0].sources[0].endswith(".pyx") and not self._cythonised():
                return
            super().run()
        except Exception as error:  # compilers, linkers and Cython fail in ways of their own
            self._without(f"{type(error).__name__}: {error}")

    def _cythonised(self) -> bool:
        try:
            import numpy
            from Cython.Build import cythonize
        except ImportError as error:
            self._without(f"{error.name} is not there to build with")
            return False
        extension = self.extensions[0]
        extension.include_dirs.append(numpy.get_include())
        kernels = cythonize([extension], build_dir=self.build_temp, quiet=True)
        self.extensions = self.distribution.ext_modules = kernels
        return True

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels once per level, then the extension around them."""
        ext._needs_stub = False
        macros = [("LOOPOS_X86", "1")] if X86 else []
        for level, flags in LEVELS:
            try:
                objects = self.compiler.compile(
                    [str(SOURCES / f"level_{level}.c")], output_dir=self.build_temp,
                    include_dirs=ext.include_dirs, extra_postargs=[*FLAGS, *flags],
                )  # fmt: skip
            except Exception as error:
                if level == LEVELS[0][0]:
                    raise
                print(f"loopos: no kernels for x86-64-{level}: {error}", file=sys.stderr)
                continue
            ext.extra_objects += objects
            macros.append((f"LOOPOS_HAVE_{level.upper()}", "1"))
        ext.define_macros += macros
        super().build_extension(ext)
        self._reason_file(ext).unlink(missing_ok=True)

    def _reason_file(self, ext: Extension) -> Path:
        return Path(self.get_ext_fullpath(ext.name)).with_name(REASON_FILE)

    def _without(self, reason: str) -> None:
        reason = " ".join(reason.split())
        print(f"loopos: built without its compiled kernels ({reason}); the other backends serve",
              file=sys.stderr)  # fmt: skip
        path = self._reason_file(self.extensions[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")
        self.extensions = self.distribution.ext_modules = []


setup(
    version=version(),
    ext_modules=[
        Extension(
            "loopos._ext.kernels",
            [
                str(KERNELS / "kernels.pyx"),
                *(str(SOURCES / f"{n}.c") for n in ("pool", "arena", "dispatch")),
            ],
            include_dirs=[str(SOURCES)],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
            extra_compile_args=[*FLAGS, "-pthread", "-D_GNU_SOURCE"],
            extra_link_args=["-pthread"],
            depends=[str(p) for p in sorted(SOURCES.glob("*"))],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
