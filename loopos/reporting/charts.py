"""Curves as paths of inline SVG: scales, ticks, smoothing, and no more points than can be seen."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopos.reporting.findings import shown
from loopos.reporting.records import Array, RunRecords, Series

__all__ = ["HEIGHT", "WIDTH", "Chart", "Tick", "chart", "labels", "smoothed", "thinned", "ticks"]

#: Of the coordinates; the page stretches them to its own size.
WIDTH, HEIGHT = 1000, 400
#: Points of a curve, beyond which each stretch is drawn by its extremes alone.
MOST_POINTS = 800
#: A curve is smoothed from so many points on, over this share of them.
SMOOTHED_FROM, SMOOTHED_SHARE = 20, 0.08
#: What was set, not measured: it has no noise.
_GIVEN = ("learning_rate", "kl/coefficient")
#: From this ratio of the largest value to the middle one on, the scale is logarithmic.
LOGARITHMIC = 50.0


@dataclass(frozen=True)
class Tick:
    """A line of the grid: its place in percent of the axis, from the left or top, and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One figure over the steps, ready to be drawn.

    Attributes
    ----------
    name, title, unit : str
    raw, smooth, held_out, dots : str
        Paths; empty where there is nothing to draw.
    x_ticks, y_ticks : list of Tick
    data : str
        JSON of steps, values and held-out values, and of their places, for the page's script.
    last, last_held_out : str
        The newest values.
    points : int
        Values on record, held-out ones too.
    log : bool
    """

    name: str
    title: str
    unit: str
    raw: str
    smooth: str
    held_out: str
    dots: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    data: str
    last: str
    last_held_out: str
    points: int
    log: bool


def chart(
    run: RunRecords, name: str, title: str, unit: str = "", large: bool = False
) -> Chart | None:
    """Draw a figure of the steps, the evaluations' figure of that name with it.

    None where there is nothing to see: no value, or one value throughout. A large one has room for
    more ticks.
    """
    train, held_out = run.series(name), run.evaluated(name)
    every = np.concatenate([train.values, held_out.values])
    steps = np.concatenate([train.steps, held_out.steps])
    if every.size < 2 or np.ptp(every) == 0 or np.ptp(steps) == 0:
        return None
    log = _wants_log(every)
    x_scale = _Scale(float(steps.min()), float(steps.max()), False)
    y_scale = _y_scale(every, log)
    noisy = train if name not in _GIVEN else Series(train.steps[:0], train.values[:0])
    drawn, calm = thinned(train), thinned(smoothed(noisy), extremes=False)
    data = {
        kind: {
            "step": series.steps.tolist(),
            "value": [shown(v) for v in series.values.tolist()],
            "x": [round(v, 2) for v in 100 * x_scale.place(series.steps)],
            "y": [round(v, 2) for v in 100 - 100 * y_scale.place(series.values)],
        }
        for kind, series in (("train", drawn), ("smooth", calm), ("eval", held_out))
    }
    return Chart(
        name, title, unit,
        _path(drawn, x_scale, y_scale), _path(calm, x_scale, y_scale),
        _path(held_out, x_scale, y_scale), _dots(held_out, x_scale, y_scale),
        _ticks(x_scale, ticks(x_scale.low, x_scale.high, 10 if large else 4, whole=True)),
        [Tick(round(100 - tick.place, 2), tick.label)
         for tick in _ticks(y_scale, y_scale.ticks(6 if large else 3))],
        json.dumps(data, separators=(",", ":")),
        shown(float(train.values[-1])) if len(train) else "",
        shown(float(held_out.values[-1])) if len(held_out) else "",
        int(every.size), log,
    )  # fmt: skip


def _ticks(scale: _Scale, values: list[float]) -> list[Tick]:
    said = [label(value) for value in values] if scale.log else labels(values)
    places = np.round(100 * scale.place(values), 2).tolist()
    return [Tick(place, text) for place, text in zip(places, said, strict=True)]


# -- what is drawn -----------------------------------------------------------------------------


def smoothed(series: Series) -> Series:
    """Return a centred moving mean, taken twice; nothing of a series that is short enough to read.

    Twice, so that a single high value makes a peak and not a plateau. At the ends the window
    shrinks to both sides alike, so that no end is drawn towards the middle.
    """
    count = len(series)
    if count < SMOOTHED_FROM:
        return Series(series.steps[:0], series.values[:0])
    half = max(1, round(SMOOTHED_SHARE * count / 4))
    at = np.arange(count)
    reach = np.minimum(half, np.minimum(at, count - 1 - at))
    values = series.values
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        values = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return Series(series.steps, values)


def thinned(series: Series, most: int = MOST_POINTS, extremes: bool = True) -> Series:
    """Return at the most so many points: of each stretch its lowest and highest, or its first."""
    count = len(series)
    if count <= most:
        return series
    kept = [0, count - 1]
    for stretch in np.array_split(np.arange(1, count - 1), (most - 2) // (2 if extremes else 1)):
        values = series.values[stretch]
        kept += [int(stretch[values.argmin()]), int(stretch[values.argmax()])] if extremes else [
            int(stretch[0])
        ]  # fmt: skip
    chosen = np.unique(kept)
    return Series(series.steps[chosen], series.values[chosen])


def _path(series: Series, x: _Scale, y: _Scale) -> str:
    return _joined("L", _places(series, x, y)) if len(series) > 1 else ""


def _dots(series: Series, x: _Scale, y: _Scale) -> str:
    """Return a path of lines without length, which round caps make into dots."""
    return "".join(f"M{px:g} {py:g}h0" for px, py in _places(series, x, y))


def _places(series: Series, x: _Scale, y: _Scale) -> list[tuple[float, float]]:
    across = np.round(WIDTH * x.place(series.steps), 1).tolist()
    down = np.round(HEIGHT * (1 - y.place(series.values)), 1).tolist()
    return list(zip(across, down, strict=True))


def _joined(command: str, places: list[tuple[float, float]]) -> str:
    return "M" + command.join(f"{x:g} {y:g}" for x, y in places)


# -- scales ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool

    def place(self, value: Any) -> Array:
        """Return where on the axis a value is, from 0 to 1."""
        at, low, high = np.asarray(value, np.float64), self.low, self.high
        if self.log:
            at, low, high = np.log10(at), math.log10(low), math.log10(high)
        found: Array = (at - low) / (high - low)
        return found

    def ticks(self, about: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, about)
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**n for n in range(first, last + 1, 1 + (last - first) // (about + 1))]


def _wants_log(values: Array) -> bool:
    return bool(values.min() > 0 and values.max() > LOGARITHMIC * np.median(values))


def _y_scale(values: Array, log: bool) -> _Scale:
    low, high = float(values.min()), float(values.max())
    if log:
        return _Scale(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)), log)
    room = 0.06 * (high - low)
    # A figure that is never negative has no room below 0.
    bottom = max(0.0, low - room) if low >= 0 else low - room
    return _Scale(bottom, high + room, log)


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Return about so many round numbers within ``low .. high``: 1, 2 or 5 times a power of 10."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Return the labels of the ticks of one axis, all written in one way."""
    most = max(map(abs, values), default=0.0)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 10 * limit <= most < 1e4 * limit:
            return [f"{value / limit:g}{letter}" if value else "0" for value in values]
    if 1e-3 <= most < 1e4:
        return [np.format_float_positional(value, trim="-", precision=12) for value in values]
    return [label(value) for value in values]


def label(value: float) -> str:
    """Return a round number by itself: plain, or with a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, _, power = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
