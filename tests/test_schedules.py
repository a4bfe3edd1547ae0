"""Schedules against the arithmetic of transformers' (goldens made with transformers 5.23.0)."""

import pytest

from loopos.errors import ConfigError
from loopos.training.schedules import SCHEDULES, make_schedule

STEPS = (0, 1, 3, 4, 5, 10, 19)
#: base rate 0.1, 4 steps of warm-up, 20 in all
GOLDENS = {
    "constant": (0.0, 0.025, 0.075, 0.1, 0.1, 0.1, 0.1),
    "linear": (0.0, 0.025, 0.075, 0.1, 0.09375, 0.0625, 0.00625),
    "cosine": (0.0, 0.025, 0.075, 0.1, 0.0990392640, 0.0691341716, 0.000960735979),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_goldens(name):
    rate = make_schedule(name, 0.1, 4, 20)
    assert [rate(s) for s in STEPS] == pytest.approx(GOLDENS[name], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (4, 20), (10, 10), (30, 20)])
def test_equal_transformers(name, warmup, total):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    suffix = (
        "constant_schedule_with_warmup" if name == "constant" else f"{name}_schedule_with_warmup"
    )
    options = {"num_warmup_steps": warmup}
    options |= {} if name == "constant" else {"num_training_steps": total}
    theirs = getattr(transformers, f"get_{suffix}")(optimizer, **options)
    ours = make_schedule(name, 0.1, warmup, total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_without_warm_up_the_first_rate_is_the_highest():
    for name in SCHEDULES:
        assert make_schedule(name, 0.3, 0, 10)(0) == pytest.approx(0.3)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"training.scheduler: .* found 'cosin'; did you mean 'cosine'"
    ):
        make_schedule("cosin", 0.1, 0, 10)
