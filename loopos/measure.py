"""How long a real training step takes on each backend, and whether "auto" takes the fastest."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from loopos.backends import use_backend
from loopos.data.batch import Batch
from loopos.models.config import TransformerConfig
from loopos.models.transformer import Transformer
from loopos.training.optim import AdamW

#: A model in the proportions of GPT-2, small enough for a step in a moment.
_MODEL = TransformerConfig(
    vocab_size=8000, d_model=256, num_heads=4, num_layers=4, d_ff=1024, max_seq_len=128
)
_SEQUENCES, _STEPS = 4, 3
#: A backend that is faster by less is not worth a word: steps vary.
_MARGIN = 1.15


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes
    ----------
    seconds : dict
        The fastest of a few training steps on each backend.
    advice : str or None
        What to do when the backend in force is not the fastest here.
    """

    seconds: dict[str, float]
    advice: str | None


def measure_backends(names: Iterable[str], in_force: str) -> Measured:
    """Time a training step on each of these backends.

    Parameters
    ----------
    names : iterable of str
        Backends that can run here.
    in_force : str
        The one that computes when nothing else is asked for.
    """
    seconds = {name: _step_seconds(name) for name in names}
    fastest = min(seconds, key=lambda name: seconds[name])
    advice = None
    if in_force in seconds and seconds[fastest] * _MARGIN < seconds[in_force]:
        advice = (
            f"{fastest} is faster here than {in_force}; choose it with LOOPOS_BACKEND={fastest} "
            "or computation.backend"
        )
    return Measured(seconds, advice)


def _step_seconds(name: str) -> float:
    with use_backend(name):
        rng = np.random.default_rng(0)
        model = Transformer(_MODEL, seed=0)
        optimizer = AdamW(model.parameters(), learning_rate=1e-4)
        length = _MODEL.max_seq_len
        batch = Batch.from_sequences(
            [rng.integers(0, _MODEL.vocab_size, length) for _ in range(_SEQUENCES)]
        )
        best = float("inf")
        for step in range(_STEPS + 1):
            began = time.perf_counter()
            optimizer.zero_grad()
            loss, count = model.next_token_loss(batch)
            loss.backward()
            optimizer.step(scale=1 / count)
            if step:  # the first one compiles, touches memory and starts threads
                best = min(best, time.perf_counter() - began)
    return best
