"""A conformance suite for backends, for this package's own and for anybody's.

>>> from loopos.backends import get_backend
>>> from loopos.backends.testing import check_backend
>>> check_backend(get_backend()) > 50
True
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from loopos.backends.numpy_backend import NumpyBackend
from loopos.backends.op_cases import CASES, Array, Inputs, OpCase

#: Largest error of a float32 result, relative to the largest element of the float64 reference.
FLOAT32_TOLERANCE = 2e-5
#: Relative error of a float64 directional derivative.
GRADIENT_TOLERANCE = 1e-6


def check_backend(backend: NumpyBackend, cases: Iterable[OpCase] = CASES) -> int:
    """Run every check on every case.

    Parameters
    ----------
    backend : NumpyBackend
        The backend to test.
    cases : iterable of OpCase
        By default all of them.

    Returns
    -------
    int
        How many cases were checked.

    Raises
    ------
    AssertionError
        At the first case that fails, naming it.
    """
    count = 0
    for case in cases:
        check_values(backend, case)
        check_layouts(backend, case)
        check_gradients(backend, case)
        count += 1
    return count


def make_inputs(case: OpCase, dtype: Any, seed: int = 0) -> Inputs:
    """Return the inputs of a case, their float arrays in `dtype` (rounded to float32 first)."""
    inputs = case.inputs(np.random.default_rng(seed))
    return {
        name: np.ascontiguousarray(value.astype(np.float32).astype(dtype))
        if isinstance(value, np.ndarray) and value.dtype == np.float64
        else value
        for name, value in inputs.items()
    }


def run_case(backend: NumpyBackend, case: OpCase, inputs: Inputs) -> dict[str, Any]:
    """Return outputs (``"out0"``...) and, with seeded upstream gradients, ``"d<input>"``."""
    outputs = case.forward(backend, inputs)
    result = {f"out{i}": value for i, value in enumerate(outputs) if value is not None}
    if case.backward is not None:
        upstream = [_upstream(i, outputs[i]) for i in range(case.differentiable)]
        gradients = case.backward(backend, inputs, outputs, upstream)
        result |= {f"d{name}": gradient for name, gradient in gradients.items()}
    return result


def _upstream(index: int, output: Any) -> Array:
    rng = np.random.default_rng(1000 + index)
    array = np.asarray(output)
    values: Array = np.asarray(rng.normal(size=array.shape)).astype(np.float32)
    return values.astype(array.dtype)


def _compare(name: str, found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys(), f"{name}: {sorted(found)} instead of {sorted(expected)}"
    for key, reference in expected.items():
        value, reference = np.asarray(found[key]), np.asarray(reference)
        assert value.shape == reference.shape, f"{name} {key}: {value.shape}, not {reference.shape}"
        if value.size == 0:
            continue
        error = np.abs(value - reference).max() / max(1.0, np.abs(reference).max())
        assert error <= tolerance, f"{name} {key}: relative error {error:.3g} > {tolerance:g}"


def check_values(backend: NumpyBackend, case: OpCase) -> None:
    """Compare float32 and float64 results with the float64 reference; dtypes must be kept."""
    expected = run_case(NumpyBackend(), case, make_inputs(case, np.float64))
    for dtype, tolerance in ((np.float32, FLOAT32_TOLERANCE), (np.float64, 1e-12)):
        found = run_case(backend, case, make_inputs(case, dtype))
        _compare(f"{case.name} {np.dtype(dtype)}", found, expected, tolerance)
        for key, value in found.items():
            is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
            wrong = is_float and value.dtype != dtype
            assert not wrong, f"{case.name} {key}: {value.dtype} from {np.dtype(dtype)}"


def check_layouts(backend: NumpyBackend, case: OpCase) -> None:
    """Read-only and non-contiguous inputs give the same result, and no input is changed."""
    for dtype, tolerance in ((np.float32, FLOAT32_TOLERANCE), (np.float64, 1e-12)):
        _check_layouts(backend, case, dtype, tolerance)


def _check_layouts(backend: NumpyBackend, case: OpCase, dtype: Any, tolerance: float) -> None:
    expected = run_case(backend, case, make_inputs(case, dtype))
    frozen, strided = make_inputs(case, dtype), make_inputs(case, dtype)
    for name, value in frozen.items():
        if not isinstance(value, np.ndarray) or name in case.in_place:
            continue
        value.flags.writeable = False
        spread = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
        spread[..., ::2] = value
        if not case.own:
            strided[name] = spread[..., ::2]
    _compare(f"{case.name} read-only", run_case(backend, case, frozen), expected, tolerance)
    _compare(f"{case.name} strided", run_case(backend, case, strided), expected, tolerance)


def check_gradients(backend: NumpyBackend, case: OpCase, seed: int = 3) -> None:
    """Compare the backward with a central difference along one random direction, in float64."""
    if case.backward is None:
        return
    inputs = make_inputs(case, np.float64)
    gradients = {
        name[1:]: value
        for name, value in run_case(backend, case, inputs).items()
        if not name.startswith("out")
    }
    rng = np.random.default_rng(seed)
    directions = {name: rng.normal(size=g.shape) for name, g in gradients.items()}

    def objective(step: float) -> float:
        moved = inputs | {name: inputs[name] + step * d for name, d in directions.items()}
        outputs = case.forward(backend, moved)
        parts = (np.asarray(outputs[i]) for i in range(case.differentiable))
        return sum(float(np.sum(_upstream(i, part) * part)) for i, part in enumerate(parts))

    step = 1e-5
    # Fourth-order central difference: truncation well below the tolerance at this step.
    near, far = (objective(k * step) - objective(-k * step) for k in (1, 2))
    numeric = (8 * near - far) / (12 * step)
    analytic = sum(float(np.sum(gradients[name] * d)) for name, d in directions.items())
    size = sum(float(np.linalg.norm(g)) for g in gradients.values())
    error = abs(numeric - analytic) / max(abs(numeric), size, 1e-3)
    assert error <= GRADIENT_TOLERANCE, f"{case.name}: gradient off by {error:.3g} ({numeric})"
