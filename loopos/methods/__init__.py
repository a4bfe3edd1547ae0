"""The methods: one file each, found by (mode, method) as configurations name them."""

from __future__ import annotations

#: (computation.mode, computation.method) -> module with ``Options`` (a dataclass: the section
#: ``training``), ``read`` (a data file to rows) and ``make`` (a model to a trainer).
METHODS: dict[tuple[str, str], str] = {
    ("posttraining", "fine_tuning"): "loopos.methods.fine_tuning",
    ("posttraining", "reward_model"): "loopos.methods.reward_model",
    ("posttraining", "dpo"): "loopos.methods.dpo",
    ("pretraining", "autoregressive"): "loopos.methods.pretraining",
}

#: Which key of the ``data`` section names a method's rows, where it is not ``training_data``.
DATA_KEYS = {
    "chain_of_thought": "reasoning_examples",
    "reward_model": "preference_data",
    "dpo": "preference_data",
}

#: Methods of the seed that this version does not have yet, and the data key that each reads.
PLANNED = {"chain_of_thought": "reasoning_examples", "rlhf": "preference_data"}
