"""What is wrong between the keys of a configuration, beside what is wrong with one of them."""

from __future__ import annotations

import dataclasses

from loopos.config_files import Faults
from loopos.config_sections import Data
from loopos.methods import DATA_KEYS
from loopos.training.options import TrainingOptions

__all__ = ["check_reward_model", "check_rows", "check_validation"]


def check_validation(training: TrainingOptions, data: Data, faults: Faults) -> None:
    """Find options that would do nothing as there is nothing to evaluate on."""
    if data.validation_data is not None or data.validation_fraction > 0:
        return
    inner = {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
    phases = {f"training.{name}": options for name, options in inner.items()
              if isinstance(options, TrainingOptions)}  # fmt: skip
    for section, options in ({"training": training} | phases).items():
        for name in ("eval_steps", "early_stopping_patience"):
            if getattr(options, name) is not None:
                faults.add(
                    f"{section}.{name}",
                    "there is no validation, as data.validation_fraction is 0",
                )


def check_reward_model(training: TrainingOptions, data: Data, faults: Faults) -> None:
    """Find that a reward model is missing, or that nobody would ask it."""
    phases, given = getattr(training, "phases", None), data.reward_model is not None
    if phases is None and given:
        faults.add("data.reward_model", "only the method 'rlhf' reads it")
    elif phases is not None and "reward_model" not in phases and not given:
        faults.add("data.reward_model", "is needed where training.phases trains none")
    elif phases is not None and "reward_model" in phases and given:
        faults.add(
            "data.reward_model",
            "training.phases trains one; leave this out, or 'reward_model' out of the phases",
        )


def check_rows(method: str, data: Data, faults: Faults) -> None:
    """Find that there is nothing to train on, or rows under the key of another method."""
    wanted = DATA_KEYS.get(method, "training_data")
    for key in {"training_data", *DATA_KEYS.values()} - {wanted}:
        if getattr(data, key) is not None:
            faults.add(f"data.{key}", f"the method '{method}' reads data.{wanted}")
    if getattr(data, wanted) is None:
        faults.add(f"data.{wanted}", "is needed")
