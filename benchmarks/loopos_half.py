#!/usr/bin/env python3
"""Our half of a comparison: one work in one process, warm, as JSON on the last line.

    python benchmarks/loopos_half.py WORK [--backend auto] [--threads 2] [--runs 7] [--warmup 4]
        [--dtype float32] [--export DIR]

The works are those of `torch_half.py`, `trl_half.py` and `transformers_half.py`, the methods that
have no peer, and "gemm": every product of the seed's and GPT-2's linear layers, and then by NumPy's
BLAS in this process, as a list. --dtype is that of weights in generation: float32, bfloat16 or
int8. --export writes the weights and the token ids for PyTorch to use, and gives the loss before
the first step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from suite import decoding, methods, works

import loopos
from loopos.backends.memory import peak_bytes
from loopos.backends.threads import available_cpus, thread_limit

ALL_WORKS = (*methods.EVERY, *decoding.DECODING, "gemm")
#: Seconds spent on each product in "gemm".
_PRODUCT_S = 0.1


def timed(asked: argparse.Namespace) -> dict[str, Any]:
    """Return medians of one work."""
    if asked.work in decoding.DECODING:
        work = decoding.decoding(decoding.DECODING[asked.work], asked.dtype)
    else:
        work = methods.EVERY[asked.work]()
    exported = {} if asked.export is None else export(work, asked.export)
    times = work.times_s(asked.runs, asked.warmup)
    median = sorted(times)[len(times) // 2]
    figures = {} if work.figures is None else work.figures(len(times))
    return (
        {
            "loopos_s": round(median, 7),
            "min_s": round(min(times), 7),
            "tokens_per_s": round(work.tokens / work.units / median, 1),
            "peak_mb": peak_bytes() >> 20,
        }
        | figures
        | exported
    )


def export(work: works.Work, directory: Path) -> dict[str, float]:
    """Write weights and data; return the first loss."""
    if work.model is None:
        raise SystemExit("this work has no weights to export")
    work.model.save(directory)
    lengths = np.concatenate([batch.lengths for batch in work.batches])
    data = {
        "tokens": np.concatenate([batch.tokens for batch in work.batches]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
    }
    if work.batches[0].labels is not None:
        data["labels"] = np.concatenate([batch.labels for batch in work.batches])
    np.savez(directory / "data.npz", **data)
    return {"first_loss": work.first_loss()}


def seconds_of(run: Callable[[], Any], warmup: int) -> float:
    """Return the median seconds of a product."""
    (once,) = works.spent_s(run, 1, warmup)
    return float(np.median(works.spent_s(run, max(5, min(300, int(_PRODUCT_S / once))), 0)))


def products(warmup: int, rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return every product's times by the backend in force, and then by NumPy's BLAS.

    Not by turns: the threads of BLAS spin on after each product and would slow ours.
    """
    shapes = [
        (form, count, out, width)
        for form in works.GEMM_FORMS
        for count in rows
        for out, width in works.GEMM_LAYERS
    ]
    ours = [seconds_of(works.gemm(*shape)[0], warmup) for shape in shapes]
    theirs = [seconds_of(works.gemm(*shape)[1], warmup) for shape in shapes]
    return [
        {"work": f"gemm {form} {count}x{out}x{width}", "loopos_s": mine, "peer_s": peer}
        for (form, count, out, width), mine, peer in zip(shapes, ours, theirs, strict=True)
    ]


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=ALL_WORKS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--dtype", choices=decoding.DTYPES, default="float32")
    parser.add_argument("--export", type=Path)
    asked = parser.parse_args()
    with loopos.use_backend(asked.backend) as backend, thread_limit(asked.threads):
        known = {"backend": backend.name, "dtype": asked.dtype, "threads": asked.threads}
        if asked.work == "gemm":
            found: Any = [row | known for row in products(asked.warmup, works.GEMM_ROWS)]
        else:
            found = {"work": asked.work} | known | timed(asked)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
