"""Every op at the sizes of GPT-2 124M, from the one list of op cases."""

import loopos
from loopos.backends.op_cases import BENCHMARK_CASES

from . import works

CASES = {case.name: case for case in BENCHMARK_CASES}


class Op:
    """Forward and, where there is one, backward."""

    params = (loopos.available_backends(), list(CASES))
    param_names = ("backend", "op")
    warmup_time = 0.2

    def setup(self, backend, name):
        loopos.set_backend(backend)
        self.run = works.op(CASES[name])

    def time_op(self, backend, name):
        self.run()
