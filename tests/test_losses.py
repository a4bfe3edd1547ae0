"""Goldens of the pure losses, and their gradients against differences in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopos.backends import available_backends, use_backend
from loopos.errors import ConfigError, InputError
from loopos.methods import losses

LN2 = 0.6931471805599453


def draws(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check_gradients(function, *inputs, moved=None):
    """Compare each gradient with a central difference of the sum, along a random direction."""
    moved = len(inputs) if moved is None else moved
    _, _, *gradients = function(*inputs)
    assert len(gradients) == moved
    for i, gradient in enumerate(gradients):
        direction, step = draws(inputs[i].size, seed=7 + i), 1e-6
        ends = []
        for sign in (1, -1):
            shifted = list(inputs)
            shifted[i] = inputs[i] + sign * step * direction
            ends.append(function(*shifted)[0])
        expected = (ends[0] - ends[1]) / (2 * step)
        assert gradient @ direction == pytest.approx(expected, rel=1e-6, abs=1e-8)


# -- reward model (reference 2, 4) -----------------------------------------------------------------


def test_bradley_terry_at_a_zero_head_is_ln_2():
    total, count, dchosen, drejected = losses.bradley_terry_loss_and_grad(np.zeros(3), np.zeros(3))
    assert total / count == pytest.approx(LN2, abs=1e-12)
    assert dchosen.tolist() == [-0.5] * 3 == (-drejected).tolist()


def test_bradley_terry_with_margins_and_extremes():
    chosen, rejected = np.array([2.0, 1e4, -1e4]), np.array([1.0, 0.0, 0.0])
    total, _, dchosen, _ = losses.bradley_terry_loss_and_grad(chosen, rejected)
    assert total == pytest.approx(0.31326168751822286 + 0 + 1e4, rel=1e-12)
    assert dchosen[1:].tolist() == [0, -1]
    led = losses.bradley_terry_loss_and_grad(chosen[:1], rejected[:1], np.array([1.0]))
    assert led[0] == pytest.approx(LN2)


def test_centering():
    found = losses.centering_loss_and_grad(np.array([1.0, -2.0]), np.array([2.0, 2.0]))
    assert found[:2] == (9.0, 2.0)
    assert found[2].tolist() == found[3].tolist() == [6.0, 0.0]


# -- KL (reference 10) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [-0.5, 0.0, 0.5]),
        ("k2", [0.125, 0.0, 0.125]),
        ("k3", [0.148721, 0.0, 0.106531]),
    ],
)
def test_kl_estimators(estimator, expected):
    d = np.array([-0.5, 0.0, 0.5])
    np.testing.assert_allclose(losses.kl_estimate(d, 0 * d, estimator), expected, atol=1e-6)


def test_kl_estimators_have_the_mean_of_the_exact_kl():
    rng = np.random.default_rng(3)
    z, z_ref = rng.standard_normal((2, 6))
    logp, ref = z - np.log(np.exp(z).sum()), z_ref - np.log(np.exp(z_ref).sum())
    exact = np.exp(logp) @ (logp - ref)
    drawn = rng.choice(6, 200_000, p=np.exp(logp))
    for estimator in ("k1", "k3"):
        sampled = losses.kl_estimate(logp[drawn], ref[drawn], estimator)
        error = sampled.std() / np.sqrt(sampled.size)
        assert abs(sampled.mean() - exact) < 4 * error


def test_unknown_estimator_is_named():
    with pytest.raises(ConfigError, match="estimator: expected one of k1, k2, k3, found 'k4'"):
        losses.kl_estimate(np.zeros(1), np.zeros(1), "k4")


# -- rewards and advantages (reference 10 to 13) --------------------------------------------------


def test_rewards_stand_at_the_last_token():
    kl, offsets = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0, 2, 5])
    rewards = losses.token_rewards(kl, np.array([10.0, 20.0]), offsets, 0.5)
    assert rewards.tolist() == [-0.5, 9.0, -1.5, -2.0, 17.5]


def test_a_response_without_tokens_has_no_last_one():
    with pytest.raises(ValueError, match="response 1 is empty"):
        losses.token_rewards(np.zeros(2), np.zeros(2), np.array([0, 2, 2]), 0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gae(dtype):
    ones = np.array([0, 0, 0, 1], dtype)
    offsets = np.array([0, 4], np.int32)
    advantages, returns = losses.gae(ones, ones, offsets, gamma=0.9, lam=0.95)
    np.testing.assert_allclose(advantages, [0.657923, 0.7695, 0.9, 0], atol=1e-6)
    np.testing.assert_allclose(returns, [0.657923, 0.7695, 0.9, 1], atol=1e-6)


def test_whitening():
    x = np.arange(1.2, 2.05, 0.1)
    cases = {
        (False, True): [0.139407, 0.504555, 0.869703],
        (False, False): [0.050807, 0.438105, 0.825403],
        (True, True): [-1.460593],
        (True, False): [-1.549193],
    }
    for (shift_mean, unbiased), expected in cases.items():
        found = losses.whiten(x, shift_mean, unbiased)[: len(expected)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert losses.whiten(np.array([3.0])).tolist() == [0.0]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_whitened_values_have_mean_0_and_their_mean_is_kept(values):
    x = np.array(values)
    assert losses.whiten(x).mean() == pytest.approx(0, abs=1e-6)
    assert losses.whiten(x, shift_mean=False).mean() == pytest.approx(x.mean(), abs=1e-6)


def test_adaptive_kl_coefficient():
    assert losses.adapted_kl_coefficient(0.15, 6.0, 64) == 0.15
    assert losses.adapted_kl_coefficient(0.15, 60.0, 100) == pytest.approx(0.15 * (1 + 0.002))
    assert losses.adapted_kl_coefficient(0.15, 5.4, 100) == pytest.approx(0.15 * (1 - 0.001))
    assert losses.adapted_kl_coefficient(0.15, 0.0, 100) == pytest.approx(0.15 * (1 - 0.002))
    with pytest.raises(ConfigError, match="adaptive_kl_horizon: expected more than a fifth"):
        losses.adapted_kl_coefficient(0.15, 0.0, 100, horizon=20)


def test_group_advantages():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 3.0])
    found = losses.grpo_advantages(rewards, 3, eps=0.0)
    root = np.sqrt(1 / 3)  # of the first group; that of the second is 1
    np.testing.assert_allclose(found, [2 / 3 / root, -1 / 3 / root, -1 / 3 / root, -1, 0, 1])
    plain = losses.grpo_advantages(rewards, 3, scale="none")
    np.testing.assert_allclose(plain, [2 / 3, -1 / 3, -1 / 3, -1, 0, 1])
    batch = losses.grpo_advantages(rewards, 3, scale="batch", eps=0.0)
    np.testing.assert_allclose(batch, plain / rewards.std(ddof=1))
    np.testing.assert_allclose(losses.rloo_advantages(rewards, 3), 1.5 * plain)
    assert losses.grpo_advantages(np.ones(4), 4).tolist() == [0] * 4  # nothing to learn from


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [(np.zeros(4), 3, "whole groups of 3"), (np.zeros(2), 1, "group_size: expected at least 2")],
)
def test_groups_that_are_none(rewards, size, message):
    for function in (losses.grpo_advantages, losses.rloo_advantages):
        with pytest.raises(ValueError, match=message):
            function(rewards, size)


# -- PPO (reference 14, 15) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "moves"),
    [
        (1.0, 1.5, -1.2, False),
        (-1.0, 0.5, 0.8, False),
        (1.0, np.exp(0.1), -1.105171, True),
        (1.0, 0.5, -0.5, True),
        (-1.0, 1.5, 1.5, True),
    ],
)
def test_policy_loss(advantage, ratio, expected, moves):
    old = np.array([-2.0])
    total, count, gradient = losses.ppo_loss_and_grad(
        old + np.log(ratio), old, np.array([advantage]), 0.2
    )
    assert (total, count) == (pytest.approx(expected, abs=1e-6), 1.0)
    assert gradient[0] == (pytest.approx(-advantage * ratio) if moves else 0.0)


def test_before_any_update_the_gradient_is_the_advantage():
    logprobs, advantages = -np.abs(draws(9)), draws(9, seed=1)
    gradient = losses.ppo_loss_and_grad(logprobs, logprobs, advantages)[2]
    np.testing.assert_array_equal(gradient, -advantages)


def test_clip_higher_moves_the_upper_bound_only():
    old, ratio = np.zeros(2), np.array([1.25, 0.5])
    advantages = np.array([1.0, -1.0])
    low = losses.ppo_loss_and_grad(np.log(ratio), old, advantages, 0.2)
    high = losses.ppo_loss_and_grad(np.log(ratio), old, advantages, 0.2, 0.28)
    assert (low[0], high[0]) == (pytest.approx(-1.2 + 0.8), pytest.approx(-1.25 + 0.8))


def test_value_loss():
    values, old, returns = np.array([1.0, 1.0, 0.1]), np.zeros(3), np.array([0.0, 2.0, 2.0])
    total, count, gradient = losses.value_loss_and_grad(values, old, returns, 0.2)
    # free 1 against clipped .04; free 1 against clipped 3.24; inside the band both are 3.61
    assert total == pytest.approx(0.5 * (1 + 3.24 + 3.61))
    assert count == 3
    np.testing.assert_allclose(gradient, [1.0, 0.0, -1.9])
    plain = losses.value_loss_and_grad(values, old, returns, None)
    assert plain[0] == pytest.approx(0.5 * (1 + 1 + 3.61))


# -- preferences (reference: the younger relatives) -----------------------------------------------


@pytest.mark.parametrize(("h", "expected"), [(0.0, 0.693147), (1.0, 0.313262), (2.0, 0.126928)])
def test_dpo(h, expected):
    zero = np.zeros(1)
    total, count, *_ = losses.dpo_loss_and_grad(np.array([h]), zero, zero, zero, beta=1.0)
    assert (total, count) == (pytest.approx(expected, abs=1e-6), 1.0)


def test_variants_of_dpo():
    h, zero = np.array([0.5]), np.zeros(1)
    found = {
        name: losses.dpo_loss_and_grad(h, zero, zero, zero, 0.5, name)[0]
        for name in losses.DPO_LOSSES
    }
    assert found["ipo"] == pytest.approx((0.5 - 1.0) ** 2)
    assert found["hinge"] == pytest.approx(1 - 0.25)
    assert found["sigmoid"] == pytest.approx(np.log1p(np.exp(-0.25)))
    smooth = losses.dpo_loss_and_grad(h, zero, zero, zero, 0.5, label_smoothing=0.1)[0]
    assert smooth == pytest.approx(0.9 * np.log1p(np.exp(-0.25)) + 0.1 * np.log1p(np.exp(0.25)))
    with pytest.raises(ConfigError, match="label_smoothing: the loss 'ipo' has none"):
        losses.dpo_loss_and_grad(h, zero, zero, zero, 0.5, "ipo", 0.1)
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        losses.dpo_loss_and_grad(h, zero, zero, zero, 0.5, "sigmoit")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_certain_response_has_a_finite_odds_ratio(dtype):
    zero, other, ones = np.zeros(1, dtype), np.array([-2.0], dtype), np.ones(1)
    for chosen, rejected in ((zero, other), (other, zero), (zero, zero)):
        total, _, *gradients = losses.orpo_loss_and_grad(chosen, rejected, ones, ones)
        assert np.isfinite([total, *np.concatenate(gradients)]).all()
    least = np.finfo(dtype).eps
    found = losses.orpo_loss_and_grad(np.full(1, -4 * least, dtype), other, ones, ones)
    lead = -np.log(4 * least) - (-2 - np.log(-np.expm1(-2.0)))
    np.testing.assert_allclose(found[0], np.log1p(np.exp(-lead)), rtol=1e-5)


def test_labels_and_shares_that_are_none():
    one = np.zeros(2)
    with pytest.raises(InputError, match="desirable: expected true or false"):
        losses.kto_loss_and_grad(one, one, np.array([-1, 1]), 0.0)
    with pytest.raises(ConfigError, match="label_smoothing: expected a number from 0 to 1"):
        losses.dpo_loss_and_grad(one, one, one, one, label_smoothing=2.0)
    assert losses.grpo_advantages(np.zeros(0), 2, "batch").shape == (0,)


def test_simpo_orpo_and_kto_by_hand():
    c, r, nc, nr = np.array([-2.0]), np.array([-6.0]), np.array([4]), np.array([3])
    lead = 2.0 * (-0.5 + 2.0) - 1.0
    assert losses.simpo_loss_and_grad(c, r, nc, nr)[0] == pytest.approx(np.log1p(np.exp(-lead)))
    odds = [np.exp(m) / (1 - np.exp(m)) for m in (-0.5, -2.0)]
    expected = np.log1p(odds[1] / odds[0])
    assert losses.orpo_loss_and_grad(c, r, nc, nr)[0] == pytest.approx(expected)
    total, count, gradient = losses.kto_loss_and_grad(
        np.array([1.0, 1.0]), np.zeros(2), np.array([True, False]), 1.0, 0.5, 2.0, 3.0
    )
    assert (total, count) == (2.0 * 0.5 + 3.0 * 0.5, 2.0)
    np.testing.assert_allclose(gradient, [-2.0 * 0.5 / 4, 3.0 * 0.5 / 4])


# -- gradients, dtypes, shapes --------------------------------------------------------------------

A, B, C, D = (draws(11, seed=s) for s in range(4))
LENGTHS = np.arange(1, 12), np.arange(12, 1, -1)
CASES = {
    "bradley_terry": (losses.bradley_terry_loss_and_grad, (A, B), 2),
    "bradley_terry_margins": (losses.bradley_terry_loss_and_grad, (A, B, abs(C)), 2),
    "centering": (losses.centering_loss_and_grad, (A, B), 2),
    "kl1": (lambda a, b: losses.kl_loss_and_grad(a, b, "k1"), (A, B), 1),
    "kl2": (lambda a, b: losses.kl_loss_and_grad(a, b, "k2"), (A, B), 1),
    "kl3": (lambda a, b: losses.kl_loss_and_grad(a, b, "k3"), (A, B), 1),
    "ppo": (losses.ppo_loss_and_grad, (A / 3, B / 3, C), 1),
    "value": (losses.value_loss_and_grad, (A / 3, B / 3, C), 1),
    "dpo": (losses.dpo_loss_and_grad, (A, B, C, D), 2),
    "dpo_smooth": (lambda *x: losses.dpo_loss_and_grad(*x, 1.0, "sigmoid", 0.2), (A, B, C, D), 2),
    "ipo": (lambda *x: losses.dpo_loss_and_grad(*x, 0.5, "ipo"), (A, B, C, D), 2),
    "hinge": (lambda *x: losses.dpo_loss_and_grad(*x, 0.5, "hinge"), (A, B, C, D), 2),
    "simpo": (losses.simpo_loss_and_grad, (A, B, *LENGTHS), 2),
    "orpo": (losses.orpo_loss_and_grad, (-abs(A), -abs(B), *LENGTHS), 2),
    "kto": (lambda a, b: losses.kto_loss_and_grad(a, b, A > 0, 0.3, 0.7, 1.5), (B, C), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    function, inputs, moved = CASES[name]
    check_gradients(function, *inputs, moved=moved)


@pytest.mark.parametrize("name", CASES)
def test_float32_stays_float32_and_agrees(name):
    function, inputs, _ = CASES[name]
    total, count, *gradients = function(*inputs)
    narrow = [x.astype(np.float32) if x.dtype == np.float64 else x for x in inputs]
    found = function(*narrow)
    assert found[0] == pytest.approx(total, rel=1e-5)
    assert found[1] == count == 11
    for gradient, expected in zip(found[2:], gradients, strict=True):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_not_broadcast(name):
    function, inputs, _ = CASES[name]
    with pytest.raises(ValueError, match=r"expected the shape \(11,\) of "):
        function(inputs[0], inputs[1][:1], *inputs[2:])


# -- what is no array of floats --------------------------------------------------------------------

WHOLE = {name: case for name, case in CASES.items() if name not in ("orpo", "kto")}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_and_lists_are_taken_as_floats(name):
    """As integers, gradients and advantages would be cut to 0 and 1 in silence."""
    function, inputs, _ = WHOLE[name]
    real = [np.round(2 * x) if x.dtype == np.float64 else x for x in inputs]
    expected = function(*real)
    for whole in ([x.astype(int) for x in real], [x.astype(int).tolist() for x in real]):
        found = function(*whole)
        assert found[:2] == expected[:2]
        for gradient, right in zip(found[2:], expected[2:], strict=True):
            assert gradient.dtype == np.float64
            np.testing.assert_array_equal(gradient, right)
    narrow = [inputs[0].astype(np.float32), *(x.astype(int) for x in real[1:])]
    assert function(*narrow)[2].dtype == np.float32


@pytest.mark.parametrize("kind", [bool, int, np.float32])
def test_rewards_of_0_and_1_have_advantages_between(kind):
    rewards = np.array([1, 0, 1, 1]).astype(kind)
    plain = losses.grpo_advantages(rewards, 4, scale="none")
    assert plain.tolist() == [0.25, -0.75, 0.25, 0.25]
    np.testing.assert_allclose(losses.grpo_advantages(rewards, 4, eps=0.0), plain * 2)
    np.testing.assert_allclose(losses.rloo_advantages(rewards, 4), plain * 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.whiten(rewards, eps=0.0), plain * 2, rtol=1e-6)
    assert losses.token_rewards(rewards, [0.5], [0, 4], 0.5).tolist() == [-0.5, 0, -0.5, 0]


@pytest.mark.parametrize("backend", sorted(available_backends()))
def test_gae_takes_whole_numbers_and_refuses_other_segments(backend):
    with use_backend(backend):
        advantages, returns = losses.gae([0, 0, 0, 1], [0, 0, 0, 1], [0, 4], 0.9, 0.95)
        np.testing.assert_allclose(advantages, [0.657923, 0.7695, 0.9, 0], atol=1e-6)
        np.testing.assert_allclose(returns, [0.657923, 0.7695, 0.9, 1], atol=1e-6)
        ones = np.ones(4, np.float32)
        for offsets in ([0, 3], [1, 4], [0, 40], [0, 5, 2, 4], [-3, 4], [0]):
            with pytest.raises(InputError, match="offsets: expected to rise from 0 to 4, the num"):
                losses.gae(ones, ones, np.array(offsets))
        for offsets in ([0.0, 4.0], [[0, 4]], 4, []):
            with pytest.raises(InputError, match=r"offsets: expected whole numbers \[B \+ 1\]"):
                losses.gae(ones, ones, offsets)
        with pytest.raises(InputError, match="rewards: expected one dimension"):
            losses.gae(ones[:, None], ones[:, None], [0, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.whiten(np.zeros(0)), "x: expected at least one value"),
        (lambda: losses.whiten(["a", "b"]), "x: expected an array of numbers, found type <U1"),
        (lambda: losses.gae([[1], [1, 2]], [0, 0], [0, 2]), "rewards: expected an array of num"),
        (lambda: losses.ppo_loss_and_grad(A, None, C, 0.2), "old_logprobs: expected an array"),
        (lambda: losses.ppo_loss_and_grad(A, B, C, -0.2), "clip_epsilon: expected at least 0"),
        (lambda: losses.ppo_loss_and_grad(A, B, C, 0.2, -1), "clip_epsilon_high: expected at"),
        (lambda: losses.value_loss_and_grad(A, B, C, -1), "clip_epsilon: expected at least 0"),
        (lambda: losses.token_rewards(A, A, [0, 11], 0.1), "scores: expected 1, found shape"),
        (lambda: losses.token_rewards(A, A[:1], [0, 7], 0.1), "offsets: expected to rise from 0"),
        (lambda: losses.simpo_loss_and_grad(A, B, 0 * LENGTHS[0], LENGTHS[1]), "chosen_lengths"),
        (lambda: losses.orpo_loss_and_grad(-A, -B, LENGTHS[0], 0 * LENGTHS[1]), "rejected_len"),
    ],
)
def test_what_is_no_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
