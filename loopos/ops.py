"""One function per op: forward on the backend in force, backward recorded on the tape.

This and :mod:`loopos.autograd` are the only modules that know what a gradient is. Shapes are those
of the backend (:mod:`loopos.backends.numpy_backend`). Integer arguments (ids, offsets, targets) are
plain ndarrays; they have no gradient. The backend of the forward also runs the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from loopos import autograd
from loopos.autograd import Array, Tensor, enable_grad, no_grad, record, recording
from loopos.backends import get_backend, use_backend
from loopos.backends.quantized import QuantizedWeight
from loopos.backends.random_bits import derive_key
from loopos.errors import LooposError

__all__ = [
    "DropoutKeys",
    "activation",
    "add",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_cached",
    "binary_cross_entropy",
    "cross_entropy",
    "decode_linears",
    "dropout",
    "embedding",
    "gather_rows",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprobs",
    "linear_quantized",
    "linears",
    "mse",
    "recompute",
    "reshape",
    "rms_norm",
    "rope",
    "segment_last",
    "segment_mean",
    "split_columns",
    "swiglu",
]

Grads = Sequence[Array | None]

#: An activation of more bytes is computed again in the backward: to keep all of them takes more
#: memory than the little time is worth. One that stays in the caches is kept.
_KEPT_BYTES = 4 << 20


class DropoutKeys:
    """Hands out one 64-bit key per op, in the order of calls.

    Keys depend on the seed, the optimizer step and the number of the op in the forward, so every
    microbatch of a step must make its own ``DropoutKeys(seed, step)``: 8 x 1 then equals 1 x 8.

    Parameters
    ----------
    seed : int
        Of the run.
    step : int
        Of the optimizer.
    """

    def __init__(self, seed: int, step: int):
        self._seed, self._step, self._count = seed, step, 0

    def copy(self) -> DropoutKeys:
        """Return keys that go on where these are, to compute something a second time."""
        twin = DropoutKeys(self._seed, self._step)
        twin._count = self._count
        return twin

    def next(self) -> int:
        """Return the key of the next op."""
        self._count += 1
        return derive_key(self._seed, self._step, self._count)


def _into(parameter: Tensor | None) -> Array | None:
    """Return the buffer a backward adds to, or None when the tensor is absent or frozen."""
    if parameter is None or not parameter.requires_grad:
        return None
    return parameter.grad_buffer()


def _data(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else tensor.data


def _keep(x: Tensor) -> Callable[[], Array]:
    """Return what gives a backward the values of `x`."""
    if x.again is not None and x.data.nbytes > _KEPT_BYTES:
        return x.again
    data = x.data
    return lambda: data


def _only(grads: Grads) -> Array:
    """Return the gradient of an op's only output: without one its backward is not called."""
    assert grads[0] is not None
    return grads[0]


def _target(parameter: Tensor | None) -> tuple[Array | None, bool]:
    """Return the buffer for a backward, or None, and whether it adds to it or overwrites it."""
    if parameter is None or not parameter.requires_grad:
        return None, True
    return parameter.grad_target()


def linear(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``act(x w^T + b)``: ``x[N, C]``, ``w[O, C]``, ``b[O]`` to ``[N, O]``."""
    backend = get_backend()
    y, pre = backend.linear(x.data, w.data, _data(b), activation)
    need_dx = x.requires_grad
    kept = _keep(x) if w.requires_grad else None  # a frozen layer lets go of what went in

    def backward(grads: Grads) -> Grads:
        dw, accumulate = _target(w)
        dx = backend.linear_backward(
            _only(grads), kept and kept(), w.data, pre, activation,
            dw=dw, db=_into(b), accumulate=accumulate, need_dx=need_dx,
        )  # fmt: skip
        return dx, None, None

    again = None
    if pre is not None and activation is not None:
        again = partial(backend.activation, pre, activation)
    return record([y], (x, w, b), backward, again)


def linear_quantized(
    x: Tensor, w: QuantizedWeight, b: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """:func:`linear` with a weight of 16 or 8 bits; LooposError where a gradient is wanted."""
    if recording(x, b):
        raise LooposError("linear_quantized has no gradient: call it under no_grad()")
    return Tensor(get_backend().linear_quantized(x.data, w, _data(b), activation))


def linears(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """Several linear maps ``(w, b)`` of one input; their gradients of `x` add up in one buffer."""
    if len(layers) == 1:
        return (linear(x, *layers[0]),)
    backend = get_backend()
    outputs = backend.linears(x.data, [(w.data, _data(b)) for w, b in layers])
    kept = x.data if any(w.requires_grad for w, _ in layers) else None
    need_dx = x.requires_grad

    def backward(grads: Grads) -> Grads:
        dx: Array | None = None
        for dy, (w, b) in zip(grads, layers, strict=True):
            if dy is not None:
                dw, accumulate = _target(w)
                dx = backend.linear_backward(
                    dy, kept, w.data,
                    dw=dw, db=_into(b), accumulate=accumulate, dx=dx, need_dx=need_dx,
                )  # fmt: skip
        return [dx, *(None for _ in parameters)]

    parameters = [tensor for layer in layers for tensor in layer]
    results: tuple[Tensor, ...] = record(outputs, (x, *parameters), backward)
    return results


def decode_linears(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], activation: str | None = None
) -> list[Tensor]:
    """:func:`linear` of one input by each of `layers`, in a step of decoding.

    Made for few rows: a backend may sum in another order than for :func:`linear`, the same for one
    row and for many. LooposError where a gradient is wanted.
    """
    if recording(x, *(tensor for layer in layers for tensor in layer)):
        raise LooposError("decode_linears has no gradient: call it under no_grad()")
    pairs = [(w.data, _data(b)) for w, b in layers]
    return [Tensor(y) for y in get_backend().decode_linears(x.data, pairs, activation)]


def embedding(ids: Array, table: Tensor) -> Tensor:
    """Rows of ``table[V, C]`` at ``ids[N]``."""
    backend = get_backend()

    def backward(grads: Grads) -> Grads:
        if grads[0] is not None:
            backend.embedding_backward(grads[0], ids, table.grad_rows_target(ids))
        return (None,)

    return record([backend.embedding(ids, table.data)], (table,), backward)


def add(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``a + scale * b`` of one shape."""
    factor = b.dtype.type(scale)

    def backward(grads: Grads) -> Grads:
        dy = _only(grads)
        return dy, dy if scale == 1.0 else dy * factor

    return record([get_backend().add(a.data, b.data, scale)], (a, b), backward)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same values in another shape."""
    original = x.shape

    def backward(grads: Grads) -> Grads:
        return (None if grads[0] is None else grads[0].reshape(original),)

    return record([x.data.reshape(shape)], (x,), backward)


def split_columns(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """``x[N, C]`` cut into ``[N, size]`` for each of `sizes`, which add up to ``C``."""

    def backward(grads: Grads) -> Grads:
        dx = np.zeros(x.shape, x.dtype)
        for part, dy in zip(np.split(dx, np.cumsum(sizes)[:-1], axis=1), grads, strict=True):
            if dy is not None:
                part[...] = dy
        return (dx,)

    if list(sizes) == [x.shape[1]]:
        return [x]
    parts = get_backend().split_columns(x.data, sizes)
    return list(record(parts, (x,), backward))


def layer_norm(x: Tensor, g: Tensor, b: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of ``x[N, C]`` with gain ``g[C]`` and bias ``b[C]``."""
    return _layer_norm(x, None, g, b, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, g: Tensor, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(layer_norm(s), s)`` with ``s = x + residual``."""
    return _layer_norm(x, residual, g, b, eps)


def _layer_norm(
    x: Tensor, residual: Tensor | None, g: Tensor, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    backend = get_backend()
    y, s, mean, rstd = backend.layer_norm(x.data, g.data, _data(b), eps, _data(residual))
    need_dx = recording(x, residual)

    def backward(grads: Grads) -> Grads:
        if grads[0] is None:
            return grads[1], grads[1], None, None
        dx = backend.layer_norm_backward(
            grads[0], s, g.data, mean, rstd, grads[1], dg=_into(g), db=_into(b), need_dx=need_dx
        )
        return dx, dx, None, None

    normed, total = record([y, s], (x, residual, g, b), backward)
    return normed, total


def rms_norm(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of ``x[N, C]`` with gain ``g[C]``."""
    return _rms_norm(x, None, g, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(s), s)`` with ``s = x + residual``."""
    return _rms_norm(x, residual, g, eps)


def _rms_norm(x: Tensor, residual: Tensor | None, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    backend = get_backend()
    y, s, rstd = backend.rms_norm(x.data, g.data, eps, _data(residual))
    need_dx = recording(x, residual)

    def backward(grads: Grads) -> Grads:
        if grads[0] is None:
            return grads[1], grads[1], None
        dx = backend.rms_norm_backward(
            grads[0], s, g.data, rstd, grads[1], dg=_into(g), need_dx=need_dx
        )
        return dx, dx, None

    normed, total = record([y, s], (x, residual, g), backward)
    return normed, total


def activation(x: Tensor, kind: str) -> Tensor:
    """Elementwise ``gelu``, ``gelu_tanh``, ``relu``, ``silu`` or ``tanh``."""
    backend = get_backend()
    y = backend.activation(x.data, kind)

    def backward(grads: Grads) -> Grads:
        return (backend.activation_backward(_only(grads), x.data, kind),)

    return record([y], (x,), backward, partial(backend.activation, x.data, kind))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    backend = get_backend()
    y = backend.swiglu(gate.data, up.data)

    def backward(grads: Grads) -> Grads:
        return backend.swiglu_backward(_only(grads), gate.data, up.data)

    again = partial(backend.swiglu, gate.data, up.data)
    return record([y], (gate, up), backward, again)


def rope(q: Tensor, k: Tensor, positions: Array, inv_freq: Array) -> tuple[Tensor, Tensor]:
    """Rotate queries ``[N, H, D]`` and keys ``[N, Hk, D]`` by their positions."""
    backend = get_backend()
    rotated_q, rotated_k = backend.rope(q.data, k.data, positions, inv_freq)
    shapes, dtype = (q.shape, k.shape), q.dtype

    def backward(grads: Grads) -> Grads:
        dq, dk = (
            np.zeros(shape, dtype) if grad is None else grad
            for grad, shape in zip(grads, shapes, strict=True)
        )
        return backend.rope_backward(dq, dk, positions, inv_freq)

    outputs: tuple[Tensor, Tensor] = record([rotated_q, rotated_k], (q, k), backward)
    return outputs


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Array,
    causal: bool,
    scale: float,
    window: int | None = None,
    dropout_rate: float = 0.0,
    key: int | None = None,
    sample_ids: Array | None = None,
) -> Tensor:
    """Softmax attention of each sequence on itself; no dropout when `key` is None."""
    backend = get_backend()
    rate = 0.0 if key is None else dropout_rate
    options: tuple[Any, ...] = (offsets, causal, scale, window, rate, key or 0, sample_ids)
    y, lse = backend.attention(q.data, k.data, v.data, *options)

    def backward(grads: Grads) -> Grads:
        dy = _only(grads)
        return backend.attention_backward(dy, q.data, k.data, v.data, y, lse, *options)

    return record([y], (q, k, v), backward)


def attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Array,
    v_cache: Array,
    offsets: Array,
    slots: Array,
    lengths: Array,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of new tokens on a cache, to which it writes `k` and `v`; no gradient.

    Raises
    ------
    LooposError
        If a gradient would be recorded.
    """
    if recording(q, k, v):
        raise LooposError("attention_cached has no gradient; call it inside no_grad()")
    options = (k_cache, v_cache, offsets, slots, lengths, scale, window)
    return Tensor(get_backend().attention_cached(q.data, k.data, v.data, *options))


def segment_mean(x: Tensor, offsets: Array) -> Tensor:
    """Mean row of each sequence: ``[B, C]``."""
    backend = get_backend()
    y = backend.segment_mean(x.data, offsets)

    def backward(grads: Grads) -> Grads:
        return (backend.segment_mean_backward(_only(grads), offsets),)

    return record([y], (x,), backward)


def segment_last(x: Tensor, offsets: Array) -> Tensor:
    """Last row of each sequence: ``[B, C]``."""
    return gather_rows(x, offsets[1:] - 1)


def gather_rows(x: Tensor, rows: Array) -> Tensor:
    """``x[rows]``."""
    backend = get_backend()
    y, num_rows = backend.gather_rows(x.data, rows), x.shape[0]

    def backward(grads: Grads) -> Grads:
        return (backend.gather_rows_backward(_only(grads), rows, num_rows),)

    return record([y], (x,), backward)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Array,
    weights: Array | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Summed, weighted negative log-likelihood over the vocabulary, and the sum of the weights.

    Gradients are made in the forward, into scratch, and only while the tape records; the backward
    scales them and adds.
    """
    wanted = [recording(t) for t in (h, w, b)]
    total, count, dh, dw, db = get_backend().linear_cross_entropy(
        h.data, w.data, targets, weights, _data(b),
        need_dh=wanted[0], need_dw=wanted[1], need_db=wanted[2],
    )  # fmt: skip

    def backward(grads: Grads) -> Grads:
        upstream = float(_only(grads))
        for tensor, gradient in ((w, dw), (b, db)):
            if tensor is not None and gradient is not None:
                if upstream == 1.0:
                    tensor.give_grad(gradient)
                else:
                    tensor.add_grad(gradient, upstream)
        return dh if dh is None or upstream == 1.0 else dh * dh.dtype.type(upstream), None, None

    return record([np.asarray(total, dtype=np.float64)], (h, w, b), backward), count


def linear_logprobs(
    h: Tensor, w: Tensor, targets: Array, temperature: float = 1.0, b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution: ``[N]``, ``[N]``, nats."""
    backend = get_backend()
    logp, entropy, lse = backend.linear_logprobs(h.data, w.data, targets, temperature, _data(b))

    def backward(grads: Grads) -> Grads:
        dlogp = np.zeros_like(logp) if grads[0] is None else grads[0]
        dw, accumulate = _target(w)
        dh = backend.linear_logprobs_backward(
            dlogp, grads[1], h.data, w.data, targets, entropy, lse, temperature, _data(b),
            dw=dw, db=_into(b), accumulate=accumulate, need_dh=h.requires_grad,
        )  # fmt: skip
        return dh, None, None

    outputs: tuple[Tensor, Tensor] = record([logp, entropy], (h, w, b), backward)
    return outputs


def linear_kl(
    h: Tensor,
    w: Tensor,
    h_ref: Array,
    w_ref: Array,
    temperature: float = 1.0,
    b: Tensor | None = None,
    b_ref: Array | None = None,
) -> Tensor:
    """Exact ``KL(policy || reference)`` per token ``[N]``; the reference is plain arrays."""
    backend = get_backend()
    fixed = (h_ref, w_ref, temperature)
    kl = backend.linear_kl(h.data, w.data, *fixed, _data(b), b_ref)

    def backward(grads: Grads) -> Grads:
        dw, accumulate = _target(w)
        dh = backend.linear_kl_backward(
            _only(grads), kl, h.data, w.data, *fixed, _data(b), b_ref,
            dw=dw, db=_into(b), accumulate=accumulate, need_dh=h.requires_grad,
        )  # fmt: skip
        return dh, None, None

    return record([kl], (h, w, b), backward)


def cross_entropy(
    logits: Tensor,
    labels: Array,
    class_weights: Array | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, float]:
    """Summed cross-entropy of ``logits[B, K]``, and the sum of the labels' class weights."""
    total, count, dlogits = get_backend().cross_entropy(
        logits.data, labels, class_weights, label_smoothing
    )
    return _scaled(logits, total, dlogits), count


def binary_cross_entropy(logits: Tensor, targets: Array) -> tuple[Tensor, float]:
    """Summed binary cross-entropy of ``logits[B, K]`` and ``targets[B, K]``, and the elements."""
    total, count, gradient = get_backend().binary_cross_entropy(logits.data, targets)
    return _scaled(logits, total, gradient), count


def mse(prediction: Tensor, target: Array) -> tuple[Tensor, float]:
    """Summed squared error, and the number of elements."""
    total, count, gradient = get_backend().mse(prediction.data, target)
    return _scaled(prediction, total, gradient), count


def _scaled(x: Tensor, total: float, gradient: Array) -> Tensor:
    """A scalar whose gradient was made in the forward."""

    def backward(grads: Grads) -> Grads:
        return (gradient * gradient.dtype.type(float(_only(grads))),)

    return record([np.asarray(total, dtype=np.float64)], (x,), backward)


def dropout(
    x: Tensor, rate: float, keys: DropoutKeys | None, offsets: Array, sample_ids: Array
) -> Tensor:
    """Dropout on ``x[N, C]``; `x` itself when `keys` is None (evaluation) or the rate is 0."""
    if keys is None or rate == 0.0:
        return x
    backend, key = get_backend(), keys.next()
    options = (rate, key, offsets, sample_ids)

    def backward(grads: Grads) -> Grads:
        return (backend.dropout_backward(_only(grads), *options),)

    return record([backend.dropout(x.data, *options)], (x,), backward)


def recompute(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    parameters: Iterable[Tensor],
) -> tuple[Tensor, ...]:
    """Call `function`, keep its inputs and outputs only, and call it again in the backward.

    Gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost"). The
    same ops run on the same values in the same order, so gradients have the same bytes.

    Parameters
    ----------
    function : callable
        Of the inputs alone: what it draws, it must draw again on its second call.
    inputs : tuple of Tensor
    parameters : iterable of Tensor
        All that `function` uses besides: their gradients are added as always.

    Returns
    -------
    tuple of Tensor
    """
    trained = [p for p in parameters if p.requires_grad]
    if not recording(*inputs, *trained):
        return function(*inputs)
    backend = get_backend()
    with no_grad():
        arrays = [tensor.data for tensor in function(*inputs)]

    def backward(grads: Grads) -> Grads:
        leaves = tuple(Tensor(tensor.data, tensor.requires_grad) for tensor in inputs)
        with use_backend(backend), enable_grad():
            outputs = zip(function(*leaves), grads, strict=True)
            autograd.backward([(y, g) for y, g in outputs if g is not None and y.requires_grad])
        return [*(leaf.grad for leaf in leaves), *(None for _ in trained)]

    outputs = record(arrays, (*inputs, *trained), backward)
    return outputs if isinstance(outputs, tuple) else (outputs,)
