"""Build of loopos: everything declarative is in pyproject.toml, the version is in one place."""

import re
from pathlib import Path

from setuptools import setup

source = Path(__file__).with_name("loopos").joinpath("version.py").read_text(encoding="utf-8")
match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
if match is None:
    raise RuntimeError("loopos/version.py does not define __version__")

setup(version=match.group(1))
