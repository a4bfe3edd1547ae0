#!/usr/bin/env python3
"""Compare what `loopos validate` says of a run with what the run takes; needs an idle machine.

    python benchmarks/validate_estimates.py [MODEL.gguf]

Three runs of the shipped configurations, and a LoRA run of SmolLM2-135M where its file is given.
Prints a line each, and exits 1 where memory is off by more than 15 % or time by more than 25 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loopos.config import load_config
from loopos.rehearsal import rehearse

RUN = """
import sys
from loopos.backends.memory import peak_bytes
from loopos.config import load_config
from loopos.runner import run
run(load_config(sys.argv[1], sys.argv[2:]))
print(peak_bytes())
"""
WIDE = {"d_model": 256, "num_heads": 4, "num_layers": 6, "d_ff": 1024, "vocab_size": 6000}
RUNS = {
    "fine_tuning as shipped": ("fine_tuning", []),
    "fine_tuning, batches of 1,500 tokens": (
        "fine_tuning",
        ["training.batch_tokens=1500", "training.gradient_accumulation_steps=2",
         "training.length_bucketing=true"],
    ),
    "pretraining, 6 layers of width 256": (
        "pretraining",
        ["training.max_steps=60", "training.num_epochs=null", "training.eval_steps=30",
         *(f"model.{name}={size}" for name, size in WIDE.items())],
    ),
}  # fmt: skip


def lora(model: str) -> tuple[str, list[str]]:
    """Return a short LoRA run of a model of 135 million parameters."""
    return "fine_tuning", [
        f"data.pretrained_weights={model}", "training.max_steps=40", "training.num_epochs=null",
        'training.lora={"rank": 8}', "training.learning_rate=5e-4", "training.max_length=128",
        "training.batch_size=16",
    ]  # fmt: skip


def main() -> int:
    """Return 1 where an estimate is too far off."""
    runs = dict(RUNS)
    if sys.argv[1:]:
        runs["SmolLM2-135M with LoRA"] = lora(str(Path(sys.argv[1]).resolve()))
    missed = 0
    for name, (source, overrides) in runs.items():
        with tempfile.TemporaryDirectory() as directory:
            given = [*overrides, f"data.output_dir={json.dumps(directory + '/run')}"]
            estimate = rehearse(load_config(source, given), given)
            started = time.perf_counter()
            command = [sys.executable, "-c", RUN, source, *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            took_s = time.perf_counter() - started
        took = int(done.stdout.splitlines()[-1])
        memory, spent = estimate.peak_bytes / took - 1, estimate.total_s / took_s - 1
        print(
            f"{name}: memory {estimate.peak_bytes / 2**20:.0f} of {took / 2**20:.0f} MiB "
            f"({memory:+.1%}), time {estimate.total_s:.1f} of {took_s:.1f} s ({spent:+.1%})",
            flush=True,
        )
        missed += abs(memory) > 0.15 or abs(spent) > 0.25
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
