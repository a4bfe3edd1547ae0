"""Optimizers against PyTorch, decay groups, state."""

import numpy as np
import pytest

import loopos
from loopos import ops
from loopos.autograd import Parameter
from loopos.errors import CheckpointError, ConfigError
from loopos.training.optim import gradient_norm

KINDS = {
    "adamw": (loopos.AdamW, "AdamW", {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam": (loopos.Adam, "Adam", {"weight_decay": 0.1}),
    "sgd": (loopos.SGD, "SGD", {}),
    "momentum": (loopos.SGD, "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (loopos.SGD, "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
#: First element of the parameter after 20 steps of PyTorch 2.13.0 in float64, made as below.
GOLDENS = {
    "adamw": -0.005639847668420267,
    "adam": -0.11700832411161553,
    "sgd": 0.17048987369270183,
    "momentum": -0.11698100667768424,
    "nesterov": 0.008552436103271364,
}


def gradients(steps=20):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(5, 7)) for _ in range(steps)]


def start():
    return np.random.default_rng(0).normal(size=(5, 7))


def run(kind, scale=1.0):
    build, _, options = KINDS[kind]
    p = Parameter(start(), "p")
    optimizer = build([p], learning_rate=0.05, **options)
    for gradient in gradients():
        p.zero_grad()
        p.add_grad(gradient / scale)
        optimizer.step(scale=scale)
    return p.data, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_the_golden(kind):
    assert run(kind)[0][0, 0] == pytest.approx(GOLDENS[kind], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_pytorch(kind):
    torch = pytest.importorskip("torch")
    _, name, options = KINDS[kind]
    t = torch.nn.Parameter(torch.tensor(start()))
    optimizer = getattr(torch.optim, name)([t], lr=0.05, **options)
    for gradient in gradients():
        t.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(run(kind)[0], t.detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_a_step_multiplies_the_gradient(kind):
    np.testing.assert_allclose(run(kind, scale=0.125)[0], run(kind)[0], rtol=1e-12)


def test_only_matrices_decay_by_default():
    matrix, vector = Parameter(np.ones((2, 2)), "w"), Parameter(np.ones(2), "b")

    def step(groups):
        for p in (matrix, vector):
            p.data[...] = 1.0
            p.zero_grad()
            p.add_grad(np.zeros_like(p.data))
        options = {"learning_rate": 0.1, "weight_decay": 0.5, "decay_groups": groups}
        loopos.AdamW([matrix, vector], **options).step()
        return matrix.data[0, 0], vector.data[0]

    assert step("matrices") == pytest.approx((0.95, 1.0))
    assert step("all") == pytest.approx((0.95, 0.95))
    assert step(lambda name, p: name == "b") == pytest.approx((1.0, 0.95))
    with pytest.raises(ConfigError, match="decay_groups is 'some'"):
        step("some")


def test_frozen_parameters_are_not_touched_and_have_no_state():
    trained, frozen = Parameter(np.ones(3), "a"), Parameter(np.ones(3), "b", requires_grad=False)
    optimizer = loopos.AdamW([trained, frozen], learning_rate=0.1)
    for p in (trained, frozen):
        p.add_grad(np.ones(3))
    optimizer.step()
    assert np.all(trained.data < 1)
    assert np.array_equal(frozen.data, np.ones(3))
    assert [k for k in optimizer.state_dict() if k.endswith("/b")] == []


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_state_round_trip_continues_bit_for_bit(kind):
    build, _, options = KINDS[kind]
    whole = run(kind)[0]
    p = Parameter(start(), "p")
    optimizer = build([p], learning_rate=0.05, **options)
    for index, gradient in enumerate(gradients()):
        if index == 9:
            state = optimizer.state_dict()
            optimizer = build([p], learning_rate=0.05, **options)
            optimizer.load_state_dict(state)
        p.zero_grad()
        p.add_grad(gradient)
        optimizer.step()
    assert np.array_equal(p.data, whole)


def test_loaded_state_shares_no_memory_with_its_source():
    _, first = run("adamw")
    state = first.state_dict()
    kept = {key: np.array(value) for key, value in state.items()}
    p = Parameter(start(), "p")
    second = loopos.AdamW([p])
    second.load_state_dict(state)
    p.add_grad(gradients()[0])
    second.step()
    assert all(np.array_equal(state[key], value) for key, value in kept.items())


def test_foreign_state_is_refused_by_name():
    optimizer = loopos.AdamW([Parameter(np.ones(3), "a")])
    with pytest.raises(CheckpointError, match="'first_moment/b' belongs to no parameter"):
        optimizer.load_state_dict({"steps": 1, "first_moment/b": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"'first_moment/a' is float64\[2\], expected"):
        optimizer.load_state_dict({"steps": 1, "first_moment/a": np.ones(2)})


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (loopos.AdamW, {"learning_rate": -1.0}, "learning_rate is -1.0"),
        (loopos.AdamW, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (loopos.SGD, {"learning_rate": float("inf")}, "learning_rate is inf"),
        (loopos.AdamW, {"betas": (0.9, 1.0)}, "betas is 1.0"),
        (loopos.AdamW, {"eps": 0.0}, "eps is 0.0"),
        (loopos.SGD, {"momentum": 1.0}, "momentum is 1.0"),
        (loopos.SGD, {"nesterov": True}, "nesterov is True"),
        (loopos.Adam, {"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_numbers_out_of_range_are_named(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build([Parameter(np.ones(2), "a")], **options)


def test_two_parameters_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two parameters are called 'a'"):
        loopos.SGD([Parameter(np.ones(2), "a"), Parameter(np.ones(2), "a")])


def test_one_parameter_of_two_names_is_refused():
    tied = Parameter(np.ones(2), "a")
    with pytest.raises(ConfigError, match="'a' and 'b' are one parameter"):
        loopos.SGD({"a": tied, "b": tied})


def test_the_global_norm_is_over_all_gradients():
    a, b, c = (Parameter(np.zeros(2), n) for n in "abc")
    a.add_grad(np.array([3.0, 0.0]))
    b.add_grad(np.array([0.0, 4.0]))
    assert gradient_norm([a, b, c]) == pytest.approx(5.0)


def test_a_parameter_unfrozen_late_steps_as_in_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    early, late = rng.normal(size=(2, 3, 3))
    ours = [Parameter(early.copy(), "a"), Parameter(late.copy(), "b", requires_grad=False)]
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in (early, late)]
    optimizer = loopos.AdamW(ours, learning_rate=0.05, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
    for step in range(20):
        ours[1].requires_grad = step >= 12
        for p, t in zip(ours, theirs, strict=True):
            gradient = rng.normal(size=(3, 3))
            p.zero_grad()
            t.grad = None
            if p.requires_grad:
                p.add_grad(gradient)
                t.grad = torch.tensor(gradient)
        optimizer.step()
        reference.step()
    for p, t in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.data, t.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_the_first_step_of_a_parameter_unfrozen_late_is_the_learning_rate():
    # With g constant, both corrected moments are exact from the first step on: Adam moves by lr.
    a, b = Parameter(np.zeros(2), "a"), Parameter(np.zeros(2), "b", requires_grad=False)
    optimizer = loopos.AdamW([a, b], learning_rate=0.1, weight_decay=0.0)
    for step in range(51):
        b.requires_grad = step == 50
        for p in (a, b):
            p.zero_grad()
            p.add_grad(np.ones(2))
        optimizer.step()
    np.testing.assert_allclose(b.data, -0.1, rtol=1e-7)
    np.testing.assert_allclose(a.data, -0.1 * 51, rtol=1e-7)


@pytest.mark.parametrize("build", [loopos.SGD, loopos.AdamW])
def test_an_array_that_cannot_be_updated_in_place_is_refused_before_any_is(build):
    first, turned = Parameter(np.ones(2), "a"), Parameter(np.ones((3, 4)).T, "b")
    optimizer = build([first, turned], learning_rate=0.1)
    for p in (first, turned):
        p.add_grad(np.ones(p.shape))
    with pytest.raises(ConfigError, match="parameter 'b' is not a writeable, C-contiguous array"):
        optimizer.step()
    assert np.array_equal(first.data, np.ones(2))
    assert optimizer.steps == 0


def test_state_with_a_hole_is_refused_and_nothing_is_changed():
    _, optimizer = run("adamw")
    state, before = optimizer.state_dict(), optimizer.steps
    for key in list(state):
        holed = {k: v for k, v in state.items() if k != key}
        with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
            optimizer.load_state_dict(holed)
    assert optimizer.steps == before
    assert optimizer.state_dict().keys() == state.keys()


@pytest.mark.parametrize("backend", ["numpy", "numba", "cython"])
@pytest.mark.parametrize(
    ("build", "decay"),
    [(loopos.AdamW, 0.0), (loopos.AdamW, 0.1), (loopos.Adam, 0.1), (loopos.SGD, 0.1)],
)
def test_rows_without_gradient_cost_nothing_and_change_nothing(backend, build, decay, monkeypatch):
    if backend == "numba":
        pytest.importorskip("numba")
    batches = [np.array(ids) for ids in ([3, 3, 8], [8, 1], [3, 39, 20], [1, 1], [0, 5])]

    def trained(dense):
        rng = np.random.default_rng(0)
        table = Parameter(rng.normal(size=(40, 17)).astype(np.float32), "table")
        if dense:  # what holds the array itself may write anywhere
            monkeypatch.setattr(Parameter, "grad_and_rows", property(lambda p: (p.grad, None)))
        optimizer = build([table], learning_rate=0.05, weight_decay=decay)
        for step, ids in enumerate(batches):
            for part in (ids[:1], ids[1:]):  # two microbatches
                y = ops.embedding(part, table)
                y.backward(rng.normal(size=y.shape))
            optimizer.step(scale=0.5)
            optimizer.zero_grad()
            if step == 2:
                state = {n: np.copy(x) for n, x in optimizer.state_dict().items()}
                optimizer = build([table], learning_rate=0.05, weight_decay=decay)
                optimizer.load_state_dict(state)
        monkeypatch.undo()
        return table.data, optimizer.state_dict()

    with loopos.use_backend(backend):
        (some, state), (all_rows, expected) = trained(False), trained(True)
    np.testing.assert_array_equal(some, all_rows)
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array)


def test_only_rows_that_had_a_gradient_are_asked_of_the_backend():
    table = Parameter(np.ones((6, 2), np.float32), "table")
    optimizer = loopos.AdamW([table])
    for ids, expected in (([1, 4], [1, 4]), ([4], [1, 4]), ([0], [0, 1, 4])):
        y = ops.embedding(np.array(ids), table)
        y.backward(np.ones(y.shape))
        gradient, rows = table.grad_and_rows
        assert np.flatnonzero(rows).tolist() == ids
        assert np.flatnonzero(gradient.any(axis=1)).tolist() == ids
        optimizer.step()
        optimizer.zero_grad()
        assert np.flatnonzero(optimizer._used_rows["table"]).tolist() == expected


def test_a_gradient_that_was_handed_out_may_have_been_written_to():
    table = Parameter(np.ones((6, 2), np.float32), "table")
    optimizer = loopos.AdamW([table], weight_decay=0.0)
    y = ops.embedding(np.array([1]), table)
    y.backward(np.ones(y.shape))
    table.grad[5] = 1.0
    assert table.grad_and_rows[1] is None
    optimizer.step()
    assert np.flatnonzero((table.data != 1).any(axis=1)).tolist() == [1, 5]
    optimizer.zero_grad()
    y = ops.embedding(np.array([2]), table)
    y.backward(np.ones(y.shape))
    assert np.flatnonzero(table.grad.any(axis=1)).tolist() == [2]
