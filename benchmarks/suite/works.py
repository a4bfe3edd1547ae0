"""The works that are timed, built once and used by asv and by `benchmarks/report.py` alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import loopos
from loopos import ops
from loopos.backends import get_backend
from loopos.backends.op_cases import OpCase
from loopos.backends.testing import make_inputs, run_case
from loopos.models.heads import SequenceClassifier

TARGETS = json.loads(Path(__file__).parents[1].joinpath("targets.json").read_text())


def fine_tuning_epoch() -> Callable[[], None]:
    """The seed's default fine-tuning epoch: 20 texts of 15 tokens in batches of 16 and 4."""
    config = loopos.TransformerConfig(
        d_model=384, num_heads=8, num_layers=4, d_ff=1536, vocab_size=16000
    )
    model = SequenceClassifier(loopos.Transformer(config, seed=0), num_classes=10)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(1, 16000, (20, 15)), rng.integers(0, 10, 20)
    batches = [
        loopos.Batch.from_sequences(list(ids[part]), labels=labels[part])
        for part in (slice(0, 16), slice(16, 20))
    ]
    optimizer = loopos.AdamW(model.parameters(), learning_rate=1e-5)

    def epoch() -> None:
        for batch in batches:
            loss, count = ops.cross_entropy(model.logits(batch), batch.labels)
            loss.backward()
            optimizer.step(scale=1 / count)
            optimizer.zero_grad()

    return epoch


def pretraining_step() -> Callable[[], None]:
    """One AdamW step of GPT-2 124M's shape on 4 sequences of 256 tokens."""
    config = loopos.TransformerConfig(
        d_model=768, num_heads=12, num_layers=12, d_ff=3072, vocab_size=50257, max_seq_len=1024
    )
    model = loopos.Transformer(config, seed=0)
    rng = np.random.default_rng(0)
    batch = loopos.Batch.from_sequences(list(rng.integers(0, 50257, (4, 256))))
    optimizer = loopos.AdamW(model.parameters(), learning_rate=1e-5)

    def step() -> None:
        loss, count = model.next_token_loss(batch)
        loss.backward()
        optimizer.step(scale=1 / count)
        optimizer.zero_grad()

    return step


def op(case: OpCase) -> Callable[[], object]:
    """One op forward and backward in float32 on the backend in force."""
    inputs, backend = make_inputs(case, np.float32), get_backend()
    return lambda: run_case(backend, case, inputs)
