"""The reward model that a run is given: whether it goes with the policy, and with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loopos.data.preferences import Preferences
from loopos.data.tokenizer import Tokenizer, load_tokenizer
from loopos.errors import CheckpointError, ConfigError
from loopos.models.reward import RewardModel, load_reward_model
from loopos.training.checkpoint import find_checkpoint, read_state

__all__ = ["load_judge", "require_same_judge"]

#: Prompts by which it is told whether two tokenizers are the same.
_COMPARED = 64


def require_same_judge(root: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with another reward model than the run began with."""
    newest = find_checkpoint(root / "checkpoints")
    if newest is None:
        return
    was = (read_state(newest).get("run_config") or {}).get("reward_model_sha256")
    if was is not None and was != config["reward_model_sha256"]:
        raise CheckpointError(
            f"data.reward_model: is not the reward model of the run to be continued ({root})"
        )


def load_judge(directory: Path, tokenizer: Tokenizer, training: Preferences) -> RewardModel:
    """Return a reward model that reads the policy's tokens."""
    inner = [directory / "reward_model" / "model", directory / "model"]
    for path in inner:
        if path.is_dir():
            raise ConfigError(
                f"data.reward_model: {directory} is a run directory; its model is {path}"
            )
    model = load_reward_model(directory)
    if (directory / "tokenizer.json").is_file():
        some = [training.texts[i] for i in range(min(_COMPARED, len(training.texts)))]
        theirs = load_tokenizer(directory).encode_batch(some)
        mine = tokenizer.encode_batch(some)
        if any(not np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            raise ConfigError(
                f"data.reward_model: the tokenizer in {directory} is another than the policy's"
            )
    return model
