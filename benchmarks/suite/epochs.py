"""Epochs of each method on the seed's default sizes, as times and as multiples of their targets."""

import time

import numpy as np

import loopos

from . import works

BACKENDS = loopos.available_backends()


class FineTuningEpoch:
    """The seed's default fine-tuning epoch."""

    params = BACKENDS
    param_names = ("backend",)
    warmup_time = 1.0

    def setup(self, backend):
        loopos.set_backend(backend)
        self.epoch = works.fine_tuning_epoch()
        self.epoch()

    def time_epoch(self, backend):
        self.epoch()

    def peakmem_epoch(self, backend):
        self.epoch()

    def track_multiple_of_target(self, backend):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            self.epoch()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) / works.TARGETS["fine_tuning_epoch"][backend]

    track_multiple_of_target.unit = "x target (below 1 is met)"


class PretrainingStep:
    """One step of GPT-2 124M on 4 x 256 tokens."""

    params = BACKENDS
    param_names = ("backend",)
    number, repeat, warmup_time, timeout = 1, 3, 0.0, 300

    def setup(self, backend):
        loopos.set_backend(backend)
        self.step = works.pretraining_step()
        self.step()

    def time_step(self, backend):
        self.step()

    def peakmem_step(self, backend):
        self.step()
