"""The tape: order, accumulation, frozen parameters, and each op's recorded backward."""

import gc
import weakref

import numpy as np
import pytest

import loopos
from loopos import ops
from loopos.autograd import Parameter, Tensor, backward, is_grad_enabled, no_grad
from loopos.backends import available_backends, use_backend
from loopos.errors import LooposError

OFFSETS = np.array([0, 4, 5, 9], np.int32)
SAMPLES = np.array([2, 0, 1], np.int32)


def array(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def leaf(*shape, seed=0):
    return Tensor(array(*shape, seed=seed), requires_grad=True)


def check(function, leaves, seed=5):
    """Compare backward with a central difference along one random direction."""

    def total():
        outputs = function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [(t, array(*t.shape, seed=seed + i)) for i, t in enumerate(outputs)]

    for tensor in leaves:
        tensor.zero_grad()
    backward(total())
    rng = np.random.default_rng(seed)
    directions = [rng.normal(size=t.shape) for t in leaves]
    analytic = sum(float(np.sum(t.grad * d)) for t, d in zip(leaves, directions, strict=True))
    starts = [t.data.copy() for t in leaves]

    def value(step):
        for t, start, d in zip(leaves, starts, directions, strict=True):
            t.data[...] = start + step * d
        with no_grad():
            return sum(float(np.sum(t.data * g)) for t, g in total())

    h = 1e-5
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert abs(numeric - analytic) <= 1e-6 * max(1.0, abs(numeric)), (numeric, analytic)


def op_cases():
    x, y, w, b, g = leaf(9, 6), leaf(9, 6, seed=1), leaf(6, 6), leaf(6), leaf(6, seed=2)
    v2 = leaf(4, 6, seed=3)
    ids = np.array([1, 2, 2, 0, 4, 4, 4, 1, 5], np.int32)
    q, k, v = leaf(9, 4, 6), leaf(9, 2, 6, seed=1), leaf(9, 2, 6, seed=2)
    freq, positions = 1.0 / np.arange(1, 4), np.arange(9, dtype=np.int32)
    weights = np.array([1, 0, 2, 1, 1, 0, 0.5, 1, 1])
    keys = lambda: ops.DropoutKeys(3, 4)  # noqa: E731
    return {
        "linear": (lambda: ops.linear(x, w, b), [x, w, b]),
        "linear gelu": (lambda: ops.linear(x, w, b, "gelu_tanh"), [x, w, b]),
        "linears": (lambda: ops.linears(x, [(w, b), (v2, None)]), [x, w, b, v2]),
        "embedding": (lambda: ops.embedding(ids, w), [w]),
        "add": (lambda: ops.add(x, ops.add(x, y)), [x, y]),
        "split_columns": (
            lambda: ops.add(*ops.split_columns(x, (2, 1, 2, 1))[::2]),
            [x],
        ),
        "reshape": (lambda: ops.reshape(x, (3, 18)), [x]),
        "layer_norm": (lambda: ops.layer_norm(x, g, b, 1e-5), [x, g, b]),
        "add_layer_norm": (lambda: ops.add_layer_norm(x, y, g, b, 1e-5), [x, y, g, b]),
        "rms_norm": (lambda: ops.rms_norm(x, g, 1e-5), [x, g]),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, y, g, 1e-5), [x, y, g]),
        "activation": (lambda: ops.activation(x, "silu"), [x]),
        "swiglu": (lambda: ops.swiglu(x, y), [x, y]),
        "rope": (lambda: ops.rope(q, k, positions, freq), [q, k]),
        "attention": (lambda: ops.attention(q, k, v, OFFSETS, True, 0.4), [q, k, v]),
        "attention dropout": (
            lambda: ops.attention(q, k, v, OFFSETS, False, 0.4, None, 0.3, 9, SAMPLES),
            [q, k, v],
        ),
        "segment_mean": (lambda: ops.segment_mean(x, OFFSETS), [x]),
        "segment_last": (lambda: ops.segment_last(x, OFFSETS), [x]),
        "gather_rows": (lambda: ops.gather_rows(x, ids), [x]),
        "linear_cross_entropy": (
            lambda: ops.linear_cross_entropy(x, w, ids, weights, b)[0],
            [x, w, b],
        ),
        "linear_logprobs": (lambda: ops.linear_logprobs(x, w, ids, 0.8, b), [x, w, b]),
        "linear_kl": (lambda: ops.linear_kl(x, w, y.data, array(6, 6, seed=7), 1.2), [x, w]),
        "cross_entropy": (lambda: ops.cross_entropy(x, ids, weights[:6] + 1, 0.1)[0], [x]),
        "mse": (lambda: ops.mse(x, y.data)[0], [x]),
        "add scaled": (lambda: ops.add(x, y, -0.7), [x, y]),
        "binary_cross_entropy": (lambda: ops.binary_cross_entropy(x, y.data > 0)[0], [x]),
        "recompute": (
            lambda: ops.recompute(lambda z: (ops.linear(z, w, b, "relu"), z), (x,), [w, b])[0],
            [x, w, b],
        ),
        "dropout": (lambda: ops.dropout(x, 0.4, keys(), OFFSETS, SAMPLES), [x]),
    }


@pytest.mark.parametrize("name", op_cases())
def test_every_op_records_its_backward(name):
    check(*op_cases()[name])


def test_every_op_of_the_module_is_in_the_list():
    names = {name.split(" ")[0] for name in op_cases()}
    without_gradient = {
        "DropoutKeys", "attention_cached", "decode_linears", "linear_quantized",
    }  # fmt: skip
    assert names == set(ops.__all__) - without_gradient


def test_gradients_of_a_shared_tensor_add_up():
    x = leaf(3, 2)
    y = ops.add(x, x)
    ops.add(y, x).backward(np.ones((3, 2)))
    np.testing.assert_array_equal(x.grad, np.full((3, 2), 3.0))


def test_gradients_accumulate_over_backwards_until_zero_grad():
    w = Parameter(array(2, 3), "w")
    x = Tensor(array(4, 3))
    assert w.grad is None
    ops.linear(x, w).backward(np.ones((4, 2)))
    once = w.grad.copy()
    ops.linear(x, w).backward(np.ones((4, 2)))
    np.testing.assert_allclose(w.grad, 2 * once)
    buffer = w.grad
    w.zero_grad()
    assert w.grad is None
    ops.linear(x, w).backward(np.ones((4, 2)))
    np.testing.assert_array_equal(w.grad, once)
    assert w.grad is buffer


def test_a_tied_table_gets_both_gradients_in_one_buffer():
    table = Parameter(array(6, 4), "table")
    ids = np.array([1, 3, 5], np.int32)
    h = ops.embedding(ids, table)
    loss, count = ops.linear_cross_entropy(h, table, np.array([3, 5, 0], np.int32))
    assert table.grad is None, "nothing touches .grad before backward"
    loss.backward()
    assert count == 3
    tied = table.grad.copy()
    first, second = Parameter(table.data.copy()), Parameter(table.data.copy())
    loss, _ = ops.linear_cross_entropy(
        ops.embedding(ids, first), second, np.array([3, 5, 0], np.int32)
    )
    loss.backward()
    np.testing.assert_allclose(tied, first.grad + second.grad, atol=1e-15)


def test_upstream_scales_gradients_made_in_the_forward():
    def gradient(upstream):
        w, h = Parameter(array(6, 4)), leaf(3, 4)
        loss, _ = ops.linear_cross_entropy(h, w, np.array([3, 5, 0], np.int32))
        loss.backward(upstream)
        return np.concatenate([w.grad.ravel(), h.grad.ravel()])

    np.testing.assert_allclose(gradient(0.25), 0.25 * gradient(1.0), rtol=1e-14)


def test_several_terms_in_one_walk_equal_their_sum():
    x = leaf(4, 3)
    a, b = ops.mse(x, np.zeros((4, 3)))[0], ops.mse(ops.activation(x, "tanh"), x.data)[0]
    backward([(a, 0.5), (b, 2.0)])
    both = x.grad.copy()
    x.zero_grad()
    ops.mse(x, np.zeros((4, 3)))[0].backward(0.5)
    ops.mse(ops.activation(x, "tanh"), x.data)[0].backward(2.0)
    np.testing.assert_allclose(both, x.grad, rtol=1e-14)


def test_frozen_parameters_cost_nothing():
    class Counting(loopos.backends.numpy_backend.NumpyBackend):
        def linear_backward(self, dy, x, w, *args, **kwargs):
            calls.append((kwargs["dw"] is not None, kwargs["need_dx"]))
            return super().linear_backward(dy, x, w, *args, **kwargs)

    calls = []
    frozen, trained = Parameter(array(3, 3), requires_grad=False), Parameter(array(3, 3))
    with loopos.use_backend(Counting()):
        below = ops.linear(Tensor(array(2, 3)), frozen)
        assert not below.requires_grad
        assert below._node is None
        above = ops.linear(ops.linear(below, trained), frozen)
        above.backward(np.ones((2, 3)))
    assert calls == [(False, True), (True, False)]
    assert frozen.grad is None
    assert trained.grad is not None


def test_several_maps_of_what_is_given_need_no_gradient_of_it():
    class Counting(loopos.backends.numpy_backend.NumpyBackend):
        def linear_backward(self, dy, x, w, *args, **kwargs):
            calls.append(kwargs["need_dx"])
            return super().linear_backward(dy, x, w, *args, **kwargs)

    calls = []
    given, dy = array(2, 3), array(2, 4)
    first, second = Parameter(array(4, 3)), Parameter(array(5, 3))
    with loopos.use_backend(Counting()):
        y, _ = ops.linears(Tensor(given), [(first, None), (second, None)])
        y.backward(dy)
    assert calls == [False]  # and nothing for the one that nobody used
    np.testing.assert_array_equal(first.grad, dy.T @ given)
    assert second.grad is None


def test_no_grad_records_nothing_and_is_restored_after_an_error():
    w = Parameter(array(3, 3))

    def fail_inside():
        with no_grad():
            assert not ops.linear(Tensor(array(2, 3)), w).requires_grad
            assert not is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert is_grad_enabled()


def test_the_graph_is_freed_by_backward_and_cannot_be_used_twice():
    w = Parameter(array(3, 3))
    hidden = ops.linear(Tensor(array(2, 3)), w)
    watch = weakref.ref(hidden._node)
    y = ops.activation(hidden, "relu")
    y.backward(np.ones((2, 3)))
    with pytest.raises(LooposError, match="used by backward"):
        y.backward(np.ones((2, 3)))
    del hidden
    gc.collect()
    assert watch() is None


def test_of_the_arrays_in_between_only_those_live_that_a_backward_needs():
    x, w, frozen = leaf(2, 3), leaf(3, 3, seed=1), Tensor(array(3, 3, seed=2))
    y = ops.linear(x, w)
    z = ops.add(y, ops.linear(y, frozen), 0.5)
    loss = ops.mse(z, np.zeros((2, 3)))[0]
    watched = [weakref.ref(t.data) for t in (y, z)]
    expected = x.data @ w.data.T @ (np.eye(3) + 0.5 * frozen.data.T)
    np.testing.assert_allclose(z.data, expected)
    del y, z
    assert [watch() for watch in watched] == [None, None]
    loss.backward()
    upstream = 2 * expected @ (np.eye(3) + 0.5 * frozen.data)
    np.testing.assert_allclose(w.grad, upstream.T @ x.data)
    np.testing.assert_allclose(x.grad, upstream @ w.data)


def test_wrong_uses_say_what_is_wrong():
    x = leaf(2, 3)
    with pytest.raises(LooposError, match="needs a gradient"):
        ops.activation(x, "relu").backward()
    with pytest.raises(LooposError, match=r"shape \(3,\)"):
        ops.activation(x, "relu").backward(np.ones(3))
    with pytest.raises(LooposError, match="nothing that is trained"):
        Tensor(np.float64(1.0)).backward()
    with pytest.raises(LooposError, match="'w' has no gradient"):
        Parameter(array(2), "w").update(0.1)


def test_update_is_a_step_of_gradient_descent():
    w = Parameter(np.array([1.0, 2.0], np.float32), "w")
    w.add_grad(np.array([0.5, -1.0], np.float32))
    w.update(0.1)
    np.testing.assert_allclose(w.data, [0.95, 2.1], rtol=1e-6)
    assert w.data.dtype == np.float32


def test_a_deep_graph_needs_no_deep_stack():
    x = leaf(1, 1)
    y = x
    for _ in range(5000):
        y = ops.add(y, x)
    y.backward(np.ones((1, 1)))
    assert x.grad[0, 0] == 5001


def test_dropout_keys_differ_by_seed_step_and_call():
    def first_two(seed, step):
        keys = ops.DropoutKeys(seed, step)
        return keys.next(), keys.next()

    seen = {k for seed in range(3) for step in range(3) for k in first_two(seed, step)}
    assert len(seen) == 18
    assert first_two(1, 2) == first_two(1, 2)


@pytest.mark.parametrize("name", ["numpy", "numba", "cython"])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "silu", "swiglu"])
def test_what_is_made_again_in_the_backward_has_the_same_bytes(name, kind, monkeypatch):
    if name not in available_backends():
        pytest.skip(f"no {name} backend here")
    rng = np.random.default_rng(0)
    x, up, gate, down = parameters = [
        Parameter(rng.standard_normal(shape, dtype=np.float32) / 4)
        for shape in ((37, 24), (96, 24), (96, 24), (24, 96))
    ]
    found = []
    with use_backend(name):
        for limit in (1 << 30, 0):
            monkeypatch.setattr(ops, "_KEPT_BYTES", limit)
            if kind == "swiglu":
                inner = ops.swiglu(ops.linear(x, gate), ops.linear(x, up))
            else:
                inner = ops.linear(x, up, None, kind)
            y = ops.linear(inner, down)
            assert inner.again().tobytes() == inner.data.tobytes()
            held = weakref.ref(inner.data)
            del inner
            assert (held() is None) == (limit == 0)
            y.backward(np.ones(y.shape))
            found.append([p.grad.tobytes() for p in parameters if p.grad is not None])
            for p in parameters:
                p.zero_grad()
    assert found[0] == found[1]


def test_what_no_backward_keeps_is_not_made_again():
    frozen = Parameter(array(6, 3), requires_grad=False)
    assert ops.linear(leaf(4, 3), frozen, None, "relu").again is not None
    x = Tensor(array(4, 3))
    assert ops.linear(x, frozen, None, "relu").again is None
    assert ops.swiglu(x, x).again is None
    with no_grad():
        assert ops.activation(leaf(4, 3), "relu").again is None
    y = ops.activation(leaf(4, 3), "relu")
    y.backward(np.ones((4, 3)))
    assert y.again is None  # gone with the graph
