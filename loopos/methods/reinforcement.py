"""Learning from human preferences, whole: a reward model, then PPO against it.

    trainer = ReinforcementTrainer(loopos.load_model("policy"), tokenizer)
    trainer.train_reward_model("preferences.jsonl", learning_rate=1e-5)
    trainer.ppo_train(prompts, batch_size=8)
    trainer.generate_with_rl(["Say hello."])

The one method that is made of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopos.autograd import Array, no_grad
from loopos.data.batch import Batch
from loopos.data.preferences import Render
from loopos.data.tokenizer import Tokenizer
from loopos.errors import ConfigError
from loopos.generation import SamplingOptions, generate
from loopos.methods.common import in_order, with_overrides
from loopos.methods.language_model import require_same_vocabulary
from loopos.methods.policy_state import copy_of
from loopos.methods.ppo import Options, PPOTrainer
from loopos.methods.reward_model import Options as RewardOptions
from loopos.methods.reward_model import RewardTrainer
from loopos.models.reward import RewardModel
from loopos.models.transformer import Transformer
from loopos.training.loop import TrainResult

__all__ = ["ModelReward", "ReinforcementTrainer"]


class ModelReward:
    """Scores what was sampled by a reward model, token for token: nothing is encoded again.

    Parameters
    ----------
    model : RewardModel
        Of the policy's vocabulary; it is not changed.
    """

    def __init__(self, model: RewardModel):
        self.model = model

    def score(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        answers: Sequence[Any] | None = None,
        *,
        prompt_ids: Sequence[Array],
        response_ids: Sequence[Array],
    ) -> Array:
        """Return the score at the last token of each response."""
        whole = [np.concatenate(pair) for pair in zip(prompt_ids, response_ids, strict=True)]
        lengths = np.array([ids.size for ids in whole])
        scores = np.zeros(len(whole), self.model.body.dtype)
        with no_grad():
            for which in in_order(lengths):
                batch = Batch.from_sequences([whole[i] for i in which])
                scores[which] = self.model.scores(batch).data
        return scores


class ReinforcementTrainer:
    """Trains a reward model and, against it, a policy.

    Parameters
    ----------
    policy : Transformer
        Trained in place by PPO; the reward model starts from a copy of it.
    tokenizer : Tokenizer
    reward : optional
        In place of a reward model, or beside it where `reward_weight` is given: anything that
        :class:`loopos.methods.rewards.Reward` takes as one reward.
    reward_weight : float, optional
        Of `reward`, which is then added to the reward model's score.
    reward_model : RewardModel, optional
        A trained one.
    options : Options, optional
        Of PPO.
    reference : Transformer, optional
        In place of a copy of the start.
    chat : callable, optional
        Writes preferences that are conversations, as :class:`RewardTrainer` takes it.
    seed : int
    **overrides
        Options of PPO by name.

    Attributes
    ----------
    rewards : RewardTrainer
        What trains the reward model, and scores with it.
    ppo : PPOTrainer or None
        What trains the policy, from the first step on.

    Raises
    ------
    ConfigError
        If an option has no such name or value, or the reward model another vocabulary.
    """

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer,
        *,
        reward: Any = None,
        reward_weight: float | None = None,
        reward_model: RewardModel | None = None,
        options: Options | None = None,
        reference: Transformer | None = None,
        chat: Render | None = None,
        seed: int = 0,
        **overrides: Any,
    ):
        if reward_weight is not None and reward is None:
            raise ConfigError("reward_weight: there is no reward that it is the weight of")
        self.policy, self.tokenizer, self.seed = policy, tokenizer, seed
        self.options = with_overrides(options or Options(), overrides)
        self._reward, self._weight, self._reference = reward, reward_weight, reference
        if reward_model is not None:
            require_same_vocabulary(reward_model.body, policy, "the reward model")
        start = RewardModel(copy_of(policy), seed) if reward_model is None else reward_model
        self.rewards = RewardTrainer(start, tokenizer, chat=chat, seed=seed)
        self._has_model = reward_model is not None
        self.ppo: PPOTrainer | None = None

    @property
    def reward_model(self) -> RewardModel:
        """The reward model, trained or not."""
        return self.rewards.reward_model

    def train_reward_model(
        self,
        training_data: Any,
        validation_data: Any = None,
        options: RewardOptions | None = None,
        **more: Any,
    ) -> TrainResult:
        """Train the reward model on preferences; see :meth:`RewardTrainer.fit`.

        Raises
        ------
        ConfigError
            If PPO has begun: its reward must not change under it.
        """
        if self.ppo is not None:
            raise ConfigError("PPO has begun with the reward model as it was; make a new trainer")
        result = self.rewards.fit(training_data, validation_data, options, **more)
        self._has_model = True
        return result

    def compute_reward(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the reward model's score of each response; see :meth:`RewardTrainer.score`."""
        return self.rewards.score(prompts, responses)

    def ppo_train_step(
        self, prompts: Sequence[Any], answers: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Sample, score and update once; return the record of :meth:`PPOTrainer.step`."""
        return self._trainer().step(prompts, answers)

    def ppo_train(
        self, prompts: Sequence[Any], validation_prompts: Sequence[Any] | None = None, **run: Any
    ) -> TrainResult:
        """Run over prompts; see :meth:`PPOTrainer.fit`."""
        return self._trainer().fit(prompts, validation_prompts, **run)

    def generate_with_rl(
        self, prompts: Sequence[str], options: SamplingOptions | None = None, **overrides: Any
    ) -> list[str]:
        """Let the policy answer prompts; see :func:`loopos.generate`."""
        policy = self.policy if self.ppo is None else self.ppo.policy
        found = generate(policy, prompts, options, tokenizer=self.tokenizer, **overrides)
        return [generation.text or "" for generation in found]

    def save(self, directory: str | Path) -> None:
        """Write ``policy`` and, if there is one, ``reward_model`` into a directory."""
        policy = self.policy if self.ppo is None else self.ppo.policy
        policy.save(Path(directory) / "policy", self.tokenizer)
        if self._has_model:
            self.rewards.save(Path(directory) / "reward_model")

    def _trainer(self) -> PPOTrainer:
        """Return what trains the policy, made when it is first asked for."""
        if self.ppo is None:
            critic = None
            parts: Any = self._reward
            if self._reward is None or self._weight is not None:
                if not self._has_model:
                    raise ConfigError(
                        "there is no reward: call train_reward_model() first, or give a reward"
                    )
                model = ModelReward(self.reward_model)
                parts = model if self._weight is None else {
                    "model": (model, 1.0), "extra": (self._reward, self._weight)}  # fmt: skip
                if self.options.critic == "separate":
                    critic = self.reward_model
            self.ppo = PPOTrainer(
                self.policy, self.tokenizer, parts, self.options, reference=self._reference,
                critic=critic, seed=self.seed,
            )  # fmt: skip
        return self.ppo
