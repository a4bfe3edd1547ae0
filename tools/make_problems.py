"""Write the word problems that come with loopos.

    python tools/make_problems.py

Makes ``loopos/assets/reasoning_train.jsonl`` and ``reasoning_validation.jsonl``: arithmetic word
problems with steps and answers from :mod:`loopos.data.problems`, of its training and of its test
split. The same seed gives the same bytes. Their sha256 goes into the data card beside them.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from loopos.data.problems import make_problems
from loopos.files import atomic_write_text

ASSETS = Path(__file__).resolve().parent.parent / "loopos" / "assets"
#: File, problems, split.
FILES = (("reasoning_train.jsonl", 1000, "train"), ("reasoning_validation.jsonl", 100, "test"))
SEED = 0


def text_of(count: int, split: str) -> str:
    """Return problems as JSON Lines."""
    rows = (
        {name: problem[name] for name in ("problem", "reasoning", "answer")}
        for problem in make_problems(count, seed=SEED, split=split)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write both files."""
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"^\| `reasoning_.*\n", "", card, flags=re.MULTILINE)
    for name, count, split in FILES:
        text = text_of(count, split)
        atomic_write_text(ASSETS / name, text)
        card += f"| `{name}` | `{hashlib.sha256(text.encode()).hexdigest()}` |\n"
        print(f"{name}: {count} problems, {len(text):,} characters")
    atomic_write_text(ASSETS / "README.md", card)


if __name__ == "__main__":
    main()
