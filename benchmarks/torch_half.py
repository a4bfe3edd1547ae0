#!/usr/bin/env python3
"""PyTorch's half of a comparison: one work in one process, warm, as JSON on the last line.

    python benchmarks/torch_half.py WORK [--dtype float32|bfloat16] [--compile] [--buckets]
        [--runs 7] [--warmup 4] [--threads 2] [--weights DIR]

A: the seed's fine-tuning epoch. B: its chain-of-thought epoch, the language-model step. C: a GPT-2
124M step on 4 x 256 tokens. K: the same on 32 ragged sequences, padded, or with --buckets in four
batches by length. L1, L2: causal attention forward and backward on 1 x 2048 and 16 x 128 tokens, 12
heads of 64. With --weights, the weights and token ids that `loopos_half.py --export` wrote there
are used, and the loss before the first step is given too. Needs torch and transformers, and nothing
of loopos.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
ATTENTION_SIZES = {"L1": (1, 2048), "L2": (16, 128)}
WORKS = ("A", "B", "C", "K", *ATTENTION_SIZES)
Batches = list[dict[str, Any]]
Step = Callable[[], Any]


def seed_config(num_layers: int, **other: Any) -> GPT2Config:
    """The sizes of the seed's shipped configurations."""
    return GPT2Config(
        vocab_size=16000, n_positions=512, n_embd=384, n_layer=num_layers, n_head=8, n_inner=1536,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, **NO_DROPOUT, **other,
    )  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 124M."""
    return GPT2LMHeadModel(GPT2Config(**NO_DROPOUT, pad_token_id=50256))


def ragged_lengths() -> list[int]:
    """The lengths of K."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log(60), 0.8, 32)).astype(int)
    return [int(n) for n in np.clip(drawn, 16, 256)]


def random_sequences(vocab_size: int, lengths: list[int]) -> list[torch.Tensor]:
    """Random ids other than 0, which pads."""
    return [torch.randint(1, vocab_size, (n,)) for n in lengths]


def exported_sequences(directory: Path) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Read the token ids, and the labels if there are any."""
    with np.load(directory / "data.npz") as data:
        tokens = torch.from_numpy(data["tokens"].astype(np.int64))
        labels = torch.from_numpy(data["labels"].astype(np.int64)) if "labels" in data else None
        return list(tokens.split(np.diff(data["offsets"]).tolist())), labels


def load_weights(model: Any, directory: Path) -> None:
    """Put exported weights into a model that has been made."""
    from safetensors.torch import load_file

    model.transformer.load_state_dict(GPT2Model.from_pretrained(directory).state_dict())
    if isinstance(model, GPT2ForSequenceClassification):
        # The exported head has a bias too, of zeros before the first step.
        head = load_file(directory / "classifier.safetensors")
        with torch.no_grad():
            model.score.weight.copy_(head["classifier.weight"])


def classification(sequences: list[torch.Tensor], labels: torch.Tensor | None) -> Batches:
    """Batches of 16 and 4."""
    ids = torch.stack(sequences)
    y = torch.randint(0, 10, (20,)) if labels is None else labels
    return [{"input_ids": ids[:16], "labels": y[:16]}, {"input_ids": ids[16:], "labels": y[16:]}]


def padded(sequences: list[torch.Tensor], buckets: bool) -> Batches:
    """One padded batch, or four of sequences sorted by length."""
    ordered = sorted(sequences, key=len) if buckets else sequences
    batches = []
    for part in np.array_split(np.arange(len(ordered)), 4 if buckets else 1):
        rows = [ordered[i] for i in part]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def training_data(asked: argparse.Namespace) -> tuple[Any, Batches, int]:
    """Return the model, its batches and how many tokens count."""
    lengths = {"A": [15] * 20, "B": [26] * 10, "C": [256] * 4, "K": ragged_lengths()}[asked.work]
    if asked.work == "A":
        model: Any = GPT2ForSequenceClassification(seed_config(4, num_labels=10))
    else:
        model = GPT2LMHeadModel(seed_config(6)) if asked.work == "B" else gpt2()
    if asked.weights is None:
        sequences, labels = random_sequences(model.config.vocab_size, lengths), None
    else:
        sequences, labels = exported_sequences(asked.weights)
        load_weights(model, asked.weights)
    if asked.work == "A":
        batches = classification(sequences, labels)
    elif asked.work == "K":
        batches = padded(sequences, asked.buckets)
    else:
        ids = torch.stack(sequences)
        batches = [{"input_ids": ids, "labels": ids}]
    return model, batches, sum(lengths)


def training(asked: argparse.Namespace) -> tuple[Step, int, float | None]:
    """Return one epoch as a callable, how many tokens count, and the first loss if asked for."""
    model, batches, tokens = training_data(asked)
    first_loss = None
    if asked.weights is not None:
        with torch.no_grad():
            first_loss = model(**batches[0]).loss.item()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    forward = torch.compile(model) if asked.compile else model
    accumulates = asked.work == "K"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for i, batch in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=asked.dtype == "bfloat16"):
                loss = forward(**batch).loss
            loss.backward()
            if not accumulates or i == len(batches) - 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return step, tokens, first_loss


def attention(sequences: int, length: int, dtype: str) -> tuple[Step, int, None]:
    """Causal attention alone, forward and backward."""
    shape = (sequences, 12, length, 64)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    q, k, v = (torch.randn(shape, dtype=kind, requires_grad=True) for _ in range(3))
    dy, attend = torch.randn(shape, dtype=kind), torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True).backward(dy), sequences * length, None


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--buckets", action="store_true")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    if asked.work in ATTENTION_SIZES:
        step, tokens, first_loss = attention(*ATTENTION_SIZES[asked.work], asked.dtype)
    else:
        step, tokens, first_loss = training(asked)
    for _ in range(asked.warmup):
        step()
    times = []
    for _ in range(asked.runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    found = {
        "work": asked.work,
        "dtype": asked.dtype,
        "peer": "torch-compile" if asked.compile else "torch-eager",
        "buckets": asked.buckets,
        "peer_s": round(median, 5),
        "min_s": round(min(times), 5),
        "tokens_per_s": round(tokens / median, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": asked.threads,
    }
    print(json.dumps(found | ({} if first_loss is None else {"first_loss": first_loss})))


if __name__ == "__main__":
    main()
