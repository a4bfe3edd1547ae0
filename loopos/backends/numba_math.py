"""Scalar functions for numba's kernels, one version in each precision.

In float32 they are polynomials without a branch, so that a loop over them becomes SIMD code: numba
has no vectorised mathematical library of its own. In float64 they are the C library's. NaN and inf
come out as they do from NumPy.

The functions at module level are what they compute, in NumPy; inside compiled code numba puts the
versions made by :func:`versions` in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import float32

Scalar = Any
Jit = Callable[[Callable[..., Any]], Any]

_SQRT_HALF = 0.7071067811865476
_SQRT_2_OVER_PI = 0.7978845608028654
_INV_SQRT_2PI = 0.3989422804014327


def exp(x: Scalar) -> Scalar:
    """The exponential function."""
    return np.exp(x)


def tanh(x: Scalar) -> Scalar:
    """The hyperbolic tangent."""
    return np.tanh(x)


def normal_cdf(x: Scalar) -> Scalar:
    """The share of the standard normal distribution below x."""
    return type(x)(0.5 * math.erfc(-x * _SQRT_HALF))


def sigmoid(x: Scalar) -> Scalar:
    """``1 / (1 + exp(-x))``."""
    return 1 / (1 + np.exp(-x))


def gelu_slope(x: Scalar) -> Scalar:
    """The derivative of ``x normal_cdf(x)``."""
    return normal_cdf(x) + x * type(x)(_INV_SQRT_2PI) * np.exp(-x * x / 2)


def gelu_tanh(x: Scalar) -> Scalar:
    """The GELU's approximation by a tanh."""
    return x * (1 + np.tanh(type(x)(_SQRT_2_OVER_PI) * (x + type(x)(0.044715) * x**3))) / 2


def gelu_tanh_slope(x: Scalar) -> Scalar:
    """The derivative of :func:`gelu_tanh`."""
    t = np.tanh(type(x)(_SQRT_2_OVER_PI) * (x + type(x)(0.044715) * x**3))
    inner = type(x)(_SQRT_2_OVER_PI) * (1 + type(x)(3 * 0.044715) * x * x)
    return (1 + t + x * (1 - t * t) * inner) / 2


def silu_slope(x: Scalar) -> Scalar:
    """The derivative of ``x sigmoid(x)``."""
    gate = sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _polynomial(coefficients: tuple[float, ...], jit: Jit) -> Any:
    """Return Horner's scheme in float32, highest power first, with at most ten coefficients."""
    padded = (0.0,) * (10 - len(coefficients)) + coefficients
    a, b, c, d, e, f, g, h, i, j = (float32(value) for value in padded)

    def evaluate(x: Scalar) -> Scalar:
        y = ((((a * x + b) * x + c) * x + d) * x + e) * x + f
        return (((y * x + g) * x + h) * x + i) * x + j

    return jit(evaluate)


def _single(jit: Jit) -> dict[str, Any]:
    """exp, tanh and the normal distribution in float32."""
    one, two, half, zero = float32(1), float32(2), float32(0.5), float32(0)
    low, high, log2e = float32(-104), float32(89), float32(1.4426950408889634)
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    magic, magic_bits = float32(12582912), np.int32(0x4B400000)
    ln2_high, ln2_low = float32(0.693359375), float32(-2.12194440e-4)
    bias, shift, by_two = np.int32(127), np.int32(23), np.int32(1)
    # Cephes, expf.c and tanhf.c (Moshier); Numerical Recipes 6.2, erfcc: relative error 1.2e-7.
    exp_tail = _polynomial(
        (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
         5.0000001201e-1), jit)  # fmt: skip
    tanh_tail = _polynomial(
        (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
         -3.33332819422e-1), jit)  # fmt: skip
    erfc_tail = _polynomial(
        (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
         0.37409196, 1.00002368, -1.26551223), jit)  # fmt: skip
    sqrt_half, small = float32(_SQRT_HALF), float32(0.625)

    @jit
    def exp_(x: Scalar) -> Scalar:
        z = high if x > high else x
        z = low if z < low else z
        t = z * log2e + magic
        n = t - magic
        r = z - n * ln2_high - n * ln2_low
        y = exp_tail(r) * r * r + r + one
        # Two factors, since 2^n itself may overflow or be subnormal where the result is not.
        bits = np.int32(float32(t).view(np.int32) - magic_bits)
        first = np.int32(bits >> by_two)
        factor = np.int32((first + bias) << shift).view(float32)
        return y * factor * np.int32((bits - first + bias) << shift).view(float32)

    @jit
    def tanh_(x: Scalar) -> Scalar:
        size = abs(x)
        far = one - two / (exp_(two * size) + one)
        far = -far if x < zero else far
        square = x * x
        near = tanh_tail(square) * square * x + x
        return near if size < small else far

    @jit
    def normal_cdf_(x: Scalar) -> Scalar:
        z = abs(x) * sqrt_half
        t = one / (one + half * z)
        # A choice between two values would cost the loop its SIMD code; the sign does not.
        return half + math.copysign(half - half * t * exp_(erfc_tail(t) - z * z), x)

    return {"exp": exp_, "tanh": tanh_, "normal_cdf": normal_cdf_}


def _double(jit: Jit) -> dict[str, Any]:
    """exp, tanh and the normal distribution in float64."""

    @jit
    def exp_(x: Scalar) -> Scalar:
        return math.exp(x)

    @jit
    def tanh_(x: Scalar) -> Scalar:
        return math.tanh(x)

    @jit
    def normal_cdf_(x: Scalar) -> Scalar:
        return 0.5 * (1.0 + math.erf(x * _SQRT_HALF))

    return {"exp": exp_, "tanh": tanh_, "normal_cdf": normal_cdf_}


def versions(f: Any, jit: Jit) -> dict[str, Any]:
    """Return the functions above by name for the scalar type `f`, each wrapped in `jit`."""
    base = _single(jit) if f is float32 else _double(jit)
    exp_, tanh_, normal_cdf_ = base["exp"], base["tanh"], base["normal_cdf"]
    one, half, three = f(1), f(0.5), f(3)
    density, inner, cubic = f(_INV_SQRT_2PI), f(_SQRT_2_OVER_PI), f(0.044715)

    @jit
    def sigmoid_(x: Scalar) -> Scalar:
        return one / (one + exp_(-x))

    @jit
    def gelu_slope_(x: Scalar) -> Scalar:
        return normal_cdf_(x) + x * density * exp_(-half * x * x)

    @jit
    def gelu_tanh_(x: Scalar) -> Scalar:
        return half * x * (one + tanh_((x * x * cubic + one) * x * inner))

    @jit
    def gelu_tanh_slope_(x: Scalar) -> Scalar:
        square = x * x * cubic
        t = tanh_((square + one) * x * inner)
        return half * (one + t + (three * square + one) * inner * x * (one - t * t))

    @jit
    def silu_slope_(x: Scalar) -> Scalar:
        gate = sigmoid_(x)
        return gate * (one + x * (one - gate))

    return base | {
        "sigmoid": sigmoid_,
        "gelu_slope": gelu_slope_,
        "gelu_tanh": gelu_tanh_,
        "gelu_tanh_slope": gelu_tanh_slope_,
        "silu_slope": silu_slope_,
    }
