"""Every op at the sizes of GPT-2 124M, from the one list of cases; products by their rows."""

import numpy as np

import loopos
from loopos.backends.op_cases import BENCHMARK_CASES
from loopos.backends.threads import available_cpus, thread_limit

from . import targets, works
from .epochs import BACKENDS, THREADS, _measured

CASES = {case.name: case for case in BENCHMARK_CASES}


class Op:
    """Forward and, where there is one, backward."""

    params = (BACKENDS, THREADS, list(CASES))
    param_names = ("backend", "threads", "op")
    warmup_time = 0.2

    def setup(self, backend, threads, name):
        loopos.set_backend(backend)
        self.limited = thread_limit(threads)
        self.limited.__enter__()
        self.run = works.op(CASES[name])

    def teardown(self, backend, threads, name):
        self.limited.__exit__(None, None, None)

    def time_op(self, backend, threads, name):
        self.run()


class Subnormals:
    """What numbers below the normal range cost: nothing is flushed to 0 for speed."""

    params = (BACKENDS, list(works.SUBNORMAL_OPS))
    param_names = ("backend", "op")

    def setup(self, backend, name):
        loopos.set_backend(backend)

    def track_times_normal(self, backend, name):
        small, normal = (works.subnormal_op(name, scale) for scale in (1e-40, 1.0))
        with thread_limit(1):
            return min(works.spent_s(small, 20, 2)) / min(works.spent_s(normal, 20, 2))

    track_times_normal.unit = "x the time of normal numbers"


class Product:
    """A linear layer of GPT-2's, 768 to 3072, on all threads; `peers.py` has the other shapes."""

    params = (BACKENDS, list(works.GEMM_FORMS), list(works.GEMM_ROWS))
    param_names = ("backend", "form", "rows")
    warmup_time = 0.2

    def setup_cache(self):
        return _measured(available_cpus())

    def setup(self, machine, backend, form, rows):
        loopos.set_backend(backend)
        self.limited = thread_limit(available_cpus())
        self.limited.__enter__()
        self.run, _ = works.gemm(form, rows, 3072, 768)

    def teardown(self, machine, backend, form, rows):
        self.limited.__exit__(None, None, None)

    def time_product(self, machine, backend, form, rows):
        self.run()

    def track_multiple_of_target(self, machine, backend, form, rows):
        target = targets.seconds(f"gemm {form} {rows}x3072x768", backend, machine)
        if target is None:
            return float("nan")
        return float(np.median(works.spent_s(self.run, 20, 4))) / target

    track_multiple_of_target.unit = "x target (below 1 is met)"
