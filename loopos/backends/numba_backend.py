"""The numba backend: matrix products by BLAS, the loops around them compiled and on all threads.

numba is imported and a kernel compiled when the first op needs it; compiled code is kept on disk
(``NUMBA_CACHE_DIR``, else beside the kernels, else in the user's cache directory). Both float32 and
float64 are compiled. Ops that are a look-up, a product alone, or small by nature (``cross_entropy``
of a few classes, ``binary_cross_entropy``, ``mse``, ``sample``) are NumPy's.

Kernels run on threads of loopos (see ``numba_pool``): numba's own threading layer and its settings
belong to the host and are not touched. Results are the same bytes at any number of threads, but for
the order of summation within BLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loopos.backends import numba_compile
from loopos.backends.numba_losses import NumbaLosses
from loopos.backends.numba_pool import POOL
from loopos.backends.numba_support import (
    as_input,
    attention_items,
    check_heads,
    check_offsets,
    dropout_bits,
    expect,
    groups_of_rows,
    int64,
    one_of,
    reach,
)
from loopos.backends.numba_updates import NumbaUpdates
from loopos.backends.numpy_backend import ACTIVATIONS, NumpyBackend
from loopos.backends.reused import empty
from loopos.backends.threads import get_num_threads

Array = np.ndarray[Any, Any]


class NumbaBackend(NumbaLosses, NumbaUpdates, NumpyBackend):
    """See the module's docstring; conventions are those of ``numpy_backend``."""

    name = "numba"

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why this backend cannot run here, or None when it can."""
        from importlib.util import find_spec

        if find_spec("numba") is None:
            return "numba is not installed; pip install 'loopos[numba]'"
        return None

    def describe(self) -> dict[str, Any]:
        """Return what runs, see :meth:`NumpyBackend.describe`.

        ``threading`` says whose threads they are, ``cache`` where compiled code is kept.
        """
        numba_compile.compiled()
        kept = numba_compile.cache_directory
        return super().describe() | {
            "isa": numba_compile.target(),
            "threads": get_num_threads(),
            "threading": "threads of loopos; numba's threading layer is not used",
            "cache": kept or "none (no directory can be written): compiled again in each process",
        }

    # -- elementwise ---------------------------------------------------------------------------

    def activation(self, x: Array, kind: str) -> Array:
        """Elementwise activation, see :meth:`NumpyBackend.activation`."""
        if kind not in ACTIVATIONS or not one_of(x):
            return super().activation(x, kind)
        kernels, _ = numba_compile.compiled()
        flat, y = as_input(x).reshape(-1), empty(x.shape, x.dtype)
        POOL.run(
            kernels.activation, -(-x.size // kernels.ELEMENTS), 2 * x.size,
            flat, y.reshape(-1), ACTIVATIONS.index(kind),
        )  # fmt: skip
        return y

    def activation_backward(self, dy: Array, x: Array, kind: str) -> Array:
        """``dx = dy act'(x)``."""
        if kind not in ACTIVATIONS or not one_of(dy, x):
            return super().activation_backward(dy, x, kind)
        kernels, _ = numba_compile.compiled()
        expect(x.shape, dy=dy)
        dx = empty(x.shape, x.dtype)
        POOL.run(
            kernels.activation_backward, -(-x.size // kernels.ELEMENTS), 2 * x.size,
            as_input(dy).reshape(-1), as_input(x).reshape(-1), dx.reshape(-1),
            ACTIVATIONS.index(kind),
        )  # fmt: skip
        return dx

    def swiglu(self, gate: Array, up: Array) -> Array:
        """``silu(gate) * up``."""
        if not one_of(gate, up):
            return super().swiglu(gate, up)
        kernels, _ = numba_compile.compiled()
        expect(gate.shape, up=up)
        y = empty(gate.shape, gate.dtype)
        flat = (as_input(a).reshape(-1) for a in (gate, up, y))
        POOL.run(kernels.swiglu, -(-y.size // kernels.ELEMENTS), 2 * y.size, *flat)
        return y

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """Gradients of ``gate`` and ``up``."""
        if not one_of(dy, gate, up):
            return super().swiglu_backward(dy, gate, up)
        kernels, _ = numba_compile.compiled()
        expect(gate.shape, up=up, dy=dy)
        dgate, dup = empty(gate.shape, gate.dtype), empty(gate.shape, gate.dtype)
        flat = (as_input(a).reshape(-1) for a in (dy, gate, up, dgate, dup))
        POOL.run(kernels.swiglu_backward, -(-dup.size // kernels.ELEMENTS), 3 * dup.size, *flat)
        return dgate, dup

    def dropout(self, x: Array, rate: float, key: int, offsets: Array, sample_ids: Array) -> Array:
        """Counter-based dropout with the bits of ``random_bits.keep_mask``."""
        lengths = np.diff(offsets)
        if x.ndim != 2 or lengths.sum() != len(x) or not one_of(x):
            return super().dropout(x, rate, key, offsets, sample_ids)
        kernels, _ = numba_compile.compiled()
        positions = np.arange(len(x)) - np.repeat(int64(offsets)[:-1], lengths)
        samples = np.repeat(int64(sample_ids), lengths)
        y = empty(x.shape, x.dtype)
        POOL.run(
            kernels.dropout, -(-len(x) // kernels.ROWS), 4 * x.size,
            as_input(x), y, samples, positions, *dropout_bits(rate, key, x.dtype),
        )  # fmt: skip
        return y

    # -- norms -----------------------------------------------------------------------------------

    def _norm(
        self, x: Array, g: Array, b: Array | None, eps: float, residual: Array | None, centred: bool
    ) -> tuple[Array, Array, Array, Array]:
        kernels, _ = numba_compile.compiled()
        expect((len(x), x.shape[-1]), x=x, residual=residual)
        expect(x.shape[1:], g=g, b=b)
        none = np.empty((0, 0), x.dtype)
        y, mean, rstd = (empty((len(x), n), x.dtype) for n in (x.shape[1], 1, 1))
        s = none if residual is None else empty(x.shape, x.dtype)
        POOL.run(
            kernels.norm, -(-len(x) // kernels.ROWS), x.size,
            as_input(x), none if residual is None else as_input(residual), as_input(g),
            none[0:0, 0:0].reshape(-1) if b is None else as_input(b), x.dtype.type(eps),
            y, s, mean, rstd, centred,
        )  # fmt: skip
        return y, x if residual is None else s, mean, rstd

    def layer_norm(
        self, x: Array, g: Array, b: Array | None, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Layer normalisation of ``s = x + residual``."""
        if not one_of(x, g, b, residual):
            return super().layer_norm(x, g, b, eps, residual)
        return self._norm(x, g, b, eps, residual, True)

    def rms_norm(
        self, x: Array, g: Array, eps: float, residual: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """``y = s * rstd * g``."""
        if not one_of(x, g, residual):
            return super().rms_norm(x, g, eps, residual)
        y, s, _, rstd = self._norm(x, g, None, eps, residual, False)
        return y, s, rstd

    def _norm_backward(
        self, dy: Array, s: Array, g: Array, mean: Array, rstd: Array, ds: Array | None,
        dg: Array | None, db: Array | None, need_dx: bool, centred: bool,
    ) -> Array | None:  # fmt: skip
        kernels, _ = numba_compile.compiled()
        expect((len(s), s.shape[-1]), s=s, dy=dy, ds=ds)
        expect(s.shape[1:], g=g, dg=dg, db=db)
        expect((len(s), 1), rstd=rstd, mean=mean)
        blocks, none = -(-len(s) // kernels.ROWS), np.empty((0, 0), s.dtype)
        dx = empty(s.shape, s.dtype) if need_dx else none
        sums = [
            none if into is None else np.zeros((blocks, s.shape[1]), s.dtype) for into in (dg, db)
        ]
        arriving = none if ds is None else as_input(ds)
        POOL.run(
            kernels.norm_backward, blocks, 2 * s.size,
            as_input(dy), as_input(s), as_input(g), as_input(mean), as_input(rstd), arriving, dx,
            *sums, centred,
        )  # fmt: skip
        for into, rows in zip((dg, db), sums, strict=True):
            if into is not None:
                into += rows.sum(axis=0)
        return dx if need_dx else None

    def layer_norm_backward(
        self,
        dy: Array,
        s: Array,
        g: Array,
        mean: Array,
        rstd: Array,
        ds: Array | None = None,
        *,
        dg: Array | None = None,
        db: Array | None = None,
        need_dx: bool = True,
    ) -> Array | None:
        """Gradient of ``s``; ``dg`` and ``db`` are summed by fixed blocks of rows."""
        if not one_of(dy, s, g, mean, rstd, ds):
            return super().layer_norm_backward(
                dy, s, g, mean, rstd, ds, dg=dg, db=db, need_dx=need_dx
            )
        return self._norm_backward(dy, s, g, mean, rstd, ds, dg, db, need_dx, True)

    def rms_norm_backward(
        self,
        dy: Array,
        s: Array,
        g: Array,
        rstd: Array,
        ds: Array | None = None,
        *,
        dg: Array | None = None,
        need_dx: bool = True,
    ) -> Array | None:
        """Gradient of ``s``; ``dg`` is summed by fixed blocks of rows."""
        if not one_of(dy, s, g, rstd, ds):
            return super().rms_norm_backward(dy, s, g, rstd, ds, dg=dg, need_dx=need_dx)
        return self._norm_backward(dy, s, g, rstd, rstd, ds, dg, None, need_dx, False)

    # -- rows and sequences ------------------------------------------------------------------------

    def embedding_backward(
        self, dy: Array, ids: Array, dtable: Array, accumulate: bool = True
    ) -> None:
        """Add ``dy[n]`` to ``dtable[ids[n]]``, rows of one id in the order in which they stand."""
        if not accumulate:
            dtable.fill(0)
        if ids.size == 0:
            return
        fits = dtable.ndim == 2 and dtable.flags.carray and one_of(dy, dtable)
        if not fits or ids.min() < 0 or ids.max() >= len(dtable):
            super().embedding_backward(dy, ids, dtable)  # complains where it must
            return
        kernels, _ = numba_compile.compiled()
        expect((ids.size, dtable.shape[1]), dy=dy)
        order, starts = groups_of_rows(ids)
        POOL.run(
            kernels.add_rows, starts.size - 1, 2 * dy.size,
            as_input(dy), order, starts, int64(ids), dtable,
        )  # fmt: skip

    def segment_mean(self, x: Array, offsets: Array) -> Array:
        """The mean row of each sequence; zeros for an empty one."""
        if x.ndim != 2 or offsets[-1] != len(x) or not one_of(x):
            return super().segment_mean(x, offsets)
        check_offsets(offsets, len(x))
        kernels, _ = numba_compile.compiled()
        y = np.zeros((offsets.size - 1, x.shape[1]), x.dtype)
        POOL.run(kernels.segment_mean, len(y), x.size, as_input(x), int64(offsets), y)
        return y

    def segment_mean_backward(self, dy: Array, offsets: Array) -> Array:
        """Each token gets its sequence's gradient over its length."""
        if dy.ndim != 2 or offsets.size - 1 != len(dy) or not one_of(dy):
            return super().segment_mean_backward(dy, offsets)
        check_offsets(offsets, int(offsets[-1]))
        kernels, _ = numba_compile.compiled()
        dx = empty((int(offsets[-1]), dy.shape[1]), dy.dtype)
        POOL.run(kernels.segment_mean_backward, len(dy), dx.size, as_input(dy), int64(offsets), dx)
        return dx

    def discounted_sum(self, x: Array, offsets: Array, gamma: float) -> Array:
        """``y[t] = x[t] + gamma y[t + 1]`` within each sequence."""
        if offsets[-1] != len(x) or not one_of(x):
            return super().discounted_sum(x, offsets, gamma)
        check_offsets(offsets, len(x))
        kernels, _ = numba_compile.compiled()
        y = empty(x.shape, x.dtype)
        args = (as_input(x), int64(offsets), x.dtype.type(gamma), y)
        POOL.run(kernels.discounted_sum, offsets.size - 1, 4 * x.size, *args)
        return y

    def gae(
        self, rewards: Array, values: Array, offsets: Array, gamma: float, lam: float
    ) -> tuple[Array, Array]:
        """Generalised advantage estimation in one reverse pass."""
        if offsets[-1] != len(rewards) or not one_of(rewards, values):
            return super().gae(rewards, values, offsets, gamma, lam)
        check_offsets(offsets, len(rewards))
        expect(rewards.shape, values=values)
        kernels, _ = numba_compile.compiled()
        f = rewards.dtype.type
        advantages, returns = (np.empty(rewards.shape, rewards.dtype) for _ in range(2))
        POOL.run(
            kernels.gae, offsets.size - 1, 8 * rewards.size,
            as_input(rewards), as_input(values), int64(offsets), f(gamma), f(gamma * lam),
            advantages, returns,
        )  # fmt: skip
        return advantages, returns

    # -- attention -----------------------------------------------------------------------------

    def rope(self, q: Array, k: Array, positions: Array, inv_freq: Array) -> tuple[Array, Array]:
        """Rotary position embedding; angles as in the reference."""
        if not one_of(q, k):
            return super().rope(q, k, positions, inv_freq)
        return self._rotate_both(q, k, positions, inv_freq, 1.0)

    def rope_backward(
        self, dq: Array, dk: Array, positions: Array, inv_freq: Array
    ) -> tuple[Array, Array]:
        """The inverse rotation of both gradients."""
        if not one_of(dq, dk):
            return super().rope_backward(dq, dk, positions, inv_freq)
        return self._rotate_both(dq, dk, positions, inv_freq, -1.0)

    def _rotate_both(
        self, q: Array, k: Array, positions: Array, inv_freq: Array, sign: float
    ) -> tuple[Array, Array]:
        _, kernels = numba_compile.compiled()
        expect((len(q), *k.shape[1:2], q.shape[-1]), k=k)
        expect((len(q),), positions=positions)
        if 2 * len(inv_freq) > q.shape[-1]:
            half = q.shape[-1] // 2
            raise ValueError(f"inv_freq: expected at most {half} elements, found {len(inv_freq)}")
        cos, sin = (a[:, 0, :] for a in self._rotation(positions, inv_freq, q.dtype))
        turned = empty(q.shape, q.dtype), empty(k.shape, k.dtype)
        for x, y in zip((q, k), turned, strict=True):
            args = (as_input(x), as_input(cos), as_input(sin), y, x.dtype.type(sign))
            POOL.run(kernels.rotate, len(x), x.size, *args)
        return turned

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        offsets: Array,
        causal: bool,
        scale: float,
        window: int | None = None,
        dropout_rate: float = 0.0,
        key: int = 0,
        sample_ids: Array | None = None,
    ) -> tuple[Array, Array]:
        """Softmax attention by online softmax, one block of queries of one head at a time."""
        options = (offsets, causal, scale, window, dropout_rate, key, sample_ids)
        if not one_of(q, k, v):
            return super().attention(q, k, v, *options)
        check_heads(q, k, v)
        check_offsets(offsets, len(q))
        expect((len(q),), k=k[:, 0, 0])
        _, kernels = numba_compile.compiled()
        lengths = np.diff(int64(offsets))
        samples = np.arange(lengths.size) if sample_ids is None else sample_ids
        items = attention_items(
            offsets[:-1], lengths, offsets[:-1], lengths, samples, q.shape[1], kernels.QUERIES
        )
        y, lse = empty(q.shape, q.dtype), np.empty(q.shape[:2], q.dtype)
        work = int((lengths**2).sum()) * q.shape[1] * q.shape[2] // 4
        POOL.run(
            kernels.attention, len(items), work,
            as_input(q), as_input(k), as_input(v), y, lse, items, q.dtype.type(scale), bool(causal),
            reach(window), *dropout_bits(dropout_rate, key, q.dtype),
        )  # fmt: skip
        return y, lse

    def attention_backward(
        self,
        dy: Array,
        q: Array,
        k: Array,
        v: Array,
        y: Array,
        lse: Array,
        offsets: Array,
        causal: bool,
        scale: float,
        window: int | None = None,
        dropout_rate: float = 0.0,
        key: int = 0,
        sample_ids: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Gradients of q, k, v, one head of one sequence at a time."""
        options = (offsets, causal, scale, window, dropout_rate, key, sample_ids)
        if not one_of(dy, q, k, v, y, lse):
            return super().attention_backward(dy, q, k, v, y, lse, *options)
        check_heads(q, k, v)
        check_offsets(offsets, len(q))
        expect((len(q),), k=k[:, 0, 0])
        expect(q.shape, dy=dy, y=y)
        expect(q.shape[:2], lse=lse)
        _, kernels = numba_compile.compiled()
        lengths = np.diff(int64(offsets))
        samples = np.arange(lengths.size) if sample_ids is None else sample_ids
        items = attention_items(
            offsets[:-1], lengths, offsets[:-1], lengths, samples, q.shape[1], 0
        )[:, [0, 1, 2, 6]]
        dq, dk, dv = (empty(q.shape, q.dtype) for _ in range(3))
        dq.fill(0)
        work = int((lengths**2).sum()) * q.shape[1] * q.shape[2]
        arrays = (as_input(a) for a in (dy, q, k, v, y, lse))
        POOL.run(
            kernels.attention_backward, len(items), work,
            *arrays, dq, dk, dv, np.ascontiguousarray(items), q.dtype.type(scale), bool(causal),
            reach(window), *dropout_bits(dropout_rate, key, q.dtype),
        )  # fmt: skip
        if q.shape[1] != k.shape[1]:  # heads that share a key head add up
            shape = (len(k), k.shape[1], -1, k.shape[2])
            dk, dv = (d.reshape(shape).sum(axis=2) for d in (dk, dv))
        return dq, dk, dv

    def attention_cached(
        self,
        q: Array,
        k: Array,
        v: Array,
        k_cache: Array,
        v_cache: Array,
        offsets: Array,
        slots: Array,
        lengths: Array,
        scale: float,
        window: int | None = None,
    ) -> Array:
        """Causal attention of new tokens, whose keys and values are written to a cache."""
        expect((offsets.size - 1,), slots=slots, lengths=lengths)
        capacity = k_cache.shape[1]
        inside = slots.size and slots.min() >= 0 and slots.max() < len(k_cache)
        new = np.diff(int64(offsets))
        fits = offsets[-1] == len(q) and (lengths >= new).all() and (lengths <= capacity).all()
        if not (inside and fits and one_of(q, k, v, k_cache, v_cache)):
            return super().attention_cached(
                q, k, v, k_cache, v_cache, offsets, slots, lengths, scale, window
            )
        check_offsets(offsets, len(q))
        check_heads(q, k_cache, v_cache)
        expect((len(q), *k_cache.shape[2:]), k=k, v=v)
        self._keep(k, k_cache, offsets, slots, lengths)
        self._keep(v, v_cache, offsets, slots, lengths)
        _, kernels = numba_compile.compiled()
        totals = int64(lengths)
        items = attention_items(
            offsets[:-1], new, int64(slots) * capacity, totals, slots, q.shape[1], kernels.QUERIES
        )
        shape = (-1, *k_cache.shape[2:])
        y, lse = empty(q.shape, q.dtype), np.empty(q.shape[:2], q.dtype)
        POOL.run(
            kernels.attention, len(items), int((new * totals).sum()) * q.shape[1] * q.shape[2],
            as_input(q), as_input(k_cache).reshape(shape), as_input(v_cache).reshape(shape), y, lse,
            items, q.dtype.type(scale), True, reach(window), *dropout_bits(0.0, 0, q.dtype),
        )  # fmt: skip
        return y
