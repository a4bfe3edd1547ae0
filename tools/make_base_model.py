"""Pretrain the small language model that ships inside the package, with loopos itself.

    python tools/make_assets.py
    python tools/make_base_model.py

Reads ``build/demo/pretraining.jsonl``, trains a byte-level BPE tokenizer and a GPT-2-shaped model
on it, and writes ``loopos/assets/base_model/`` with a model card. The same seed gives the same
bytes on the same machine; the script prints their sha256. ``--max-steps 20`` tries it out, and
writes to ``build/demo/trial`` instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import loopos
from loopos.backends.threads import blas, thread_limit
from loopos.data.readers import read_texts
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.methods.pretraining import Options, Pretrainer
from loopos.training.loop import TrainResult
from loopos.training.trackers import ConsoleProgress

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "build" / "demo" / "pretraining.jsonl"
HELD_OUT = ROOT / "loopos" / "assets" / "sentiment_validation.csv"
TARGET = ROOT / "loopos" / "assets" / "base_model"
TRIAL = ROOT / "build" / "demo" / "trial"

SEED = 0
SIZES: dict[str, Any] = {
    "d_model": 128,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 512,
    "vocab_size": 4096,
    "max_seq_len": 128,
    "dropout": 0.1,
}
OPTIONS: dict[str, Any] = {
    "num_epochs": 12,
    "batch_tokens": 2048,
    "length_bucketing": True,
    "learning_rate": 3e-3,
    "scheduler": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "max_grad_norm": 1.0,
}


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pretrain(max_steps: int | None) -> tuple[Pretrainer, TrainResult, float]:
    """Return the trained model, what the run recorded, and its wall-clock seconds."""
    training, held_out = read_texts(TEXT), read_texts(HELD_OUT)
    tokenizer: Tokenizer = train_bpe(training.texts, SIZES["vocab_size"])
    model = loopos.Transformer(loopos.TransformerConfig(**SIZES, family="gpt2"), seed=SEED)
    pretrainer = Pretrainer(model, tokenizer, seed=SEED)
    options = Options(**OPTIONS, max_steps=max_steps)
    print("\n".join(pretrainer.report(training, held_out).lines()))
    print(f"{model.num_parameters():,} parameters")
    started = time.perf_counter()
    # One thread, so that sums have the same order on a machine with more cores.
    with thread_limit(1):
        result = pretrainer.fit(training, held_out, options, callbacks=[ConsoleProgress()])
    return pretrainer, result, time.perf_counter() - started


def card(pretrainer: Pretrainer, result: TrainResult, seconds: float, directory: Path) -> str:
    """Return the model card."""
    curve = []
    for record in result.evaluations:
        step, held_out = record["step"], record["eval"]
        last = [r["loss"] for r in result.history if step - 50 < r["step"] <= step]
        curve.append(
            f"| {step} | {sum(last) / len(last):.4f} | {held_out['loss']:.4f} "
            f"| {held_out['perplexity']:.1f} |"
        )
    files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors"))
    hashes = "\n".join(f"| `{path.name}` | `{sha256(path)}` |" for path in files)
    tokens = sum(record["tokens"] for record in result.history)
    newline = "\n"
    return f"""# The embedded base model

A GPT-2-shaped language model of {pretrainer.model.num_parameters():,} parameters over a byte-level
BPE vocabulary, made to be fine-tuned by `loopos demo`. It knows little beside the tone of reviews:
use it to try things out, not to write text.

- **Made by** loopos {loopos.__version__}, `python tools/make_base_model.py`, seed {SEED},
  on {date.today().isoformat()}, in {seconds / 60:.0f} minutes on one core of a
  {platform.machine()} machine ({blas().name}).
- **Text**: `build/demo/pretraining.jsonl` of `tools/make_assets.py` (sha256
  `{sha256(TEXT)}`): the sentences
  of `vaderSentiment` 3.3.2 (MIT licence, `../LICENSE-vader.txt`) from film reviews, product
  reviews, tweets and news, without their ratings, and without the sentences of
  `../sentiment_validation.csv`, on which the held-out loss is measured.
- **Licence** of these weights: MIT, as loopos.
- **Do not** judge it, or what is fine-tuned from it, on SST-2, MR or other sets cut from the same
  film reviews: their sentences are in its text.

Sizes: `{json.dumps(SIZES)}`.

Training: `{json.dumps(OPTIONS)}`, AdamW, {result.steps:,} steps of {tokens / result.steps:,.0f}
tokens on average.

Losses in nats per token; the training loss, with dropout, is the mean of the last 50 steps.

| step | training loss | held-out loss | held-out perplexity |
|---|---|---|---|
{newline.join(curve)}

| file | sha256 |
|---|---|
{hashes}
"""


def main() -> None:
    """Pretrain, save, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-steps", type=int, help="try out: stop early, write elsewhere")
    max_steps = parser.parse_args().max_steps
    directory = TARGET if max_steps is None else TRIAL
    pretrainer, result, seconds = pretrain(max_steps)
    pretrainer.save(directory)
    text = card(pretrainer, result, seconds, directory)
    (directory / "README.md").write_text(text, encoding="utf-8")
    for path in sorted(directory.iterdir()):
        print(f"{sha256(path)}  {path.stat().st_size:>9,} bytes  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
