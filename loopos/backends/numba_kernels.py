"""Loops that numba compiles: serial over a range of blocks, called by several threads at once.

They are plain Python functions until :func:`loopos.backends.numba_compile.compiled` replaces them
in this module, so that the module can be imported without numba. Every kernel ends with ``(lo,
hi)``, the blocks that it works on. A block is a fixed number of elements, rows, or one sequence:
what it computes does not depend on which blocks a call is given.

Arrays are C-contiguous; ``None`` becomes an array without elements and a flag, which keeps the
number of compiled signatures down.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import uint64

from loopos.backends.numba_math import (
    exp,
    gelu_slope,
    gelu_tanh,
    gelu_tanh_slope,
    normal_cdf,
    sigmoid,
    silu_slope,
    tanh,
)

Array = np.ndarray[Any, Any]

#: Elements per block of an elementwise kernel.
ELEMENTS = 1 << 14
#: Rows per block of the norms: their sums over rows are made block by block.
ROWS = 16
#: Maxima kept side by side, so that the search for the largest element becomes SIMD code.
LANES = 16

_GOLDEN = uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = uint64(0xBF58476D1CE4E5B9), uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _ONE = uint64(27), uint64(30), uint64(31), uint64(32), uint64(1)


def mix(z: Any) -> Any:
    """SplitMix64's finaliser, as in ``random_bits``."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


def row_max(row: Array, lanes: Array) -> Any:
    """The largest element that is a number; a NaN is left for the exponential to spread."""
    n = row.size
    whole = n - n % LANES
    for i in range(LANES):
        lanes[i] = -np.inf
    for start in range(0, whole, LANES):
        part = row[start : start + LANES]
        for i in range(LANES):
            value, top = part[i], lanes[i]
            lanes[i] = value if value > top else top
    top = lanes[0]
    for i in range(LANES):
        top = lanes[i] if lanes[i] > top else top
    for i in range(whole, n):
        top = row[i] if row[i] > top else top
    return top


# -- elementwise -------------------------------------------------------------------------------


def activation(x: Array, y: Array, kind: int, lo: int, hi: int) -> None:
    """``y = act(x)``; `kind` is the place in ``ACTIVATIONS``."""
    zero = x.dtype.type(0)
    for block in range(lo, hi):
        xb = x[block * ELEMENTS : (block + 1) * ELEMENTS]
        yb = y[block * ELEMENTS : (block + 1) * ELEMENTS]
        if kind == 0:
            for i in range(xb.size):
                yb[i] = xb[i] * normal_cdf(xb[i])
        elif kind == 1:
            for i in range(xb.size):
                yb[i] = gelu_tanh(xb[i])
        elif kind == 2:
            for i in range(xb.size):
                yb[i] = zero if xb[i] < zero else xb[i]  # NaN stays
        elif kind == 3:
            for i in range(xb.size):
                yb[i] = xb[i] * sigmoid(xb[i])
        else:
            for i in range(xb.size):
                yb[i] = tanh(xb[i])


def activation_backward(dy: Array, x: Array, dx: Array, kind: int, lo: int, hi: int) -> None:
    """``dx = dy act'(x)``."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    for block in range(lo, hi):
        xb = x[block * ELEMENTS : (block + 1) * ELEMENTS]
        up = dy[block * ELEMENTS : (block + 1) * ELEMENTS]
        out = dx[block * ELEMENTS : (block + 1) * ELEMENTS]
        if kind == 0:
            for i in range(xb.size):
                out[i] = up[i] * gelu_slope(xb[i])
        elif kind == 1:
            for i in range(xb.size):
                out[i] = up[i] * gelu_tanh_slope(xb[i])
        elif kind == 2:
            for i in range(xb.size):
                out[i] = up[i] * (one if xb[i] > zero else zero)
        elif kind == 3:
            for i in range(xb.size):
                out[i] = up[i] * silu_slope(xb[i])
        else:
            for i in range(xb.size):
                t = tanh(xb[i])
                out[i] = up[i] * (one - t * t)


def swiglu(gate: Array, up: Array, y: Array, lo: int, hi: int) -> None:
    """``y = silu(gate) up``."""
    for block in range(lo, hi):
        g = gate[block * ELEMENTS : (block + 1) * ELEMENTS]
        u = up[block * ELEMENTS : (block + 1) * ELEMENTS]
        out = y[block * ELEMENTS : (block + 1) * ELEMENTS]
        for i in range(g.size):
            out[i] = g[i] * sigmoid(g[i]) * u[i]


def swiglu_backward(
    dy: Array, gate: Array, up: Array, dgate: Array, dup: Array, lo: int, hi: int
) -> None:
    """Gradients of both factors."""
    one = gate.dtype.type(1)
    for block in range(lo, hi):
        d = dy[block * ELEMENTS : (block + 1) * ELEMENTS]
        g = gate[block * ELEMENTS : (block + 1) * ELEMENTS]
        u = up[block * ELEMENTS : (block + 1) * ELEMENTS]
        dg = dgate[block * ELEMENTS : (block + 1) * ELEMENTS]
        du = dup[block * ELEMENTS : (block + 1) * ELEMENTS]
        for i in range(g.size):
            opened = sigmoid(g[i])
            dg[i] = d[i] * u[i] * (opened * (one + g[i] * (one - opened)))
            du[i] = d[i] * (g[i] * opened)


def dropout(
    x: Array, y: Array, samples: Array, positions: Array, key: Any, threshold: Any, kept: Any,
    lo: int, hi: int,
) -> None:  # fmt: skip
    """``y = x keep_mask``, block by block of rows; `kept` is the factor of what stays."""
    zero = x.dtype.type(0)
    for row in range(lo * ROWS, min(hi * ROWS, x.shape[0])):
        state = mix(uint64(samples[row]) * _GOLDEN + key)
        state = mix(state + uint64(positions[row]) * _GOLDEN)
        xr, yr = x[row], y[row]
        for i in range(xr.size):
            bits = mix(state + (uint64(i) + _ONE) * _GOLDEN)
            yr[i] = xr[i] * (kept if (bits >> _S32) >= threshold else zero)


# -- optimizer ---------------------------------------------------------------------------------


def adamw_block(p: Array, g: Array, m: Array, v: Array, c: Array, l2: bool) -> None:
    """One pass; `c` holds the constants in the order in which they are unpacked."""
    grad_scale, decay, beta1, rest1, beta2, rest2 = c[0], c[1], c[2], c[3], c[4], c[5]
    root, eps, rate, keep = c[6], c[7], c[8], c[9]
    zero = p.dtype.type(0)
    for i in range(p.size):
        t = g[i] * grad_scale + (p[i] * decay if l2 else zero)
        mi = m[i] * beta1 + t * rest1
        vi = v[i] * beta2 + t * t * rest2
        m[i] = mi
        v[i] = vi
        p[i] = p[i] * keep - mi / (math.sqrt(vi) * root + eps) * rate


def adamw(p: Array, g: Array, m: Array, v: Array, c: Array, l2: bool, lo: int, hi: int) -> None:
    """Blocks of elements; with `l2` the decay is part of the gradient."""
    for block in range(lo, hi):
        a, b = block * ELEMENTS, (block + 1) * ELEMENTS
        adamw_block(p[a:b], g[a:b], m[a:b], v[a:b], c, l2)


def adamw_rows(
    p: Array, g: Array, m: Array, v: Array, c: Array, used: Array, lo: int, hi: int
) -> None:
    """Blocks of rows; those that are not used only decay."""
    keep, one = c[9], p.dtype.type(1)
    for r in range(lo * ROWS, min(hi * ROWS, p.shape[0])):
        if used[r]:
            adamw_block(p[r], g[r], m[r], v[r], c, False)
        elif keep != one:
            row = p[r]
            for i in range(row.size):
                row[i] *= keep


def sgd(
    p: Array, g: Array, m: Array, c: Array, has_momentum: bool, nesterov: bool, first: bool,
    lo: int, hi: int,
) -> None:  # fmt: skip
    """One step of SGD, as PyTorch's; without momentum `m` has no elements."""
    grad_scale, decay, momentum, rate = c[0], c[1], c[2], c[3]
    zero = p.dtype.type(0)
    decays = decay != zero
    for block in range(lo, hi):
        pb = p[block * ELEMENTS : (block + 1) * ELEMENTS]
        gb = g[block * ELEMENTS : (block + 1) * ELEMENTS]
        if not has_momentum:
            for i in range(pb.size):
                pb[i] -= (gb[i] * grad_scale + (decay * pb[i] if decays else zero)) * rate
            continue
        mb = m[block * ELEMENTS : (block + 1) * ELEMENTS]
        for i in range(pb.size):
            t = gb[i] * grad_scale + (decay * pb[i] if decays else zero)
            buffer = t if first else mb[i] * momentum + t
            mb[i] = buffer
            pb[i] -= (t + momentum * buffer if nesterov else buffer) * rate


def sum_squares(x: Array, sums: Array, lo: int, hi: int) -> None:
    """One float64 sum a block."""
    for block in range(lo, hi):
        xb = x[block * ELEMENTS : (block + 1) * ELEMENTS]
        total = 0.0
        for i in range(xb.size):
            value = np.float64(xb[i])
            total += value * value
        sums[block] = total


def scale(x: Array, factor: Any, lo: int, hi: int) -> None:
    """``x *= factor``."""
    for block in range(lo, hi):
        xb = x[block * ELEMENTS : (block + 1) * ELEMENTS]
        for i in range(xb.size):
            xb[i] *= factor


def add(x: Array, y: Array, lo: int, hi: int) -> None:
    """``x += y``."""
    for block in range(lo, hi):
        xb = x[block * ELEMENTS : (block + 1) * ELEMENTS]
        yb = y[block * ELEMENTS : (block + 1) * ELEMENTS]
        for i in range(xb.size):
            xb[i] += yb[i]


# -- norms ---------------------------------------------------------------------------------------


def norm(
    x: Array, residual: Array, g: Array, b: Array, eps: Any, y: Array, s: Array, mean: Array,
    rstd: Array, centred: bool, lo: int, hi: int,
) -> None:  # fmt: skip
    """Layer norm (`centred`) or RMS norm of ``s = x + residual``."""
    one, zero, width = x.dtype.type(1), x.dtype.type(0), x.dtype.type(x.shape[1])
    for row in range(lo * ROWS, min(hi * ROWS, x.shape[0])):
        xr, yr, sr = x[row], y[row], x[row]
        if residual.size:
            rr, sr = residual[row], s[row]
            for i in range(xr.size):
                sr[i] = xr[i] + rr[i]
        middle = zero
        if centred:
            for i in range(sr.size):
                middle += sr[i]
            middle /= width
            mean[row, 0] = middle
        square = zero
        for i in range(sr.size):
            off = sr[i] - middle
            square += off * off
        scaling = one / math.sqrt(square / width + eps)
        rstd[row, 0] = scaling
        if b.size:
            for i in range(sr.size):
                yr[i] = (sr[i] - middle) * scaling * g[i] + b[i]
        else:
            for i in range(sr.size):
                yr[i] = (sr[i] - middle) * scaling * g[i]


def norm_backward(
    dy: Array, s: Array, g: Array, mean: Array, rstd: Array, ds: Array, dx: Array, dg: Array,
    db: Array, centred: bool, lo: int, hi: int,
) -> None:  # fmt: skip
    """Gradients; `dg` and `db` are one row of sums a block, and nothing where they are empty."""
    zero, width = s.dtype.type(0), s.dtype.type(s.shape[1])
    for block in range(lo, hi):
        for row in range(block * ROWS, min((block + 1) * ROWS, s.shape[0])):
            up, sr, scaling = dy[row], s[row], rstd[row, 0]
            middle = mean[row, 0] if centred else zero
            if dg.size:
                sums = dg[block]
                for i in range(sr.size):
                    sums[i] += up[i] * ((sr[i] - middle) * scaling)
            if db.size:
                sums = db[block]
                for i in range(sr.size):
                    sums[i] += up[i]
            if not dx.size:
                continue
            along, total, out = zero, zero, dx[row]
            for i in range(sr.size):
                up_g = up[i] * g[i]
                along += up_g * ((sr[i] - middle) * scaling)
                total += up_g
            along /= width
            total = total / width if centred else zero
            for i in range(sr.size):
                normalised = (sr[i] - middle) * scaling
                out[i] = (up[i] * g[i] - total - normalised * along) * scaling
            if ds.size:
                arriving = ds[row]
                for i in range(sr.size):
                    out[i] += arriving[i]


# -- rows and sequences ----------------------------------------------------------------------------


def add_rows(dy: Array, order: Array, starts: Array, ids: Array, table: Array, lo: int, hi: int
             ) -> None:  # fmt: skip
    """Add rows of one id, in the order in which they stand, to the row of the table."""
    for group in range(lo, hi):
        into = table[ids[order[starts[group]]]]
        for place in range(starts[group], starts[group + 1]):
            row = dy[order[place]]
            for i in range(into.size):
                into[i] += row[i]


def segment_mean(x: Array, offsets: Array, y: Array, lo: int, hi: int) -> None:
    """The mean row of each sequence; rows of `y` are zero before."""
    for b in range(lo, hi):
        length = offsets[b + 1] - offsets[b]
        if length == 0:
            continue
        out = y[b]
        for t in range(offsets[b], offsets[b + 1]):
            row = x[t]
            for i in range(out.size):
                out[i] += row[i]
        for i in range(out.size):
            out[i] /= y.dtype.type(length)


def segment_mean_backward(dy: Array, offsets: Array, dx: Array, lo: int, hi: int) -> None:
    """Each token's share of its sequence's gradient."""
    for b in range(lo, hi):
        length = dx.dtype.type(offsets[b + 1] - offsets[b])
        row = dy[b]
        for t in range(offsets[b], offsets[b + 1]):
            out = dx[t]
            for i in range(out.size):
                out[i] = row[i] / length


def discounted_sum(x: Array, offsets: Array, gamma: Any, y: Array, lo: int, hi: int) -> None:
    """``y[t] = x[t] + gamma y[t + 1]``."""
    for b in range(lo, hi):
        following = x.dtype.type(0)
        for t in range(offsets[b + 1] - 1, offsets[b] - 1, -1):
            following = x[t] + gamma * following
            y[t] = following


def gae(
    rewards: Array, values: Array, offsets: Array, gamma: Any, decay: Any, advantages: Array,
    returns: Array, lo: int, hi: int,
) -> None:  # fmt: skip
    """Generalised advantage estimation; `decay` is gamma lambda."""
    for b in range(lo, hi):
        following, value = rewards.dtype.type(0), rewards.dtype.type(0)
        for t in range(offsets[b + 1] - 1, offsets[b] - 1, -1):
            following = rewards[t] + gamma * value - values[t] + decay * following
            value = values[t]
            advantages[t] = following
            returns[t] = following + value


# -- softmax over the vocabulary -------------------------------------------------------------------


def cross_entropy_rows(
    z: Array, targets: Array, weight: Array, logp: Array, gradient: bool, lo: int, hi: int
) -> None:
    """Log-probability of the target a row; then logits become their gradients."""
    lanes = np.empty(LANES, z.dtype)
    for n in range(lo, hi):
        row, target = z[n], targets[n]
        top, total = row_max(row, lanes), z.dtype.type(0)
        picked = row[target] - top
        for i in range(row.size):
            e = exp(row[i] - top)
            row[i] = e
            total += e
        logp[n] = picked - math.log(total)
        if gradient:
            share = weight[n] / total
            for i in range(row.size):
                row[i] *= share
            row[target] -= weight[n]


def logprob_rows(
    z: Array, targets: Array, logp: Array, entropy: Array, lse: Array, lo: int, hi: int
) -> None:
    """Log-probability of the target, entropy and log-sum-exp a row; `z` is left alone."""
    lanes, zero = np.empty(LANES, z.dtype), z.dtype.type(0)
    for n in range(lo, hi):
        row = z[n]
        top, total, weighted = row_max(row, lanes), zero, zero
        for i in range(row.size):
            off = row[i] - top
            e = exp(off)
            total += e
            weighted += e * off if e != 0 else zero  # the limit, where a logit is -inf
        size = math.log(total)
        logp[n] = row[targets[n]] - top - size
        entropy[n] = size - weighted / total
        lse[n] = top + size


def logprob_rows_backward(
    z: Array, targets: Array, entropy: Array, lse: Array, dlogp: Array, dentropy: Array,
    inverse_temperature: Any, lo: int, hi: int,
) -> None:  # fmt: skip
    """Logits become their gradients: ``dlogp (onehot - p) - dentropy p (log p + entropy)``."""
    zero = z.dtype.type(0)
    for n in range(lo, hi):
        row, up, middle = z[n], dlogp[n] * inverse_temperature, lse[n]
        if dentropy.size:
            up_entropy = dentropy[n] * inverse_temperature
            for i in range(row.size):
                log_p = row[i] - middle
                p = exp(log_p)
                row[i] = -p * (up + up_entropy * (log_p + entropy[n])) if p != 0 else zero
        else:
            for i in range(row.size):
                row[i] = -exp(row[i] - middle) * up
        row[targets[n]] += up


def log_sum_exp(row: Array, lanes: Array) -> Any:
    """The logarithm of the sum of exponentials of a row."""
    top, total = row_max(row, lanes), row.dtype.type(0)
    for i in range(row.size):
        total += exp(row[i] - top)
    return top + math.log(total)


def kl_rows(z: Array, reference: Array, kl: Array, lo: int, hi: int) -> None:
    """Divergence a row; `z` and the reference become log-probabilities."""
    lanes, zero = np.empty(LANES, z.dtype), z.dtype.type(0)
    for n in range(lo, hi):
        row, other = z[n], reference[n]
        lse, lse_other = log_sum_exp(row, lanes), log_sum_exp(other, lanes)
        total = zero
        for i in range(row.size):
            row[i] -= lse
            other[i] -= lse_other
            p = exp(row[i])
            total += p * (row[i] - other[i]) if p != 0 else zero
        kl[n] = total


def kl_rows_backward(z: Array, reference: Array, kl: Array, up: Array, lo: int, hi: int) -> None:
    """Logits become their gradients: ``up p (log p - log p_ref - kl)``."""
    lanes, zero = np.empty(LANES, z.dtype), z.dtype.type(0)
    for n in range(lo, hi):
        row, other = z[n], reference[n]
        lse, lse_other = log_sum_exp(row, lanes), log_sum_exp(other, lanes)
        for i in range(row.size):
            log_p = row[i] - lse
            p, log_ratio = exp(log_p), log_p - (other[i] - lse_other)
            row[i] = up[n] * p * (log_ratio - kl[n]) if p != 0 else zero


HELPERS = (mix, row_max, adamw_block, log_sum_exp)
KERNELS = (
    activation, activation_backward, swiglu, swiglu_backward, dropout, adamw, adamw_rows, sgd,
    sum_squares, scale, add, norm, norm_backward, add_rows, segment_mean, segment_mean_backward,
    discounted_sum, gae, cross_entropy_rows, logprob_rows, logprob_rows_backward, kl_rows,
    kl_rows_backward,
)  # fmt: skip
