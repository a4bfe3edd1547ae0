"""The sections of a configuration that no method and no model defines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from loopos.backends.threads import check_num_threads
from loopos.errors import ConfigError

__all__ = ["Computation", "Data", "ModelKeys", "at_least"]


def at_least(least: int, value: int) -> str:
    """Say what was expected and found."""
    return f"expected a whole number of at least {least}, found {value}"


@dataclass(frozen=True)
class ModelKeys:
    """Keys of the ``model`` section beside those of :class:`TransformerConfig`.

    Attributes
    ----------
    type : {"transformer"}
        The one network that loopos has.
    num_classes : int or None
        Classes or labels of a classifier, 1 for a regression; None takes what the training data
        holds. A language model has none.
    """

    type: Literal["transformer"] = "transformer"
    num_classes: int | None = None


@dataclass(frozen=True)
class Computation:
    """What is computed, and on what.

    Attributes
    ----------
    method : str
        "fine_tuning", "sft", "chain_of_thought", "reward_model", "dpo", "rlhf", "grpo", or
        "autoregressive" with the mode "pretraining".
    mode : {"posttraining", "pretraining"}
        The kind of method that `method` is.
    description : str
        What the run is for, for people; ``loopos configs`` shows it.
    backend : str
        "auto" or the name of a backend; see ``loopos info``.
    num_threads : int or None
        Threads of matrix products; None means all.
    seed : int
        Of fresh weights, the order of samples, the split into training and validation, dropout.
    """

    method: str
    mode: Literal["posttraining", "pretraining"] = "posttraining"
    description: str = ""
    backend: str = "auto"
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"computation.{name}: {at_least(least, value)}")
        check_num_threads(self.num_threads, "computation.num_threads")


@dataclass(frozen=True)
class Data:
    """Where data come from and results go; ``builtin:NAME`` is a file that loopos ships.

    Attributes
    ----------
    training_data : str, list of str or None
        File of rows, or a pattern such as ``data/*.jsonl``, or a list of them; needed, but for
        methods that have a key of their own.
    reasoning_examples : str, list of str or None
        The same for the methods "chain_of_thought" and "grpo": problems with their steps and
        answers; "grpo" needs no steps.
    preference_data : str, list of str or None
        The same for the methods "reward_model", "dpo" and "rlhf": prompts with a chosen and a
        rejected response.
    validation_data : str, list of str or None
        Rows to evaluate on, named as `training_data`; None splits some off the training data.
    validation_fraction : float
        Share of the training data that is split off where there is no `validation_data`, in [0, 1);
        0 means no validation. Of a single text (pretraining) its end is held out.
    pretrained_weights : str or None
        Directory of a model or of LoRA adapters, a .gguf file, or a model on the Hugging Face Hub,
        "org/name" or "org/name@revision"; None starts fresh.
    reward_model : str or None
        Directory of a trained reward model, for the method "rlhf" without its first phase.
    tokenizer : str or None
        Directory, file or Hub name of a tokenizer; None takes the one beside the weights or, where
        there are none, trains byte-level BPE of ``vocab_size`` on the training texts.
    text_field : str
        Name of the field of texts.
    label_field : str
        Name of the field of labels.
    output_dir : str or None
        Directory of the run; None means ``outputs/<method>``.
    """

    training_data: str | list[str] | None = None
    reasoning_examples: str | list[str] | None = None
    preference_data: str | list[str] | None = None
    validation_data: str | list[str] | None = None
    validation_fraction: float = 0.1
    pretrained_weights: str | None = None
    reward_model: str | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    output_dir: str | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if value == []:
                expected = "text or a list of texts or null"
                raise ConfigError(f"data.{name}: expected {expected}, found []")
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (not text.strip() or "\0" in text):
                    kind = "the name of a field" if name.endswith("_field") else "a path"
                    raise ConfigError(f"data.{name}: expected {kind}, found {text!r}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                "data.validation_fraction: expected a number in [0, 1), "
                f"found {self.validation_fraction}"
            )
