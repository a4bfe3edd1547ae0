#!/usr/bin/env python3
"""Hold measured figures against targets.json; the exit status is 1 when a target is missed.

    python benchmarks/check_targets.py [--json FILE] [options of peers.py]

FILE is what `peers.py --json` wrote. Without it our side of the works is timed now, on every
backend (as `peers.py --no-peer --backend all`, to which other options are passed on); targets that
compare with PyTorch are not measured then. Of several rows that one target is about, the worst is
shown. The status is 2 when no figure has a target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peers
from rich.table import Table
from suite import targets


def read_rows(path: str) -> list[targets.Row]:
    """Read what `peers.py` wrote."""
    try:
        rows: list[targets.Row] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not {"work", "backend", "loopos_s"} <= row.keys():
            raise argparse.ArgumentTypeError(
                f"{path}: expected the rows that peers.py --json writes"
            )
    return rows


def timed_now(options: list[str]) -> list[targets.Row]:
    """Time our side."""
    given = ["--no-peer", "--backend", "all", *options]
    return peers.compare(peers.parser().parse_args(given))[0]


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when every target that was measured is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=read_rows, metavar="FILE")
    asked, options = parser.parse_known_args(arguments)
    if asked.json is not None and options:
        parser.error(f"{options[0]} has no meaning with --json")
    rows = timed_now(options) if asked.json is None else asked.json
    rows = targets.with_ratios(rows)

    shown, judged, missed, absent = Table(), 0, 0, []
    for title in ("work", "backend", "peer", "figure", "target", "found", "x target", ""):
        shown.add_column(title)
    for target in targets.load():
        chosen = target.chooses
        meant = [row for row in rows if target.meant(row)]
        if not meant:
            absent.append(f"{chosen['work']} {target.figure}")
            continue
        worst = max(meant, key=target.multiple)
        multiple, judged = target.multiple(worst), judged + 1
        missed += multiple > 1
        verdict = "met" if multiple <= 1 else "MISSED"
        if len(meant) > 1:
            verdict += f" (worst of {len(meant)}: {worst['work']}, {worst['backend']})"
        shown.add_row(
            chosen["work"],
            chosen.get("backend", "any"),
            chosen.get("peer", "") + (", buckets" if chosen.get("buckets") else ""),
            target.figure,
            str(target),
            f"{worst[target.figure]:.3g}",
            f"{multiple:.2f}",
            verdict,
        )
    console = peers.wide_console()
    console.print(shown)
    if absent:
        console.print(f"not measured: {', '.join(dict.fromkeys(absent))}")
    console.print(f"{judged} targets measured, {missed} missed")
    if not judged:
        return 2
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
