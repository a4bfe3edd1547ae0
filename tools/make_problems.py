"""Write the word problems that come with loopos.

    python tools/make_problems.py

Makes ``loopos/assets/reasoning_train.jsonl`` and ``reasoning_validation.jsonl``: arithmetic word
problems with steps and answers from :mod:`loopos.data.problems`, of its training and of its test
split. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
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
    for name, count, split in FILES:
        atomic_write_text(ASSETS / name, text_of(count, split))
        print(f"{name}: {count} problems, {(ASSETS / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
