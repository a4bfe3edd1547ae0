#!/usr/bin/env python3
"""Does DPO rank held-out preferences better than its reference? Rated film reviews, by seed.

    python benchmarks/dpo_preferences.py [--seeds 0,1,2] [--losses sigmoid,ipo]
        [--preferences FILE [--held-out FILE]] [--limit N] [--model DIRECTORY] [--json FILE]

The start, which is the reference too, is the shipped base model after a pass over the chosen
responses (--no-supervised leaves that out) or a model directory. Without --preferences, pairs are
made of the shipped rated sentences: two that begin with the same word, of which people found one
good and one bad; the word is the prompt. The pairs asked at the end come from the shipped held-out
sentences. A file without --held-out is split: 15 % of its prompts are asked.

Printed, for every seed with mean and spread (the standard deviation over seeds): the share of
held-out pairs whose chosen response has the higher

    implicit   implicit reward, beta (log pi - log pi_ref) of the sum over tokens, after training
    reference  log-probability under the reference, the sum over tokens
    per_token  the same, the mean over tokens
    policy     log-probability under the trained policy, the sum over tokens

The implicit reward is a difference of sums over tokens, so that "reference" is its like.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import loopos
from loopos.data.conversations import read_conversations
from loopos.data.preferences import Preferences, read_preferences
from loopos.data.readers import read_labelled
from loopos.data.responses import encode_responses
from loopos.data.tokenizer import load_tokenizer
from loopos.methods.dpo import DPOTrainer, Options
from loopos.methods.logprobs import response_sums
from loopos.methods.sft import Options as SupervisedOptions
from loopos.methods.sft import SupervisedFineTuner
from loopos.models.weights import load_model
from loopos.training.metrics import wins

ASSETS = Path(loopos.__file__).parent / "assets"
OPTIONS = Options(
    num_epochs=3, batch_size=16, learning_rate=3e-4, scheduler="linear", warmup_steps=20,
    max_grad_norm=1.0, beta=0.1, weight_decay=0.0,
)  # fmt: skip
SUPERVISED = SupervisedOptions(
    num_epochs=1, batch_size=16, learning_rate=3e-4, scheduler="linear", warmup_steps=20,
    max_grad_norm=1.0,
)  # fmt: skip
#: Share of a file's prompts that are asked at the end.
SHARE = 0.15
SHARES = ("implicit", "reference", "per_token", "policy")


def rated_pairs(file: Path, seed: int) -> list[dict[str, str]]:
    """Return pairs of a good and a bad sentence that begin alike; each sentence is in one."""
    data = read_labelled(file)
    names = data.label_names
    by_word: dict[str, dict[str, list[str]]] = defaultdict(lambda: {name: [] for name in names})
    for text, label in zip(data.texts, data.labels.tolist(), strict=True):
        word, _, rest = text.partition(" ")
        by_word[word][names[label]].append(" " + rest)
    rng, rows = np.random.default_rng(seed), []
    for word, found in by_word.items():
        good, bad = (rng.permutation(np.array(found[name], object)) for name in
                     ("positive", "negative"))  # fmt: skip
        rows += [{"prompt": word, "chosen": a, "rejected": b}
                 for a, b in zip(good, bad, strict=False)]  # fmt: skip
    return [rows[i] for i in rng.permutation(len(rows))]


def pairs_of(given: argparse.Namespace, seed: int) -> tuple[list[dict[str, Any]], ...]:
    """Return the pairs to learn from, and those to be asked."""
    if given.preferences is None:
        return tuple(rated_pairs(ASSETS / f"sentiment_{part}.csv", seed)
                     for part in ("train", "validation"))  # fmt: skip
    files = [given.preferences, *([given.held_out] if given.held_out else [])]
    read = [[json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
            for file in files]  # fmt: skip
    if given.held_out:
        return read[0], read[1]
    prompts = sorted({row["prompt"] for row in read[0]})
    rng = np.random.default_rng(seed)
    rng.shuffle(prompts)
    asked = set(prompts[: round(SHARE * len(prompts))])
    parts = [[row for row in read[0] if (row["prompt"] in asked) == held] for held in (False, True)]
    for part in parts:
        rng.shuffle(part)
    return parts[0], parts[1]


def ranked(values: Any) -> float:
    """Return the share of pairs whose chosen response has the higher value."""
    return float(wins(values[0::2] - values[1::2]).mean())


def measured(loss: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and rank."""
    training, held_out = pairs_of(given, seed)
    if given.limit:
        training = training[: given.limit]
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    began = time.perf_counter()
    if given.supervised:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in training]
        SupervisedFineTuner(model, tokenizer, seed=seed).fit(
            read_conversations(rows), options=SUPERVISED
        )
    changes = {"loss_type": loss, "learning_rate": given.learning_rate, "beta": given.beta,
               "num_epochs": given.epochs}  # fmt: skip
    trainer = DPOTrainer(model, tokenizer, seed=seed)
    asked: Preferences = read_preferences(held_out)
    result = trainer.fit(read_preferences(training), options=OPTIONS, **changes)
    figures = trainer.evaluate(asked, OPTIONS)
    encoded = encode_responses(tokenizer, asked, model.config.max_seq_len, "drop")
    assert trainer.reference is not None
    said, now = response_sums(trainer.reference, encoded), response_sums(model, encoded)
    lengths = encoded.response_lengths
    return {
        "loss_type": loss, "seed": seed, "training_pairs": len(training),
        "held_out_pairs": figures["count"], "left_out": figures["left_out"],
        "steps": result.steps, "implicit": figures["accuracy"],
        "reference": figures["reference_accuracy"], "per_token": ranked(said / lengths),
        "policy": ranked(now), "longer_chosen": ranked(lengths),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each loss and share: by seed, mean and spread."""
    lines = []
    for loss in dict.fromkeys(row["loss_type"] for row in rows):
        found = [row for row in rows if row["loss_type"] == loss]
        for name in SHARES:
            values = 100 * np.array([row[name] for row in found])
            by_seed = "  ".join(f"{row['seed']}: {v:5.1f}" for row, v in
                                zip(found, values, strict=True))  # fmt: skip
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            mean = f"mean {values.mean():5.1f} +- {spread:.1f}"
            lines.append(f"{loss:<8}{name:<10} {by_seed}   {mean}")
    return lines


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--losses", default="sigmoid")
    parser.add_argument("--preferences", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--limit", type=int, help="pairs to learn from at the most")
    parser.add_argument("--model", type=Path, default=ASSETS / "base_model")
    parser.add_argument("--no-supervised", dest="supervised", action="store_false")
    parser.add_argument("--learning-rate", type=float, default=OPTIONS.learning_rate)
    parser.add_argument("--beta", type=float, default=OPTIONS.strength)
    parser.add_argument("--epochs", type=int, default=OPTIONS.num_epochs)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for loss in given.losses.split(","):
        for seed in map(int, given.seeds.split(",")):
            rows.append(measured(loss, seed, given))
            print(json.dumps(rows[-1]), flush=True)
    print("\n".join(table(rows)))
    if given.json is not None:
        about = {
            "loopos": loopos.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "backend": loopos.get_backend().name, "rows": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
