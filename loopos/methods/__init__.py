"""The methods: one file each, found by (mode, method) as configurations name them."""

from __future__ import annotations

#: (computation.mode, computation.method) -> module with ``Options`` (a dataclass: the section
#: ``training``), ``read`` (a data file to rows) and ``make`` (a model to a trainer).
METHODS: dict[tuple[str, str], str] = {
    ("posttraining", "fine_tuning"): "loopos.methods.fine_tuning",
    ("posttraining", "sft"): "loopos.methods.sft",
    ("posttraining", "chain_of_thought"): "loopos.methods.chain_of_thought",
    ("posttraining", "reward_model"): "loopos.methods.reward_model",
    ("posttraining", "dpo"): "loopos.methods.dpo",
    ("posttraining", "rlhf"): "loopos.methods.rlhf",
    ("posttraining", "grpo"): "loopos.methods.verifiable",
    ("pretraining", "autoregressive"): "loopos.methods.pretraining",
}

#: Which key of the ``data`` section names a method's rows, where it is not ``training_data``.
DATA_KEYS = {
    "chain_of_thought": "reasoning_examples",
    "reward_model": "preference_data",
    "dpo": "preference_data",
    "rlhf": "preference_data",
    "grpo": "reasoning_examples",
}

#: Directories of a run that hold what comes before its last stage, of a method with several.
STAGES: dict[str, tuple[str, ...]] = {"rlhf": ("supervised", "reward_model")}
