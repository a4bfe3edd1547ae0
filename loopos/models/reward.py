"""A reward model: a transformer's body under a head that gives every token one number.

Saved it is a sequence classifier of Hugging Face with one label, which transformers'
``AutoModelForSequenceClassification`` loads. The heads there have no bias: what normalisation adds
to every score is in ``reward_model.json``, and only loopos adds it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loopos import ops
from loopos.autograd import Array, Parameter, Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError, ModelFormatError, NumericalError
from loopos.files import read_json, write_json
from loopos.models.families import family_for
from loopos.models.lora import merge_lora, unmerge_lora
from loopos.models.transformer import SavesTokenizer, Transformer
from loopos.models.weights import load_model, save_model
from loopos.ops import DropoutKeys

__all__ = ["RewardModel", "load_reward_model", "varies"]

_HEAD = "score.weight"
_FILE = "reward_model.json"


def varies(deviation: float, mean: float) -> bool:
    """Whether scores of this mean and deviation differ, by more than rounding makes equal ones."""
    return deviation > 1e-9 * abs(mean)


class RewardModel:
    """A causal transformer with a scalar head; the score of a sequence is its last token's.

    Parameters
    ----------
    body : Transformer
        It is held, not copied; a language-model head has no part in scores.
    seed : int
        Of the head's weights, N(0, 1/sqrt(d_model + 1)).

    Attributes
    ----------
    weight : Parameter [1, d_model]
    bias : ndarray [1]
        Added to every score; 0 until :meth:`normalise`. It is not trained: a difference of scores,
        which is all that preferences say, does not depend on it.

    Raises
    ------
    ConfigError
        If the model is bidirectional.
    """

    def __init__(self, body: Transformer, seed: int = 0):
        if not body.config.causal:
            raise ConfigError("a reward model needs a causal model, whose last token sees all")
        self.body = body
        width = body.config.d_model
        draws = np.random.default_rng(seed).standard_normal((1, width))
        self.weight = Parameter((draws / np.sqrt(width + 1)).astype(body.dtype), _HEAD)
        self.bias: Array = np.zeros(1, body.dtype)

    def parameters(self) -> dict[str, Parameter]:
        """Return what scores depend on: the body (without a language-model head) and the head."""
        body = self.body.parameters()
        body.pop("lm_head.weight", None)  # no part in the scores, so never a gradient
        return body | {_HEAD: self.weight}

    def token_scores(self, batch: Batch, dropout: DropoutKeys | None = None) -> Tensor:
        """Return a number for every token, ``[N]``: a critic's values, if it is one."""
        hidden = self.body.get_hidden_states(batch, dropout)
        return ops.reshape(ops.linear(hidden, self.weight, Tensor(self.bias)), (-1,))

    def scores(self, batch: Batch, dropout: DropoutKeys | None = None) -> Tensor:
        """Return the score of each sequence, ``[B]``.

        Raises
        ------
        DataError
            As :meth:`Transformer.get_hidden_states`.
        """
        last = self.body.get_hidden_states(batch, dropout, rows=batch.offsets[1:] - 1)
        return ops.reshape(ops.linear(last, self.weight, Tensor(self.bias)), (-1,))

    def normalise(self, scores: Array, scale: bool = False) -> None:
        """Change the head so that what scored `scores` has the mean 0, if asked the deviation 1.

        Parameters
        ----------
        scores : ndarray
            Of reference samples, by the head as it is.
        scale : bool
            Divide by their standard deviation too (Ziegler et al. 2019, sec. 2.2).

        Raises
        ------
        NumericalError
            If there is no score, one is not finite, or all are equal and `scale` is asked for.
        """
        values = np.asarray(scores, dtype=np.float64)
        if not values.size or not np.isfinite(values).all():
            raise NumericalError("a reward model cannot be normalised on no or non-finite scores")
        deviation = float(values.std()) if scale else 1.0
        if scale and not varies(deviation, float(values.mean())):
            raise NumericalError("a reward model cannot be scaled on scores that are all equal")
        kind = self.body.dtype.type
        self.weight.data = self.weight.data * kind(1 / deviation)
        shifted = (self.bias.astype(np.float64) - values.mean()) / deviation
        self.bias = shifted.astype(self.body.dtype)

    def save(self, directory: str | Path, tokenizer: SavesTokenizer | None = None) -> None:
        """Write a Hugging Face sequence classifier, adapters merged into its weights.

        Other files in the directory stay. A model that no Hugging Face family expresses is written
        in loopos' own format, which only :func:`load_reward_model` reads.

        Raises
        ------
        NumericalError
            If a parameter is not finite; nothing is written.
        OutputError
            If the directory cannot be written.
        """
        if not (np.isfinite(self.weight.data).all() and np.isfinite(self.bias).all()):
            raise NumericalError(f"{directory}: not saved, parameter '{_HEAD}' is not finite")
        with ExitStack() as stack:
            if self.body.adapters and not self.body.unmerged:
                merge_lora(self.body)
                stack.callback(unmerge_lora, self.body)
            body = self._headless()
            family = family_for(body.config)
            values: dict[str, Any] = {}
            if family.name != "loopos":
                values = {
                    "architectures": [f"{family.base_architecture}".removesuffix("Model")
                                      + "ForSequenceClassification"],
                    "num_labels": 1,
                    "id2label": {"0": "LABEL_0"},
                    "label2id": {"LABEL_0": 0},
                    "pad_token_id": _pad_id(body, tokenizer),
                }  # fmt: skip
            save_model(body, directory, tokenizer, head={_HEAD: self.weight.data},
                       head_config=values)  # fmt: skip
        write_json(Path(directory) / _FILE, {"bias": float(self.bias[0])})

    def _headless(self) -> Transformer:
        """Return the body as a model of the same arrays without a language-model head."""
        config = replace(self.body.config, lm_head=False)
        arrays = {name: p.data for name, p in self.parameters().items()
                  if name != _HEAD and not name.endswith((".lora_a", ".lora_b"))}  # fmt: skip
        body = Transformer(config, dtype=self.body.dtype, arrays=arrays)
        body.extra_tensors = self.body.extra_tensors
        body.origin = self.body.origin
        return body


def _pad_id(body: Transformer, tokenizer: SavesTokenizer | None) -> int | None:
    """Return an id that no text has, None where there is none.

    transformers reads the score at the last token that is not this one, so it must not be the
    end-of-text token, which is real. Without it, transformers scores one sequence at a time.
    """
    used = getattr(tokenizer, "vocab_size", None)
    origin = body.origin.config.get("pad_token_id") if body.origin is not None else None
    end = getattr(tokenizer, "eos_id", None)
    if isinstance(origin, int) and 0 <= origin < body.config.vocab_size and origin != end:
        return origin
    if used is not None and used < body.config.vocab_size:
        return int(used)
    return None


def load_reward_model(directory: str | Path, dtype: str = "float32") -> RewardModel:
    """Read a reward model: what :meth:`RewardModel.save` wrote, or any sequence classifier with
    one label and a causal body in Hugging Face's layout.

    Parameters
    ----------
    directory : path
    dtype : {"float32", "float64"}
        Of the parameters.

    Raises
    ------
    MissingFileError, ModelFormatError
        As :func:`loopos.load_model`; also if there is no head with one output.
    """
    body = load_model(directory, dtype)
    weight = body.extra_tensors.pop(_HEAD, None)
    if weight is None:
        raise ModelFormatError(f"{directory}: tensor '{_HEAD}' is missing, so no reward model")
    if weight.shape != (1, body.config.d_model):
        raise ModelFormatError(
            f"{directory}: tensor '{_HEAD}' has the shape {list(weight.shape)}, "
            f"expected {[1, body.config.d_model]}"
        )
    bias: Any = 0.0
    file = Path(directory) / _FILE
    if file.is_file():
        values = read_json(file, ModelFormatError)
        bias = values.get("bias")
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if set(values) != {"bias"} or not number or not np.isfinite(bias):
            raise ModelFormatError(f"{file}: expected an object with one finite number 'bias'")
    model = RewardModel(body)
    model.weight.data = weight.astype(body.dtype)
    model.bias = np.array([bias], body.dtype)
    return model
