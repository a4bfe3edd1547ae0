"""Images of figures, with matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopos.errors import InputError, OutputError

__all__ = ["plot_calibration"]


def plot_calibration(table: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the calibration table of :func:`loopos.training.metrics.pair_metrics` as an image.

    Parameters
    ----------
    table : sequence of mapping
    path : path
        Its ending names the format, such as .png.

    Raises
    ------
    InputError
        If matplotlib is not installed, or does not know the format.
    OutputError
        If the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise InputError("a plot needs matplotlib: pip install 'loopos[plot]'") from error
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    confidence, accuracy = ([row[name] for row in table] for name in ("confidence", "accuracy"))
    axes.plot(confidence, accuracy, marker="o", label="reward model")
    for row in table:
        axes.annotate(str(row["count"]), (row["confidence"], row["accuracy"]), fontsize=8)
    axes.set_xlabel("probability of the response with the higher score")
    axes.set_ylabel("share of pairs where it was chosen")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
