"""What repeats steps of generation, and which may be repeated."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_

from loopos.autograd import Array, Parameter
from loopos.backends import get_backend
from loopos.backends.numpy_backend import Repeater
from loopos.backends.threads import get_num_threads
from loopos.generation.kv_cache import KVCache
from loopos.models.quantized import QuantizedTransformer
from loopos.models.transformer import Transformer

__all__ = ["RepeatedSteps"]

_DATA = attrgetter("data")


def _compute(compute: Callable[[], Array]) -> Array:
    return compute()


class RepeatedSteps:
    """Says what repeats a step: the same as for the step before, as long as all arrays stay.

    Only steps of this library's own code are repeated: what a subclass does in Python, or a
    function in the place of a method, a backend might leave out.

    Parameters
    ----------
    model : Transformer
    cache : KVCache
        That the steps read and fill.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self._model, self._cache = model, cache
        self._key: tuple[object, ...] = ()
        self._parameters: list[Parameter] = []
        self._arrays: list[Array] = []
        self._repeater: Repeater = _compute

    def repeater(self, rows: int, longest: int) -> Repeater:
        """Return it for a step of so many rows, the longest of so many tokens."""
        model, backend = self._model, get_backend()
        if longest > model.config.max_seq_len:
            return _compute  # which refuses
        adapters = tuple((adapter, adapter.scale) for adapter in model.adapters.values())
        key = (
            backend, get_num_threads(), rows, self._cache.moves, adapters, bool(model.unmerged),
        )  # fmt: skip
        if key != self._key or not all(map(is_, map(_DATA, self._parameters), self._arrays)):
            self._repeater = _compute  # lets go of the old one's memory first
            self._key, self._parameters = key, list(model.parameters().values())
            self._arrays = [parameter.data for parameter in self._parameters]
            if self._is_own():
                self._repeater = backend.repeater()
        return self._repeater

    def _is_own(self) -> bool:
        model = type(self._model)
        return (
            model in (Transformer, QuantizedTransformer)
            and not any(hasattr(model, name) for name in vars(self._model))
            and type(self._cache) is KVCache
        )
