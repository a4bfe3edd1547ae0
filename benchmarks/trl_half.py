#!/usr/bin/env python3
"""TRL's half of a comparison of PPO steps: one work in one process, JSON on the last line.

    python benchmarks/trl_half.py WORK [--runs 7] [--warmup 4] [--threads 2]

D: four networks of the seed's size (6 layers, d_model 384, vocabulary 16000), 8 prompts of 8 tokens
with responses of 10. E: four GPT-2 124M, 8 prompts of 64 with responses of 64. One epoch and one
minibatch a step, AdamW, float32, random weights, temperature 0.7. TRL's own loop runs, all its
steps in one call, and each is timed from the end of the one before; what it saves, evaluates or
draws beside them is off, and so are gradient checkpointing and bf16, which it has on by default.
Needs trl 1.9.2, the last that has a PPO trainer, and nothing of loopos.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

warnings.filterwarnings("ignore")
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

SEED = {
    "vocab_size": 16000, "n_positions": 512, "n_embd": 384, "n_layer": 6, "n_head": 8,
    "n_inner": 1536,
}  # fmt: skip
PROMPTS = 8


@dataclass(frozen=True)
class Sizes:
    """A work."""

    config: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    most_runs: int = 7
    most_warmup: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return PROMPTS * (self.prompt_tokens + self.new_tokens)


WORKS = {"D": Sizes(SEED, 8, 10), "E": Sizes({}, 64, 64, most_runs=3, most_warmup=1)}


def prompts(vocab_size: int, tokens: int) -> np.ndarray:
    """Random ids, the same as ours."""
    return np.random.default_rng(0).integers(1, vocab_size, (PROMPTS, tokens))


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One whose padding and end of text are outside the models' vocabulary: never sampled."""
    words = {str(i): i for i in range(vocab_size)} | {"<pad>": vocab_size, "<end>": vocab_size + 1}
    words["<unk>"] = vocab_size + 2
    inside = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


class Clock(TrainerCallback):
    """Notes when each step of the loop has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def counted(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return `call` with its seconds noted."""

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = call(*given, **named)
        seconds.append(time.perf_counter() - start)
        return found

    return timed


def make_trainer(sizes: Sizes, steps: int, directory: str, clock: Clock) -> PPOTrainer:
    """Return TRL's trainer of so many steps."""
    config = GPT2Config(
        **sizes.config, num_labels=1, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    critic, reward = (GPT2ForSequenceClassification(config) for _ in range(2))
    critic.load_state_dict(reward.state_dict())
    given = policy.generation_config
    given.bos_token_id = given.eos_token_id = given.pad_token_id = None  # nothing ends a response
    options = PPOConfig(
        output_dir=directory, report_to="none", save_strategy="no", eval_strategy="no",
        num_sample_generations=0, disable_tqdm=True, use_cpu=True, bf16=False, seed=0,
        gradient_checkpointing=False, dataloader_pin_memory=False,
        learning_rate=3e-6, per_device_train_batch_size=PROMPTS, gradient_accumulation_steps=1,
        num_ppo_epochs=1, num_mini_batches=1, total_episodes=PROMPTS * steps,
        local_rollout_forward_batch_size=PROMPTS, response_length=sizes.new_tokens,
        temperature=0.7, kl_coef=0.05,
    )  # fmt: skip
    ids = prompts(policy.config.vocab_size, sizes.prompt_tokens)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    return PPOTrainer(
        args=options, processing_class=tokenizer(policy.config.vocab_size), model=policy,
        ref_model=reference, reward_model=reward, value_model=critic, train_dataset=data,
        eval_dataset=data, callbacks=[clock],
    )  # fmt: skip


def steps_of(sizes: Sizes, runs: int, warmup: int) -> dict[str, Any]:
    """Run TRL's loop; return what its last `runs` steps took and did."""
    clock, sampling, updates = Clock(), [], []
    shapes: list[tuple[int, ...]] = []

    def sampled(*given: Any, **named: Any) -> Any:
        tokens, logits = generation(*given, **named)
        shapes.append(tuple(tokens.shape))
        return tokens, logits

    generation, whole = ppo_trainer.batch_generation, warmup + runs
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(sizes, whole, directory, clock)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.optimizer.step = counted(trainer.optimizer.step, updates)
        ppo_trainer.batch_generation = counted(sampled, sampling)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints its figures
                trainer.train()
        finally:
            ppo_trainer.batch_generation = generation
    expected = (PROMPTS, sizes.prompt_tokens + sizes.new_tokens)
    if shapes != [expected] * whole:
        raise SystemExit(f"expected tokens of shape {expected}, found {set(shapes)}")
    times = np.diff(clock.ends)[-runs:]
    middle = float(np.median(times))
    return {
        "peer_s": round(middle, 5),
        "min_s": round(float(times.min()), 5),
        "tokens": sizes.tokens,
        "updates": len(updates) // whole,
        "trained": trained,
        "rollout_share": float(np.median(np.array(sampling[-runs:]) / times)),
        "tokens_per_s": round(sizes.tokens / middle, 1),
    }


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    sizes = WORKS[asked.work]
    warmup = min(asked.warmup, sizes.most_warmup)
    found = steps_of(sizes, min(asked.runs, sizes.most_runs), warmup)
    known = {"work": asked.work, "dtype": "float32", "peer": "trl", "threads": asked.threads}
    memory = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    print(json.dumps(known | found | memory))


if __name__ == "__main__":
    main()
