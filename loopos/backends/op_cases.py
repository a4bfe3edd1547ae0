"""The one list of op cases: what every backend is tested, gradient-checked and timed on.

A case makes its inputs from a generator, runs an op forward and, where it has one, backward. Adding
an op means adding a row to ``CASES``. Sizes are odd on purpose; single tokens and empty batches are
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopos.backends.numpy_backend import ACTIVATIONS, AdamwTensor, NumpyBackend
from loopos.backends.quantized import KINDS

Array = np.ndarray[Any, Any]
Inputs = dict[str, Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class OpCase:
    """One op on one set of inputs.

    Attributes
    ----------
    op : str
        Name of the forward in the backend.
    label : str
        What is special about these inputs.
    inputs : callable
        ``rng -> {name: float64 array, int array or plain value}``.
    forward : callable
        ``(backend, inputs) -> outputs``; in-place ops return the arrays that they changed.
    backward : callable or None
        ``(backend, inputs, outputs, upstream) -> {input name: gradient}`` with one upstream array
        per differentiable output.
    differentiable : int
        How many of the outputs, from the first, have an upstream gradient.
    in_place : tuple of str
        Inputs that the op changes; they are contiguous.
    own : bool
        Whether all inputs are loopos's own (an optimizer's), and so contiguous. Others need not be.
    """

    op: str
    label: str
    inputs: Callable[[Rng], Inputs]
    forward: Callable[[NumpyBackend, Inputs], Sequence[Any]]
    backward: Callable[[NumpyBackend, Inputs, Sequence[Any], list[Array]], Inputs] | None = None
    differentiable: int = 1
    in_place: tuple[str, ...] = ()
    own: bool = False

    @property
    def name(self) -> str:
        """Readable and unique: ``op[label]``."""
        return f"{self.op}[{self.label}]"


def _offsets(lengths: Sequence[int]) -> Array:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int32)


def _zeros(a: Inputs, *names: str) -> dict[str, Any]:
    """Fresh accumulators ``d<name>`` for weights."""
    return {f"d{name}": np.zeros_like(a[name], order="C") for name in names}


def linear(n: int, c: int, o: int, activation: str | None = None, bias: bool = True) -> OpCase:
    """Linear map with or without bias and fused activation."""

    def inputs(rng: Rng) -> Inputs:
        values = {"x": rng.normal(size=(n, c)), "w": rng.normal(size=(o, c)) / np.sqrt(c)}
        return values | ({"b": rng.normal(size=o)} if bias else {})

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        return be.linear(a["x"], a["w"], a.get("b"), activation)

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        into = _zeros(a, "w", "b") if bias else _zeros(a, "w")
        dx = be.linear_backward(up[0], a["x"], a["w"], out[1], activation, **into)
        return {"x": dx, "w": into["dw"]} | ({"b": into["db"]} if bias else {})

    label = f"{n}x{c}x{o}" + (f",{activation}" if activation else "") + ("" if bias else ",no bias")
    return OpCase("linear", label, inputs, forward, backward)


def linears(n: int, c: int, sizes: Sequence[int]) -> OpCase:
    """Several linear maps of one input, every other one with a bias."""
    names = [f"w{i}" for i in range(len(sizes))]

    def inputs(rng: Rng) -> Inputs:
        values = {"x": rng.normal(size=(n, c))}
        for i, o in enumerate(sizes):
            values[f"w{i}"] = rng.normal(size=(o, c)) / np.sqrt(c)
            if i % 2 == 0:
                values[f"b{i}"] = rng.normal(size=o)
        return values

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        return be.linears(a["x"], [(a[w], a.get(w.replace("w", "b"))) for w in names])

    return OpCase("linears", f"{n}x{c}x{list(sizes)}", inputs, forward)


def decode_linears(n: int, c: int, sizes: Sequence[int], activation: str | None) -> OpCase:
    """The same with an activation, without gradients."""
    case = linears(n, c, sizes)

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        layers = [(a[f"w{i}"], a.get(f"b{i}")) for i in range(len(sizes))]
        return be.decode_linears(a["x"], layers, activation)

    label = case.label + (f",{activation}" if activation else "")
    return OpCase("decode_linears", label, case.inputs, forward)


def quantize(o: int, c: int, kind: str) -> OpCase:
    """A weight in fewer bits, with values of every size."""

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        w = be.quantize(a["w"], kind)
        scales = None if w.scales is None else w.scales.astype(a["w"].dtype)
        return [w.panels.astype(np.int32), scales]

    return OpCase(
        "quantize",
        f"{o}x{c},{kind}",
        lambda rng: {"w": rng.normal(size=(o, c)) * 10.0 ** rng.integers(-9, 9, size=(o, 1))},
        forward,
    )


def linear_quantized(
    n: int, c: int, o: int, kind: str, activation: str | None = None, bias: bool = True
) -> OpCase:
    """Linear map with a weight of fewer bits."""

    def inputs(rng: Rng) -> Inputs:
        values = {"x": rng.normal(size=(n, c)), "w": rng.normal(size=(o, c)) / np.sqrt(c)}
        return values | ({"b": rng.normal(size=o)} if bias else {})

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        w = be.quantize(a["w"], kind)
        return [be.linear_quantized(a["x"], w, a.get("b"), activation)]

    label = f"{n}x{c}x{o},{kind}" + (f",{activation}" if activation else "")
    return OpCase("linear_quantized", label + ("" if bias else ",no bias"), inputs, forward)


def embedding(n: int, v: int, c: int) -> OpCase:
    """Table look-up with repeated ids."""

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        into = _zeros(a, "table")
        be.embedding_backward(up[0], a["ids"], into["dtable"])
        return {"table": into["dtable"]}

    return OpCase(
        "embedding",
        f"{n}x{v}x{c}",
        lambda rng: {
            "ids": rng.integers(0, v, n).astype(np.int32),
            "table": rng.normal(size=(v, c)),
        },
        lambda be, a: [be.embedding(a["ids"], a["table"])],
        backward,
    )


def norm(op: str, n: int, c: int, residual: bool) -> OpCase:
    """``layer_norm`` or ``rms_norm``, alone or after a residual add (then two outputs)."""
    layer = op == "layer_norm"

    def inputs(rng: Rng) -> Inputs:
        a = {"x": rng.normal(1.0, 2.0, size=(n, c)), "g": rng.normal(size=c)}
        a |= {"b": rng.normal(size=c)} if layer else {}
        return a | ({"residual": rng.normal(size=(n, c))} if residual else {})

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        if layer:
            return be.layer_norm(a["x"], a["g"], a["b"], 1e-5, a.get("residual"))
        return be.rms_norm(a["x"], a["g"], 1e-5, a.get("residual"))

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        ds = up[1] if residual else None
        into = _zeros(a, "g", "b") if layer else _zeros(a, "g")
        call: Any = be.layer_norm_backward if layer else be.rms_norm_backward
        dx = call(up[0], out[1], a["g"], *out[2:], ds, **into)
        grads = {"x": dx, "g": into["dg"]} | ({"b": into["db"]} if layer else {})
        return grads | ({"residual": dx} if residual else {})

    label = f"{n}x{c}" + (",residual" if residual else "")
    return OpCase(op, label, inputs, forward, backward, differentiable=2 if residual else 1)


def activation(kind: str, n: int, c: int) -> OpCase:
    """One elementwise activation."""
    return OpCase(
        "activation",
        f"{kind},{n}x{c}",
        lambda rng: {"x": rng.normal(0.0, 2.0, size=(n, c))},
        lambda be, a: [be.activation(a["x"], kind)],
        lambda be, a, out, up: {"x": be.activation_backward(up[0], a["x"], kind)},
    )


def swiglu(n: int, f: int) -> OpCase:
    """Gated activation."""
    return OpCase(
        "swiglu",
        f"{n}x{f}",
        lambda rng: {"gate": rng.normal(0, 2, size=(n, f)), "up": rng.normal(size=(n, f))},
        lambda be, a: [be.swiglu(a["gate"], a["up"])],
        lambda be, a, out, up: dict(
            zip(("gate", "up"), be.swiglu_backward(up[0], a["gate"], a["up"]), strict=True)
        ),
    )


def rope(n: int, heads: int, kv_heads: int, d: int, rotated: int) -> OpCase:
    """Rotary positions, on all or the first channels."""

    def inputs(rng: Rng) -> Inputs:
        return {
            "q": rng.normal(size=(n, heads, d)),
            "k": rng.normal(size=(n, kv_heads, d)),
            "positions": rng.integers(0, 4000, n).astype(np.int32),
            "inv_freq": 10000.0 ** -(np.arange(0, rotated, 2) / rotated),
        }

    return OpCase(
        "rope",
        f"{n}x{heads}/{kv_heads}x{d},{rotated} rotated",
        inputs,
        lambda be, a: be.rope(a["q"], a["k"], a["positions"], a["inv_freq"]),
        lambda be, a, out, up: dict(
            zip("qk", be.rope_backward(up[0], up[1], a["positions"], a["inv_freq"]), strict=True)
        ),
        differentiable=2,
    )


def attention(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    d: int,
    causal: bool,
    window: int | None = None,
    dropout: float = 0.0,
) -> OpCase:
    """Ragged attention."""
    offsets, n = _offsets(lengths), int(sum(lengths))
    samples = np.arange(len(lengths), dtype=np.int32)[::-1].copy()
    options = (offsets, causal, 1 / np.sqrt(d), window, dropout, 12345, samples)

    def inputs(rng: Rng) -> Inputs:
        shape = (n, kv_heads, d)
        q = rng.normal(size=(n, heads, d))
        return {"q": q, "k": rng.normal(size=shape), "v": rng.normal(size=shape)}

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        args = (up[0], a["q"], a["k"], a["v"], *out, *options)
        return dict(zip("qkv", be.attention_backward(*args), strict=True))

    label = f"{len(lengths)} sequences,{n}x{heads}/{kv_heads}x{d},{'causal' if causal else 'both'}"
    label += f",window {window}" if window else ""
    return OpCase(
        "attention",
        label + (f",dropout {dropout}" if dropout else ""),
        inputs,
        lambda be, a: be.attention(a["q"], a["k"], a["v"], *options),
        backward,
    )


def attention_cached(new: Sequence[int], past: Sequence[int], window: int | None = None) -> OpCase:
    """New tokens against a cache with slots out of order, to which they are added."""
    heads, kv_heads, d, slots = 6, 3, 8, len(new) + 1
    lengths = np.array([a + b for a, b in zip(new, past, strict=True)], dtype=np.int32)
    capacity = int(lengths.max(initial=0)) + 2

    def inputs(rng: Rng) -> Inputs:
        return {
            "q": rng.normal(size=(sum(new), heads, d)),
            "k": rng.normal(size=(sum(new), kv_heads, d)),
            "v": rng.normal(size=(sum(new), kv_heads, d)),
            "k_cache": rng.normal(size=(slots, capacity, kv_heads, d)),
            "v_cache": rng.normal(size=(slots, capacity, kv_heads, d)),
            "slots": rng.permutation(slots)[: len(new)].astype(np.int32),
        }

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        tail = (_offsets(new), a["slots"], lengths, 1 / np.sqrt(d), window)
        keys, values = a["k_cache"], a["v_cache"]
        return [be.attention_cached(a["q"], a["k"], a["v"], keys, values, *tail), keys, values]

    label = f"new {list(new)},past {list(past)}" + (f",window {window}" if window else "")
    in_place = ("k_cache", "v_cache")
    return OpCase("attention_cached", label, inputs, forward, in_place=in_place)


def segment_mean(lengths: Sequence[int], c: int) -> OpCase:
    """Mean pooling."""
    offsets = _offsets(lengths)
    return OpCase(
        "segment_mean",
        f"{list(lengths)},{c}",
        lambda rng: {"x": rng.normal(size=(int(offsets[-1]), c))},
        lambda be, a: [be.segment_mean(a["x"], offsets)],
        lambda be, a, out, up: {"x": be.segment_mean_backward(up[0], offsets)},
    )


def segment_last(lengths: Sequence[int], c: int) -> OpCase:
    """Last-token pooling; its backward is that of ``gather_rows``."""
    offsets = _offsets(lengths)
    return OpCase(
        "segment_last",
        f"{list(lengths)},{c}",
        lambda rng: {"x": rng.normal(size=(int(offsets[-1]), c))},
        lambda be, a: [be.segment_last(a["x"], offsets)],
        lambda be, a, out, up: {"x": be.gather_rows_backward(up[0], offsets[1:] - 1, len(a["x"]))},
    )


def split_columns(n: int, sizes: Sequence[int]) -> OpCase:
    """Columns as arrays of their own."""
    return OpCase(
        "split_columns",
        f"{n}x{list(sizes)}",
        lambda rng: {"x": rng.normal(size=(n, sum(sizes)))},
        lambda be, a: be.split_columns(a["x"], sizes),
    )


def gather_rows(n: int, rows: int, c: int) -> OpCase:
    """Rows picked with repetition."""
    return OpCase(
        "gather_rows",
        f"{rows} of {n}x{c}",
        lambda rng: {
            "x": rng.normal(size=(n, c)),
            "rows": rng.integers(0, max(n, 1), rows).astype(np.int32),
        },
        lambda be, a: [be.gather_rows(a["x"], a["rows"])],
        lambda be, a, out, up: {"x": be.gather_rows_backward(up[0], a["rows"], n)},
    )


def _head_inputs(rng: Rng, n: int, c: int, v: int, bias: bool) -> Inputs:
    a: Inputs = {"h": rng.normal(size=(n, c)), "w": rng.normal(size=(v, c)) / np.sqrt(c)}
    a["targets"] = rng.integers(0, v, n).astype(np.int32)
    return a | ({"b": rng.normal(size=v)} if bias else {})


def linear_cross_entropy(n: int, c: int, v: int, weighted: bool, bias: bool = False) -> OpCase:
    """Language-model loss; the gradients of the forward are its backward."""

    def inputs(rng: Rng) -> Inputs:
        a = _head_inputs(rng, n, c, v, bias)
        weights = rng.integers(0, 3, n).astype(np.float64) / 2
        return a | ({"weights": weights} if weighted else {})

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        need: dict[str, Any] = {"need_dh": True, "need_dw": True, "need_db": bias}
        args = (a["h"], a["w"], a["targets"], a.get("weights"), a.get("b"))
        return be.linear_cross_entropy(*args, **need)

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        return {
            k: g * g.dtype.type(up[0]) for k, g in zip("hwb", out[2:], strict=True) if g is not None
        }

    label = f"{n}x{c}x{v}" + (",weighted" if weighted else "") + (",bias" if bias else "")
    return OpCase("linear_cross_entropy", label, inputs, forward, backward)


def linear_logprobs(n: int, c: int, v: int, temperature: float, bias: bool = False) -> OpCase:
    """Log-probabilities and entropies."""

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        return be.linear_logprobs(a["h"], a["w"], a["targets"], temperature, a.get("b"))

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        into = _zeros(a, "w", "b") if bias else _zeros(a, "w")
        args = (*up, a["h"], a["w"], a["targets"], *out[1:], temperature, a.get("b"))
        dh = be.linear_logprobs_backward(*args, **into)
        return {"h": dh, "w": into["dw"]} | ({"b": into["db"]} if bias else {})

    label = f"{n}x{c}x{v},T {temperature}" + (",bias" if bias else "")
    return OpCase(
        "linear_logprobs",
        label,
        lambda rng: _head_inputs(rng, n, c, v, bias),
        forward,
        backward,
        differentiable=2,
    )


def linear_kl(n: int, c: int, v: int, temperature: float) -> OpCase:
    """Exact divergence from a fixed reference."""

    def inputs(rng: Rng) -> Inputs:
        a = _head_inputs(rng, n, c, v, False)
        reference = {"h_ref": rng.normal(size=(n, c)), "w_ref": rng.normal(size=(v, c))}
        return a | reference

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        into = _zeros(a, "w")
        args = (up[0], out[0], a["h"], a["w"], a["h_ref"], a["w_ref"], temperature)
        return {"h": be.linear_kl_backward(*args, **into), "w": into["dw"]}

    return OpCase(
        "linear_kl",
        f"{n}x{c}x{v},T {temperature}",
        inputs,
        lambda be, a: [be.linear_kl(a["h"], a["w"], a["h_ref"], a["w_ref"], temperature)],
        backward,
    )


def cross_entropy(n: int, k: int, weighted: bool, smoothing: float) -> OpCase:
    """Classification loss."""

    def inputs(rng: Rng) -> Inputs:
        a: Inputs = {"logits": rng.normal(0, 2, size=(n, k))}
        a["labels"] = rng.integers(0, k, n).astype(np.int64)
        return a | ({"class_weights": rng.uniform(0.2, 3, k)} if weighted else {})

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        return be.cross_entropy(a["logits"], a["labels"], a.get("class_weights"), smoothing)

    label = f"{n}x{k}" + (",weighted" if weighted else "") + (",smoothed" if smoothing else "")
    return OpCase(
        "cross_entropy",
        label,
        inputs,
        forward,
        lambda be, a, out, up: {"logits": out[2] * out[2].dtype.type(up[0])},
    )


def binary_cross_entropy(n: int, k: int, spread: float) -> OpCase:
    """Multi-label loss; a large spread saturates the sigmoid."""
    return OpCase(
        "binary_cross_entropy",
        f"{n}x{k},spread {spread:g}",
        lambda rng: {
            "logits": rng.normal(0, spread, size=(n, k)),
            "targets": rng.integers(0, 2, size=(n, k)).astype(np.int64),
        },
        lambda be, a: be.binary_cross_entropy(a["logits"], a["targets"]),
        lambda be, a, out, up: {"logits": out[2] * out[2].dtype.type(up[0])},
    )


def mse(n: int) -> OpCase:
    """Squared error."""
    return OpCase(
        "mse",
        f"{n}",
        lambda rng: {"prediction": rng.normal(size=n), "target": rng.normal(size=n)},
        lambda be, a: be.mse(a["prediction"], a["target"]),
        lambda be, a, out, up: {"prediction": out[2] * out[2].dtype.type(up[0])},
    )


def dropout(lengths: Sequence[int], c: int, rate: float) -> OpCase:
    """Counter-based dropout."""
    samples = np.arange(len(lengths), dtype=np.int32)[::-1].copy()
    options = (rate, 987654321, _offsets(lengths), samples)
    return OpCase(
        "dropout",
        f"{list(lengths)},{c},{rate}",
        lambda rng: {"x": rng.normal(size=(sum(lengths), c))},
        lambda be, a: [be.dropout(a["x"], *options)],
        lambda be, a, out, up: {"x": be.dropout_backward(up[0], *options)},
    )


def adamw(shape: tuple[int, ...], step: int, decoupled: bool) -> OpCase:
    """One optimizer step."""

    def inputs(rng: Rng) -> Inputs:
        a = {name: rng.normal(size=shape) for name in "pgm"}
        return a | {"v": rng.uniform(0.01, 1, size=shape)}

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        rates = (1e-2, 0.9, 0.999, 1e-8, 0.1, step, 0.5, decoupled)
        be.adamw(a["p"], a["g"], a["m"], a["v"], *rates)
        return [a["p"], a["m"], a["v"]]

    label = f"{shape},step {step}" + ("" if decoupled else ",L2")
    return OpCase("adamw", label, inputs, forward, in_place=("p", "m", "v"), own=True)


def adamw_many(*shapes: tuple[int, ...], some_rows: bool = False) -> OpCase:
    """One optimizer step of several tensors, each with numbers of its own.

    With `some_rows` two rows of three have neither a gradient nor moments, and the op is told so.
    """
    numbers = range(len(shapes))
    used = [np.arange(shape[0]) % 3 == 1 for shape in shapes]

    def inputs(rng: Rng) -> Inputs:
        a = {f"{name}{i}": rng.normal(size=shapes[i]) for i in numbers for name in "pgm"}
        a |= {f"v{i}": rng.uniform(0.01, 1, size=shapes[i]) for i in numbers}
        for i in numbers if some_rows else ():
            for name in "gmv":
                a[f"{name}{i}"][~used[i]] = 0
        return a

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        tensors = [
            AdamwTensor(
                a[f"p{i}"], a[f"g{i}"], a[f"m{i}"], a[f"v{i}"], 1e-2 / (i + 1), 0.1 * i, i + 1,
                used[i] if some_rows else None,
            )
            for i in numbers
        ]  # fmt: skip
        be.adamw_many(tensors, 0.9, 0.999, 1e-8, 0.5)
        return [a[f"{name}{i}"] for i in numbers for name in "pmv"]

    changed = tuple(f"{name}{i}" for i in numbers for name in "pmv")
    label = f"{len(shapes)} tensors{', some rows' if some_rows else ''}"
    return OpCase("adamw_many", label, inputs, forward, in_place=changed, own=True)


def add(n: int, c: int, scale: float) -> OpCase:
    """Weighted sum of two arrays."""

    def backward(be: NumpyBackend, a: Inputs, out: Sequence[Any], up: list[Array]) -> Inputs:
        return {"a": up[0], "b": up[0] * up[0].dtype.type(scale)}

    return OpCase(
        "add",
        f"{n}x{c},{scale}",
        lambda rng: {"a": rng.normal(size=(n, c)), "b": rng.normal(size=(n, c))},
        lambda be, a: [be.add(a["a"], a["b"], scale)],
        backward,
    )


def sgd(shape: tuple[int, ...], nesterov: bool, first: bool) -> OpCase:
    """One step with momentum."""

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        be.sgd(a["p"], a["g"], a["m"], 0.1, 0.9, 0.01, nesterov, first, 0.5)
        return [a["p"], a["m"]]

    label = f"{shape}" + (",nesterov" if nesterov else "") + (",first" if first else "")
    return OpCase(
        "sgd",
        label,
        lambda rng: {name: rng.normal(size=shape) for name in "pgm"},
        forward,
        in_place=("p", "m"),
        own=True,
    )


def scans(op: str, lengths: Sequence[int]) -> OpCase:
    """``gae`` and ``discounted_sum``."""
    offsets = _offsets(lengths)

    def inputs(rng: Rng) -> Inputs:
        n = int(offsets[-1])
        return {"rewards": rng.normal(size=n), "values": rng.normal(size=n)}

    def forward(be: NumpyBackend, a: Inputs) -> Sequence[Any]:
        if op == "gae":
            return be.gae(a["rewards"], a["values"], offsets, 0.97, 0.9)
        return [be.discounted_sum(a["rewards"], offsets, 0.97)]

    return OpCase(op, f"{list(lengths)}", inputs, forward)


def sample(rows: int, v: int, t: float, k: int, top_p: float, min_p: float) -> OpCase:
    """Sampling with every truncation."""

    def inputs(rng: Rng) -> Inputs:
        # A grid of logits keeps float32 and float64 on the same side of every threshold.
        logits = rng.integers(-40, 40, size=(rows, v)) / 8 + np.arange(v) / 1024
        return {"logits": logits, "u": rng.uniform(size=rows)}

    return OpCase(
        "sample",
        f"{rows}x{v},T {t},k {k},p {top_p},min {min_p}",
        inputs,
        lambda be, a: be.sample(a["logits"], t, k, top_p, min_p, a["u"]),
    )


RAGGED = (5, 1, 17, 5, 33)

CASES: list[OpCase] = [
    linear(7, 5, 11),
    linear(1, 3, 1, bias=False),
    linear(0, 5, 3),
    linear(67, 129, 35),
    *(linear(9, 7, 13, kind) for kind in ACTIVATIONS),
    *(linears(n, 50, (17, 8, 33, 1, 40, 9, 24, 7, 30)) for n in (0, 1, 3, 7, 33, 70)),
    linears(2, 400, (64, 0, 32)),
    *(decode_linears(n, 50, (17, 8, 33), kind) for n, kind in (
        (0, None), (1, None), (3, "gelu_tanh"), (33, "silu"), (70, "gelu"))),
    decode_linears(2, 400, (64, 0, 32), "relu"),
    *(quantize(o, c, kind) for kind in KINDS for o, c in ((33, 21), (1, 1), (64, 50), (0, 3))),
    *(linear_quantized(*shape, kind) for kind in KINDS for shape in (
        (1, 13, 35), (1, 401, 300), (2, 50, 97), (3, 401, 300), (16, 50, 97), (25, 385, 33),
        (70, 129, 64), (0, 5, 3))),
    *(linear_quantized(n, 9, 13, kind, act) for kind in KINDS for n, act in (
        (1, "gelu_tanh"), (7, "silu"), (40, "relu"))),
    linear_quantized(3, 7, 40, "int8", bias=False),
    embedding(23, 7, 5),
    embedding(0, 7, 5),
    *(norm(op, n, c, r) for op in ("layer_norm", "rms_norm") for n, c, r in (
        (9, 13, False), (9, 13, True), (1, 1, True), (0, 5, True))),
    *(activation(kind, 5, 9) for kind in ACTIVATIONS),
    activation("gelu", 0, 9),
    swiglu(7, 11),
    rope(9, 4, 2, 6, 6),
    rope(9, 3, 3, 8, 4),
    *(attention(RAGGED, 4, h, 7, causal) for h in (4, 2, 1) for causal in (True, False)),
    attention(RAGGED, 4, 2, 7, True, window=4),
    attention(RAGGED, 4, 2, 7, False, window=4),
    attention(RAGGED, 4, 2, 7, True, dropout=0.3),
    attention((70, 3, 165), 2, 1, 20, True),
    attention((101,), 2, 2, 9, False, window=40),
    attention((), 2, 2, 4, True),
    attention((1,), 2, 1, 5, True),
    attention_cached((1, 1, 1), (4, 0, 9)),
    attention_cached((3, 1, 5), (0, 7, 2)),
    attention_cached((3, 1, 5), (4, 7, 2), window=3),
    segment_mean(RAGGED, 6),
    segment_mean((), 6),
    segment_last(RAGGED, 6),
    split_columns(5, (3, 0, 7)),
    split_columns(0, (2, 2)),
    split_columns(40, (64, 32, 32)),
    gather_rows(9, 5, 4),
    gather_rows(9, 0, 4),
    linear_cross_entropy(19, 7, 31, True),
    linear_cross_entropy(19, 7, 31, False, bias=True),
    linear_cross_entropy(0, 7, 31, False),
    linear_logprobs(19, 7, 31, 1.0),
    linear_logprobs(19, 7, 31, 0.7, bias=True),
    linear_kl(19, 7, 31, 1.0),
    linear_kl(19, 7, 31, 1.3),
    *(cross_entropy(9, 5, weighted, s) for weighted in (False, True) for s in (0.0, 0.1)),
    cross_entropy(0, 5, False, 0.0),
    *(binary_cross_entropy(7, 5, spread) for spread in (1.0, 60.0)),
    binary_cross_entropy(0, 5, 1.0),
    mse(13),
    dropout(RAGGED, 9, 0.3),
    add(5, 7, 1.0),
    add(70, 301, -0.3),
    adamw((7, 5), 1, True),
    adamw_many((7, 5), (0, 3), (40001,), (3,)),
    adamw_many((7, 5), (0, 3), (901, 50), (3,), some_rows=True),
    adamw((40001,), 9, True),
    adamw((7, 5), 3, False),
    sgd((7, 5), False, True),
    sgd((7, 5), True, False),
    OpCase(
        "sum_squares",
        "two arrays",
        lambda rng: {"x": rng.normal(size=(9, 7)), "y": rng.normal(size=40001)},
        lambda be, a: [be.sum_squares([a["x"], a["y"]])],
    ),
    OpCase(
        "scale",
        "7x5",
        lambda rng: {"x": rng.normal(size=(7, 5))},
        lambda be, a: (be.scale(a["x"], 0.3), [a["x"]])[1],  # type: ignore[func-returns-value]
        in_place=("x",),
        own=True,
    ),
    *(scans("gae", lengths) for lengths in (RAGGED, (), (1, 0, 3))),
    *(scans("discounted_sum", lengths) for lengths in (RAGGED, (), (1, 0, 3))),
    sample(50, 37, 1.0, 0, 1.0, 0.0),
    sample(50, 37, 0.0, 0, 1.0, 0.0),
    sample(50, 37, 0.7, 5, 1.0, 0.0),
    sample(50, 37, 1.3, 0, 0.8, 0.0),
    sample(50, 37, 1.0, 9, 0.9, 0.05),
    sample(20, 1500, 1.0, 0, 1.0, 0.0),
    sample(20, 1500, 0.8, 20, 0.9, 0.0),
    sample(20, 1500, 1.0, 100, 1.0, 0.0),
    sample(20, 1500, 1.2, 0, 0.95, 0.0),
    sample(20, 1500, 1.0, 0, 1.0, 0.1),
    sample(3, 1, 1.0, 1, 0.5, 0.5),
    sample(0, 9, 1.0, 0, 0.9, 0.0),
]  # fmt: skip

#: The same ops at the sizes of GPT-2 124M (4 x 256 tokens), for timing.
BENCHMARK_CASES: list[OpCase] = [
    linear(1024, 768, 3072, "gelu_tanh"),
    linear(1, 768, 3072),
    embedding(1024, 50257, 768),
    norm("layer_norm", 1024, 768, True),
    norm("rms_norm", 1024, 768, True),
    activation("gelu_tanh", 1024, 3072),
    swiglu(1024, 3072),
    attention((256,) * 4, 12, 12, 64, True),
    attention((16, 500, 80, 43, 7, 250), 12, 12, 64, True),
    linear_cross_entropy(1024, 768, 50257, False),
    linear_logprobs(256, 768, 50257, 1.0),
    linear_kl(256, 768, 50257, 1.0),
    adamw((3072, 768), 2, True),
]
