"""A diagnosis: what is wrong with a run, by plain rules over its records."""

from __future__ import annotations

from dataclasses import dataclass

from loopos.reporting import rules, rules_policy, rules_reward
from loopos.reporting.findings import MIN_STEPS, Finding, ends, shown
from loopos.reporting.records import RunRecords

__all__ = ["RULES", "Diagnosis", "Finding", "diagnose"]

#: All rules, each a function of the records; the order is that of the findings.
RULES = (*rules.RULES, *rules_reward.RULES, *rules_policy.RULES)
#: Figures whose course a diagnosis tells whatever it finds, by what they are called there.
_TOLD = {
    "reward/score": "score",
    "kl/mean": "KL, nats a response",
    "entropy": "entropy, nats a token",
    "response/length": "tokens a response",
    "response/eos_fraction": "responses that end",
    "ppo/approx_kl": "KL of an update",
    "ppo/clip_fraction": "clipped tokens",
    "value/explained_variance": "explained variance",
    "loss": "loss",
    "rewards/accuracy": "pair accuracy in training",
    "tokens_per_s": "tokens/s",
}
#: The losses of these have no direction.
_WITHOUT_LOSS = "reward/score"
_HELD_OUT = ("reward/score", "loss", "accuracy", "f1_macro", "perplexity", "longer_accuracy",
             "length_correlation", "margin")  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of a run.

    Attributes
    ----------
    findings : list of Finding
        Problems first, then what should only be known.
    looked_at : dict of str to str
        The figures that were looked at, and how they went.
    short : bool
        Whether the run has too few steps to say how its figures move.
    """

    findings: list[Finding]
    looked_at: dict[str, str]
    short: bool

    @property
    def problems(self) -> list[Finding]:
        """The findings that make a run unhealthy."""
        return [finding for finding in self.findings if finding.problem]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line."""
        count, notes = len(self.problems), len(self.findings) - len(self.problems)
        also = f", {notes} {'note' if notes == 1 else 'notes'}" if notes else ""
        if count:
            return f"{count} {'problem' if count == 1 else 'problems'}{also}"
        few = f" (fewer than {MIN_STEPS} steps: too few to say how figures move)"
        return f"Nothing wrong was found{also}{few if self.short else ''}"


def diagnose(run: RunRecords) -> Diagnosis:
    """Apply every rule to a run and to its parts.

    Parameters
    ----------
    run : RunRecords
        As :func:`loopos.reporting.read_run` returns it.
    """
    everything = [run, *run.parts]
    found = [f for records in everything for rule in RULES if (f := rule(records)) is not None]
    found.sort(key=lambda finding: not finding.problem)
    looked_at: dict[str, str] = {}
    for records in everything:
        prefix = f"{records.name}: " if records.name else ""
        looked_at |= {prefix + name: course for name, course in _courses(records).items()}
    short = all(len(records.steps) < MIN_STEPS for records in everything)
    return Diagnosis(found, looked_at, short)


def _courses(run: RunRecords) -> dict[str, str]:
    courses = {}
    policy = _WITHOUT_LOSS in run.figures
    for name, said in _TOLD.items():
        series = run.series(name)
        if not len(series) or (policy and name == "loss"):
            continue
        found = ends(series)
        first, last = shown(float(series.values[0])), shown(float(series.values[-1]))
        courses[said] = str(found) if found is not None else f"{first} -> {last}"
    for name in _HELD_OUT:
        held_out = run.evaluated(name)
        if len(held_out):
            first, last = shown(float(held_out.values[0])), shown(float(held_out.values[-1]))
            shows = f"{first} -> {last}" if len(held_out) > 1 else last
            courses[f"held-out {name}"] = f"{shows} (step {held_out.steps[-1]})"
    return courses
