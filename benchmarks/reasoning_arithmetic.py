#!/usr/bin/env python3
"""Does reasoning pay? A small model learns word problems, with steps and without, by seed.

    python benchmarks/reasoning_arithmetic.py [--seeds 0,1,2] [--arms steps,answers,half,star]
        [--max-steps N] [--output FILE]

Problems have three calculations; those asked at the end share none with those learnt from. "steps"
is what `loopos demo chain_of_thought` trains. "answers" is the same model with as many training
tokens, all of answers alone. "half" has a sixth of the problems, and steps for half of these, over
several epochs; "star" goes on from there: one round of sampled solutions, those that reach the
right answer kept. Each arm is asked greedily and with a vote over ten samples. Prints a JSON
object for each seed and arm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from loopos.data.problems import make_problems
from loopos.data.reasoning import ReasoningExample, ReasoningExamples, read_reasoning
from loopos.demo_reasoning import ASKED, LEVEL, OPTIONS, PROBLEMS, fresh
from loopos.methods.chain_of_thought import Options

ARMS = ("steps", "answers", "half", "star")
#: Problems of "half" and "star".
FEW = PROBLEMS // 6


def training_set(arm: str, seed: int) -> ReasoningExamples:
    """Return what an arm learns from: answers alone are about half as many tokens."""
    count = {"steps": PROBLEMS, "answers": 3 * PROBLEMS}.get(arm, FEW)
    examples = read_reasoning(make_problems(count, seed=seed, levels=(LEVEL,)))
    if arm in ("steps", "answers"):
        return examples
    labelled = [
        example if i % 2 else ReasoningExample(example.problem, (), example.answer)
        for i, example in enumerate(examples)
    ]
    return ReasoningExamples.of(labelled)


def options_of(arm: str, max_steps: int | None) -> Options:
    """Return an arm's options; without steps a text is shorter, so that there are more of them."""
    steps = max_steps or OPTIONS.max_steps
    assert steps is not None
    if arm == "answers":
        return dataclasses.replace(
            OPTIONS, with_steps=False, max_steps=2 * steps, max_new_tokens=12
        )
    changes: dict[str, Any] = {"max_steps": steps}
    if arm in ("half", "star"):
        changes |= {"num_epochs": 100, "rounds": 1 if arm == "star" else 0}
    return dataclasses.replace(OPTIONS, **changes)


def measured(arm: str, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Train and ask."""
    start = time.perf_counter()
    examples, options = training_set(arm, seed), options_of(arm, max_steps)
    unseen = read_reasoning(make_problems(ASKED, seed=seed, levels=(LEVEL,), split="test"))
    cot = fresh(examples, seed)
    if arm == "half":
        examples = examples.take([i for i, example in enumerate(examples) if example.steps])
    result = cot.fit(examples, options=options)
    trained = time.perf_counter() - start
    figures = cot.evaluate(unseen, options)
    kept = ("accuracy", "accuracy_voted", "format_errors", "asked")
    return {
        "seed": seed,
        "arm": arm,
        "steps": result.steps,
        "tokens": sum(record["tokens"] for record in result.history),
        "training_s": round(trained, 1),
        **{name: figures[name] for name in kept},
    }


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    arms = asked.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms: unknown arm '{unknown[0]}' (known: {', '.join(ARMS)})")
    rows = []
    for seed in map(int, asked.seeds.split(",")):
        for arm in arms:
            rows.append(measured(arm, seed, asked.max_steps))
            print(json.dumps(rows[-1]), flush=True)
    if asked.output is not None:
        asked.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
