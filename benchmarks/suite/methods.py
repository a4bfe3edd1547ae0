"""Whole methods by their public `fit`, on small made data: seconds of an epoch after the first.

Those that are not timed elsewhere: `works` has fine-tuning and chain of thought, `reinforcement`
PPO. All are of the seed's sizes: 6 layers, d_model 384, vocabulary 16000; a token is a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import loopos
from loopos.data.conversations import read_conversations
from loopos.data.preferences import Preferences, read_preferences
from loopos.data.readers import Texts
from loopos.data.tokenizer import Tokenizer, train_bpe
from loopos.methods.dpo import DPOTrainer
from loopos.methods.grpo import GRPOTrainer
from loopos.methods.pretraining import Pretrainer
from loopos.methods.reinforcement import ModelReward
from loopos.methods.reward_model import RewardTrainer
from loopos.methods.sft import SupervisedFineTuner
from loopos.models.reward import RewardModel

from . import reinforcement, works
from .works import REASONING_LENGTHS, SEED_REASONING, Work

#: Of the pairs and of GRPO's prompts: those of the seed's default RLHF epoch.
SIZES = reinforcement.REINFORCEMENT["D"]
#: Responses to each of GRPO's prompts: in one pass it learns from as many as RLHF in four.
GROUP = 4
#: GRPO's epochs are longer than the others', so fewer are enough.
_MORE_OF_GRPO = 4
#: Each text is closed by one token more.
_END = 1
#: Of the tokens of a conversation, those of its prompt.
PROMPT = 10


def _text(length: int, number: int, of: str) -> str:
    """Return a text of so many bytes, unlike others of another number or kind."""
    begin = f"{of}{number} "
    return begin + "x" * (length - len(begin))


def _model(seed: int = 0) -> loopos.Transformer:
    return loopos.Transformer(SEED_REASONING, seed=seed)


def _bytes() -> Tokenizer:
    return train_bpe([], 257)


def pretraining_epoch() -> Work:
    """Ten texts of 26 tokens, one batch."""
    texts = [_text(n - _END, i, "t") for i, n in enumerate(REASONING_LENGTHS)]
    data = Texts(texts, [f"text {i}" for i in range(len(texts))])
    trainer = Pretrainer(_model(), _bytes())
    return works.whole_epochs(
        lambda count: trainer.fit(data, num_epochs=count, batch_size=16, learning_rate=1e-5),
        sum(REASONING_LENGTHS),
    )


def sft_epoch() -> Work:
    """Ten prompts of 10 tokens with completions of 16, one batch; completions count alone."""
    data = read_conversations([
        {"prompt": _text(PROMPT, i, "p"), "completion": _text(n - PROMPT - _END, i, "c")}
        for i, n in enumerate(REASONING_LENGTHS)
    ])  # fmt: skip
    trainer = SupervisedFineTuner(_model(), _bytes())
    return works.whole_epochs(
        lambda count: trainer.fit(data, num_epochs=count, batch_size=16, learning_rate=1e-5),
        sum(REASONING_LENGTHS),
    )


def preferences() -> Preferences:
    """Return as many pairs as there are prompts, of their lengths and those of the responses."""
    return read_preferences([
        {"prompt": _text(SIZES.prompt_tokens, i, "p"), "chosen": _text(n - _END, i, "c"),
         "rejected": _text(n - _END, i, "r")}
        for i, n in enumerate(SIZES.response_lengths)
    ])  # fmt: skip


def _pairs(trainer: RewardTrainer | DPOTrainer) -> Work:
    """Epochs on the pairs, in one batch."""
    data = preferences()
    return works.whole_epochs(
        lambda count: trainer.fit(
            data, num_epochs=count, batch_size=SIZES.prompts, learning_rate=1e-5
        ),
        2 * SIZES.tokens,
    )


def reward_model_epoch() -> Work:
    """Eight pairs of answers of 10 tokens to prompts of 8, one batch."""
    return _pairs(RewardTrainer(_model(), _bytes()))


def dpo_epoch() -> Work:
    """The same pairs; what the reference says of them is computed once, in the first epoch."""
    return _pairs(DPOTrainer(_model(), _bytes()))


def grpo_epoch() -> Work:
    """Eight prompts of 8 tokens, four responses of 10 to each, scored by a reward model; one pass.

    Nothing ends a response but its length, as in the PPO steps.
    """
    scoring = RewardModel(_model(seed=1), seed=1)
    trainer = GRPOTrainer(
        _model(), None, ModelReward(scoring), batch_size=SIZES.prompts, group_size=GROUP,
        max_new_tokens=max(SIZES.response_lengths),
    )  # fmt: skip
    given = list(reinforcement.prompts(SIZES))

    def fit(count: int) -> Any:
        trainer.options = replace(trainer.options, num_epochs=count)
        return trainer.fit(given)

    return works.whole_epochs(fit, GROUP * SIZES.tokens, _MORE_OF_GRPO)


WORKS: dict[str, Callable[[], Work]] = {
    "pretraining": pretraining_epoch,
    "sft": sft_epoch,
    "reward-model": reward_model_epoch,
    "dpo": dpo_epoch,
    "grpo": grpo_epoch,
}
#: Every work that trains or attends, by its name, whichever module builds it.
EVERY: dict[str, Callable[[], Work]] = works.WORKS | reinforcement.WORKS | WORKS
