"""Works of reinforcement learning: a whole PPO step, four networks of one size, random weights.

Nothing ends a response but its length: no token is the end of a text, on either side. E-ragged
alone has stop tokens, chosen so that its first responses are of the lengths asked for; it makes the
same step again and again, at a learning rate that changes no weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import loopos
from loopos.autograd import backward
from loopos.methods.losses import bradley_terry_loss_and_grad
from loopos.methods.ppo import Options, PPOTrainer, preset
from loopos.methods.reinforcement import ModelReward
from loopos.models.reward import RewardModel

from .works import GPT2, SEED_REASONING, Array, Work

#: Bytes of a weight that is trained (itself, its gradient, both moments of AdamW), and of another.
TRAINED_BYTES, FROZEN_BYTES = 16, 4
#: A rate at which no float32 weight of these models changes by more than rounding.
_STANDING_STILL = 1e-12


@dataclass(frozen=True)
class Reinforcement:
    """A PPO step: prompts of so many tokens, and how many tokens each is answered with.

    Attributes
    ----------
    config : TransformerConfig
        Of policy, reference, critic and reward model alike.
    prompt_tokens : int
    response_lengths : tuple of int
        One for each prompt.
    rollout_weights : str
        What responses are sampled with; all else is in float32.
    most_runs, most_warmup : int
        Steps are long, so in a process there are at the most so many of them.
    """

    config: loopos.TransformerConfig
    prompt_tokens: int
    response_lengths: tuple[int, ...]
    rollout_weights: str = "float32"
    most_runs: int = 7
    most_warmup: int = 4

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.response_lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return self.prompts * self.prompt_tokens + sum(self.response_lengths)

    @property
    def ragged(self) -> bool:
        """Whether responses differ in length."""
        return len(set(self.response_lengths)) > 1


def ragged_responses(count: int = 8, least: int = 4, most: int = 64) -> tuple[int, ...]:
    """Lengths of responses, evenly spread."""
    return tuple(int(n) for n in np.linspace(least, most, count).round())


_SEED = Reinforcement(SEED_REASONING, 8, (10,) * 8)
_GPT2 = Reinforcement(GPT2, 64, (64,) * 8, most_runs=3, most_warmup=1)
REINFORCEMENT = {
    "D": _SEED,
    "E": _GPT2,
    "E-ragged": replace(_GPT2, response_lengths=ragged_responses()),
    "E-bfloat16": replace(_GPT2, rollout_weights="bfloat16"),
    "E-int8": replace(_GPT2, rollout_weights="int8"),
}


def prompts(sizes: Reinforcement) -> Array:
    """Random ids, the same for all sides."""
    rng = np.random.default_rng(0)
    shape = (sizes.prompts, sizes.prompt_tokens)
    return rng.integers(1, sizes.config.vocab_size, shape)


def make_trainer(sizes: Reinforcement, **options: Any) -> PPOTrainer:
    """Return TRL's recipe on four networks: policy, reference, critic and reward model."""
    reward_model = RewardModel(loopos.Transformer(sizes.config, seed=1), seed=1)
    given = {
        "ppo_epochs": 1, "minibatches": 1, "batch_size": sizes.prompts,
        "max_new_tokens": max(sizes.response_lengths), "rollout_weights": sizes.rollout_weights,
    }  # fmt: skip
    policy = loopos.Transformer(sizes.config, seed=0)
    chosen = preset("trl", **given | options)
    return PPOTrainer(policy, None, ModelReward(reward_model), chosen, critic=reward_model)


def stop_ids_for(trainer: PPOTrainer, given: Array, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return tokens which end the responses of the next step at the lengths asked for.

    Raises
    ------
    ValueError
        If one of them comes earlier in another response.
    """
    rollout = trainer.sample(list(given))
    ends = rollout.response_offsets[:-1]
    rows = [rollout.targets[end : end + n] for end, n in zip(ends, lengths, strict=True)]
    longest = max(lengths)
    stops = {int(row[-1]) for row in rows if row.size < longest}
    early = [i for i, row in enumerate(rows) if stops & {int(t) for t in row[:-1]}]
    if early:
        raise ValueError(f"response {early[0]} would end before its length")
    return tuple(sorted(stops))


def ppo_step(sizes: Reinforcement) -> Work:
    """D, E: sample, score, one update of policy and critic. E-ragged: the same step each time."""
    return repeated(make_trainer(sizes), sizes, prompts(sizes))


def repeated(trainer: PPOTrainer, sizes: Reinforcement, given: Array) -> Work:
    """Return steps of a trainer on the same prompts."""
    if sizes.ragged:
        stops = stop_ids_for(trainer, given, sizes.response_lengths)
        trainer.options = replace(trainer.options, stop_ids=stops, learning_rate=_STANDING_STILL)
    start, rows = trainer.state(), list(given)
    records: list[dict[str, Any]] = []

    def run() -> None:
        if sizes.ragged:
            trainer.load_state(start)  # so that the same tokens are drawn
        record = trainer.step(rows)
        if record["tokens"] != sizes.tokens:
            raise RuntimeError(f"expected {sizes.tokens} tokens, found {record['tokens']}")
        records.append(record)

    def figures(runs: int) -> dict[str, float]:
        shares = [record["time/rollout_s"] / record["time_s"] for record in records[-runs:]]
        return {
            "tokens": sizes.tokens,
            "updates": records[-1]["ppo/updates"],
            "state_mb": needed_bytes(trainer) / 2**20,
            "rollout_share": statistics.median(shares),
        }

    return Work(
        run, sizes.tokens, figures=figures,
        most_runs=sizes.most_runs, most_warmup=sizes.most_warmup,
    )  # fmt: skip


def needed_bytes(trainer: PPOTrainer) -> int:
    """Return what a step cannot but hold: weights, gradients and moments, and frozen weights.

    The reward model is as large as the critic, which is a copy of it.
    """
    trained = sum(p.data.size for p in trainer.optimizer.parameters.values())
    held = sum(p.data.size for p in trainer.parameters().values())
    scoring = sum(p.data.size for p in trainer.critic.parameters().values())
    return TRAINED_BYTES * trained + FROZEN_BYTES * (held - trained + scoring)


def rlhf_epoch(passes: int) -> Work:
    """RLHF: an epoch of a reward model on as many pairs as prompts, and the whole step of D."""
    sizes = REINFORCEMENT["D"]
    given, length = prompts(sizes), sizes.prompt_tokens + sizes.response_lengths[0]
    trainer = make_trainer(sizes, ppo_epochs=passes)
    model = RewardModel(loopos.Transformer(sizes.config, seed=2), seed=2)
    optimizer = loopos.AdamW(model.parameters(), learning_rate=1e-5)
    answers = np.random.default_rng(1).integers(
        1, sizes.config.vocab_size, (2 * sizes.prompts, length - sizes.prompt_tokens)
    )
    pairs = loopos.Batch.from_sequences(list(np.hstack([np.vstack([given, given]), answers])))

    def run() -> None:
        scores = model.scores(pairs)
        _, count, *grads = bradley_terry_loss_and_grad(*np.split(scores.data, 2))
        backward([(scores, np.concatenate(grads))])
        optimizer.step(scale=1 / count)
        optimizer.zero_grad()
        trainer.step(list(given))

    return Work(run, pairs.num_tokens + sizes.tokens)


#: Every work by its name.
WORKS: dict[str, Callable[[], Work]] = {
    name: partial(ppo_step, sizes) for name, sizes in REINFORCEMENT.items()
} | {
    "RLHF": partial(rlhf_epoch, 1),
    "RLHF-default": partial(rlhf_epoch, Options().ppo_epochs),
}
