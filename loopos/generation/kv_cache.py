"""Keys and values of the tokens that a model has seen, one slot a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos import ops
from loopos.autograd import Array, Tensor
from loopos.data.batch import Batch
from loopos.errors import ConfigError, LooposError
from loopos.models.config import TransformerConfig

__all__ = ["BLOCK_TOKENS", "KVCache"]

#: Capacity is a multiple of this many tokens.
BLOCK_TOKENS = 64


class KVCache:
    """A cache for :meth:`loopos.Transformer.get_hidden_states`.

    A pass over new tokens is: :meth:`begin`, the model's forward, :meth:`commit`. Until then the
    slots hold what they held: a pass that was interrupted is begun again.

    Parameters
    ----------
    config : TransformerConfig
        Of the model.
    slots : int
        Sequences at once.
    capacity : int
        Tokens a slot, rounded up to whole blocks; grows when a pass needs more.
    dtype : dtype
        Of the model.

    Attributes
    ----------
    lengths : ndarray int32 [slots]
        Tokens held in each slot. May be set to fewer: the rest is forgotten.
    moves : int
        How often arrays of keys and values were replaced by larger ones.

    Raises
    ------
    ConfigError
        If `slots` or `capacity` is less than 1.
    """

    def __init__(
        self, config: TransformerConfig, slots: int, capacity: int, dtype: Any = np.float32
    ):
        for name, value in (("slots", slots), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, found {value!r}")
        self._shape = (slots, _whole_blocks(capacity), config.kv_heads, config.head_size)
        # Pages that no token was written to cost no memory, so room to spare costs little. Keys
        # and values of a layer are one array: a large one lies on large pages, which are read
        # faster.
        self._layers = [np.empty((2, *self._shape), dtype) for _ in range(config.num_layers)]
        self.lengths = np.zeros(slots, np.int32)
        self.moves = 0
        self._free = list(range(slots - 1, -1, -1))
        self._pass: _Pass | None = None
        # Of passes with one token each: these arrays stay where they are, so that a backend can
        # repeat such a pass.
        self._one_each = np.arange(slots + 1, dtype=np.int32)
        self._starts, self._ends = np.zeros(slots, np.int32), np.zeros(slots, np.int32)

    @staticmethod
    def bytes_for(config: TransformerConfig, slots: int, capacity: int, dtype: Any) -> int:
        """Return the bytes of a cache: ``2 layers slots capacity kv_heads head_dim`` numbers."""
        numbers = 2 * config.num_layers * slots * _whole_blocks(capacity)
        return numbers * config.kv_heads * config.head_size * np.dtype(dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return sum(array.nbytes for array in self._layers)

    @property
    def slots(self) -> int:
        """Sequences at once."""
        return self._shape[0]

    @property
    def capacity(self) -> int:
        """Tokens a slot can hold before the cache grows."""
        return self._shape[1]

    @property
    def free(self) -> tuple[int, ...]:
        """The slots that nobody has, the next one to be given last."""
        return tuple(self._free)

    def allocate(self, slot: int | None = None) -> int:
        """Take a slot that nobody has, some one or a certain one.

        It is empty; what it held stays in its memory until it is written over.

        Raises
        ------
        LooposError
            If there is none, or it is in use.
        """
        if slot is None and not self._free:
            raise LooposError(f"all {self.slots} slots of the cache are in use")
        if slot is not None and slot not in self._free:
            raise LooposError(f"slot {slot} of the cache is in use")
        taken = self._free[-1] if slot is None else slot
        self._free.remove(taken)
        self.lengths[taken] = 0
        return taken

    def release(self, slot: int) -> None:
        """Give a slot back.

        Raises
        ------
        LooposError
            If it is not in use.
        """
        if slot in self._free or not 0 <= slot < self.slots:
            raise LooposError(f"slot {slot} of the cache is not in use")
        self._free.append(slot)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` tokens of slot `source`, and nothing more."""
        if source != target:
            for array in self._layers:
                array[:, target, :length] = array[:, source, :length]
        self.lengths[target] = length

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens a slot; grows by half at least, so seldom."""
        if capacity <= self.capacity:
            return
        slots, held, heads, size = self._shape
        shape = (slots, _whole_blocks(max(capacity, held + held // 2)), heads, size)
        # Layer by layer, so that little is held twice. Where this ends early, some layers have
        # more room than others, and nothing is lost.
        for layer, array in enumerate(self._layers):
            grown = np.empty((2, *shape), array.dtype)
            grown[:, :, : array.shape[2]] = array
            self._layers[layer] = grown
            self.moves += 1
        self._shape = shape

    # -- a pass ----------------------------------------------------------------------------------

    def begin(self, slots: Array, counts: Array | None = None) -> int:
        """Say where the tokens of the next forward go.

        Parameters
        ----------
        slots : ndarray int32 [B]
            The slot of each sequence of the batch, each at most once.
        counts : ndarray int32 [B], optional
            New tokens of each; one each if None.

        Returns
        -------
        int
            Tokens of the longest of these sequences, with the new ones.
        """
        if counts is None:
            starts = np.take(self.lengths, slots, out=self._starts[: slots.size])
            ends = np.add(starts, 1, out=self._ends[: slots.size])
            longest = int(ends.max(initial=0))
            self.reserve(longest)
            self._pass = _Pass(slots, ends, starts, self._one_each[: slots.size + 1])
            return longest
        starts = self.lengths[slots]
        ends = (starts + counts).astype(np.int32)
        longest = int(ends.max(initial=0))
        self.reserve(longest)
        positions = np.concatenate(
            [np.arange(a, b, dtype=np.int32) for a, b in zip(starts, ends, strict=True)]
        )
        offsets = np.append(0, np.cumsum(counts)).astype(np.int32)
        self._pass = _Pass(slots, ends, positions, offsets)
        return longest

    def commit(self) -> None:
        """Count the tokens of the pass as held."""
        done = self._current()
        self.lengths[done.slots] = done.ends
        self._pass = None

    def _current(self) -> _Pass:
        if self._pass is None:
            raise LooposError("call begin() of the cache before the forward")
        return self._pass

    def positions(self, batch: Batch) -> Array:
        """Return the position of each new token, int32 [N]; of this pass, not to be kept.

        Raises
        ------
        LooposError
            If the batch has another number of tokens than was said at :meth:`begin`.
        """
        positions = self._current().positions
        if positions.size != batch.tokens.size:
            raise LooposError(
                f"the cache expects {positions.size} new tokens, found {batch.tokens.size}"
            )
        return positions

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Keep new keys and values and attend; see :class:`loopos.models.AttentionCache`."""
        now = self._current()
        keys, values = self._layers[layer]
        return ops.attention_cached(
            q, k, v, keys, values, now.offsets, now.slots, now.ends, scale, window
        )


class _Pass:
    """Where the new tokens go: those of sequence b from ``offsets[b]`` on."""

    __slots__ = ("ends", "offsets", "positions", "slots")

    def __init__(self, slots: Array, ends: Array, positions: Array, offsets: Array):
        self.slots, self.ends, self.positions, self.offsets = slots, ends, positions, offsets


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
