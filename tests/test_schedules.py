"""Schedules against the arithmetic of transformers' (goldens made with transformers 5.23.0)."""

import math

import pytest

from loopos.errors import ConfigError
from loopos.training.options import TrainingOptions
from loopos.training.schedules import SCHEDULES, Shape, make_schedule

STEPS = (0, 1, 3, 4, 5, 10, 19)
#: base rate 0.1, 4 steps of warm-up, 20 in all
GOLDENS = {
    "constant": (0.0, 0.025, 0.075, 0.1, 0.1, 0.1, 0.1),
    "linear": (0.0, 0.025, 0.075, 0.1, 0.09375, 0.0625, 0.00625),
    "cosine": (0.0, 0.025, 0.075, 0.1, 0.0990392640, 0.0691341716, 0.000960735979),
}


#: What each has of its own here, and transformers' names of it.
SHAPES = {
    "cosine_with_restarts": Shape(cycles=3),
    "polynomial": Shape(power=2.5),
    "step": Shape(step_size=4, gamma=0.5),
    "inverse_sqrt": Shape(timescale=9),
}
THEIRS = {
    "constant": ("constant_schedule", {}),
    "linear": ("linear_schedule", {}),
    "cosine": ("cosine_schedule", {}),
    "cosine_with_restarts": ("cosine_with_hard_restarts_schedule", {"num_cycles": 3}),
    "polynomial": ("polynomial_decay_schedule", {"power": 2.5, "lr_end": 0.003}),
    "inverse_sqrt": ("inverse_sqrt_schedule", {"timescale": 9}),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name):
    rate = make_schedule(name, 0.1, 4, 20)
    assert [rate(s) for s in STEPS] == pytest.approx(GOLDENS[name], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "warmup", "total"),
    [
        (name, warmup, total)
        for name in THEIRS
        for warmup, total in [(0, 7), (4, 20), (10, 10), (30, 20)]
        if (name, warmup) != ("polynomial", total)  # transformers divides by zero
    ],
)
def test_equal_transformers(name, warmup, total):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs_name, options = THEIRS[name]
    optional = name == "inverse_sqrt" and not warmup
    function = getattr(transformers, f"get_{theirs_name}" + ("_with_warmup"
        if name != "inverse_sqrt" else ""))  # fmt: skip
    options = {"num_warmup_steps": warmup} | options
    if name not in ("constant", "inverse_sqrt"):
        options["num_training_steps"] = total
    theirs = function(optimizer, **options)
    floor = 0.003 if name == "polynomial" else 0.0
    shape = SHAPES.get(name)
    ours = make_schedule(name, 0.1, warmup, total, min_learning_rate=floor, shape=shape)
    assert optional or warmup or ours(0) == pytest.approx(0.1)
    # transformers' inverse_sqrt has its highest rate where the timescale is the warm-up only.
    start = warmup if name == "inverse_sqrt" else 0
    for step in range(total):
        if step >= start:
            expected = theirs.get_last_lr()[0]
            assert ours(step) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_steps_equal_pytorch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    ours = make_schedule("step", 0.1, 3, 20, shape=SHAPES["step"])
    assert [ours(s) for s in range(3)] == pytest.approx([0.0, 0.1 / 3, 0.2 / 3])
    for step in range(17):
        assert ours(3 + step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_what_follows_when_nothing_is_said():
    third = make_schedule("step", 1.0, 2, 14)  # 12 steps after the warm-up
    assert [third(s) for s in (2, 5, 6, 9, 10, 13)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert make_schedule("inverse_sqrt", 1.0, 4, 20)(8) == pytest.approx(math.sqrt(4 / 8))
    assert make_schedule("inverse_sqrt", 1.0, 0, 20)(10_000) == pytest.approx(math.sqrt(0.5))
    for plain, shaped in (("cosine", "cosine_with_restarts"), ("linear", "polynomial")):
        rates = [[make_schedule(n, 0.1, 2, 9)(s) for s in range(9)] for n in (plain, shaped)]
        assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "constant"])
def test_no_rate_falls_below_the_floor(name):
    rate = make_schedule(name, 0.1, 4, 20, min_learning_rate=0.02, shape=SHAPES.get(name))
    plain = make_schedule(name, 0.1, 4, 20, shape=SHAPES.get(name))
    for step in range(4, 25):
        assert rate(step) == pytest.approx(0.02 + 0.8 * plain(step))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler_cycles": 2}, "scheduler_cycles: the scheduler 'constant' has none"),
        ({"scheduler": "step", "scheduler_power": 2.0}, "power: the scheduler 'step' has none"),
        ({"min_learning_rate": 1e-6}, "min_learning_rate: a constant rate never falls"),
        (
            {"scheduler": "cosine", "learning_rate": 1e-3, "min_learning_rate": 1e-2},
            "min_learning_rate: expected at most the learning_rate 0.001, found 0.01",
        ),
        ({"scheduler": "step", "scheduler_gamma": 1.5}, r"gamma: expected a number in \(0, 1\]"),
        ({"scheduler": "step", "scheduler_step_size": 0}, "step_size: expected at least 1"),
        ({"layerwise_lr_decay": 0.0}, r"layerwise_lr_decay: expected a number in \(0, 1\]"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(**options)


def test_without_warm_up_the_first_rate_is_the_highest():
    for name in SCHEDULES:
        assert make_schedule(name, 0.3, 0, 10)(0) == pytest.approx(0.3)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"training.scheduler: .* found 'cosin'; did you mean 'cosine'"
    ):
        make_schedule("cosin", 0.1, 0, 10)
