"""``loopos report`` and ``loopos doctor``: what the records of a run say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopos.display import say

if TYPE_CHECKING:
    from loopos.reporting import Finding

__all__ = ["doctor", "report"]

_RUN = typer.Argument(metavar="RUN", help="A run directory.")


def report(
    run: Annotated[Path, _RUN],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="[RUN/report.html]")
    ] = None,
) -> None:
    """Write a page of a run, with curves and samples.

    One HTML file that needs nothing else, for any browser: what the doctor says, curves, samples,
    figures, data, configuration. A run that still goes on, or was killed, has its page too.
    """
    from loopos.reporting import write_report

    say(f"written to {write_report(run, output)}")


def doctor(
    run: Annotated[Path, _RUN],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is wrong with a run, if anything.

    In plain words, with the figures and steps that show it, and what to change. Exits with 0 when
    nothing is wrong (notes apart), 1 when something is, 2 when RUN is no run.
    """
    from loopos.reporting import diagnose, read_run

    found = diagnose(read_run(run))
    if as_json:
        values = {
            "healthy": found.healthy,
            "verdict": found.verdict,
            "findings": [asdict(finding) for finding in found.findings],
            "looked_at": found.looked_at,
        }
        say(json.dumps(values, indent=2))
        raise typer.Exit(0 if found.healthy else 1)
    say(f"{run}: {found.verdict[0].lower()}{found.verdict[1:]}")
    for finding in found.findings:
        _show(finding)
    say()
    say("looked at")
    width = max(map(len, found.looked_at), default=0)
    for name, course in found.looked_at.items():
        say(f"  {name:<{width}}  {course}")
    raise typer.Exit(0 if found.healthy else 1)


def _show(finding: Finding) -> None:
    """Print a finding: what, where, the figures, what to change."""
    import textwrap

    places = ", ".join(filter(None, (finding.part, finding.where)))
    grade = "problem" if finding.problem else "note"
    say()
    say(f"{grade}: {finding.what}" + (f" ({places})" if places else ""))
    for name, text in (("seen", finding.evidence), ("change", finding.advice)):
        lines = textwrap.wrap(text, 88, break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines):
            say(f"  {name if not number else '':<8}{line}")
