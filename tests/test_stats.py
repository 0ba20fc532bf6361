import math

import numpy as np
import pytest

from bpo_fast.stats import aggregates, bootstrap, crossed_bootstrap, interquartile_mean, length_controlled


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = [0.0, 1.0] * 200
    found = bootstrap(values)
    assert found.mean == 0.5
    half = 1.96 * 0.5 / math.sqrt(400)
    assert (found.low, found.high) == (pytest.approx(0.5 - half, abs=0.006), pytest.approx(0.5 + half, abs=0.006))
    assert found == bootstrap(values)
    assert bootstrap([0.25]) == bootstrap([0.25, 0.25])


def test_seeds_and_prompts_crossed_are_wider_than_either():
    draw = np.random.default_rng(1)
    table = draw.normal(0, 1, (25, 1)) + draw.normal(0, 1, (1, 100)) + draw.normal(0, 1, (25, 100))
    found = crossed_bootstrap(table)
    sd = math.sqrt(1 / 25 + 1 / 100 + 1 / 2500)  # of the mean, by the variances put in
    assert found.mean == pytest.approx(table.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.35)
    assert found.high - found.low > bootstrap(table.mean(1)).high - bootstrap(table.mean(1)).low


def test_what_nobody_judged_does_not_count():
    table = np.array([[1.0, math.nan], [0.0, 1.0]])
    assert crossed_bootstrap(table).mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 3], 1.5),
        ([0, 1, 2, 3, 100], 2.0),  # a quarter of five, rounded down, is one from either end
        ([5], 5.0),
        ([0, 0, 1, 1, 1, 1, 9, 9], 1.0),
    ],
)
def test_interquartile_mean(values, expected):
    assert interquartile_mean(np.array(values, dtype=float)) == expected


def test_aggregates_by_hand():
    found = aggregates([[0.2, 0.4], [0.9, 1.1], [0.5, 0.7]])
    assert found["median"].mean == pytest.approx(0.6)  # of the strata's means 0.3, 1.0, 0.6
    assert found["IQM"].mean == pytest.approx((0.4 + 0.5 + 0.7 + 0.9) / 4)
    assert found["mean"].mean == pytest.approx((0.3 + 1.0 + 0.6) / 3)
    assert found["optimality gap"].mean == pytest.approx(1 - (0.2 + 0.4 + 0.9 + 1.0 + 0.5 + 0.7) / 6)
    # two of two runs: the stratum of 0.2 and 0.4 has mean 0.2, 0.3 or 0.4 with chances 1/4, 1/2, 1/4
    single = aggregates([[0.2, 0.4]], num_resamples=4000)["mean"]
    assert (single.low, single.high) == (pytest.approx(0.2), pytest.approx(0.4))


# 7 runs of 3 tasks, and what rliable 1.2.0 says of them (its intervals from 20,000 resamples)
RUNS = (
    (0.086, 0.237, 0.801),
    (0.582, 0.094, 0.433),
    (0.479, 0.160, 0.735),
    (0.114, 0.391, 0.517),
    (0.431, 0.587, 0.738),
    (0.956, 0.284, 0.649),
    (0.696, 0.293, 0.001),
)
RLIABLE = {
    "median": (0.47771428571428565, 0.29128, 0.62357),
    "IQM": (0.4439090909090909, 0.30054, 0.56300),
    "mean": (0.4411428571428571, 0.33738, 0.54043),
    "optimality gap": (0.5588571428571429, 0.45957, 0.66262),
}


def test_aggregates_as_rliable_has_them():
    found = aggregates(list(zip(*RUNS, strict=True)), num_resamples=4000)
    for name, (estimate, low, high) in RLIABLE.items():
        assert found[name].mean == pytest.approx(estimate, abs=1e-12)
        assert (found[name].low, found[name].high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))


def sample(theta, phi, num, seed=0):
    draw = np.random.default_rng(seed)
    d = draw.normal(5, 20, num)
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(d / d.std()))))
    return (draw.random(num) < p).astype(float), d


def test_the_length_effect_is_taken_out():
    wins, d = sample(theta=-0.4, phi=2.0, num=20000)
    found = length_controlled(wins, d, num_resamples=50)
    assert wins.mean() > found.mean + 0.02
    assert found.mean == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.01)


def test_the_fit_is_the_optimum_of_its_objective():
    wins, d = sample(theta=0.5, phi=-1.0, num=60)
    x = np.tanh(d / d.std())

    def loss(theta, phi):
        z = theta + phi * x
        return (np.logaddexp(0, z) - wins * z).sum() + phi**2 / 2

    rate = length_controlled(wins, d).mean
    theta = math.log(rate / (1 - rate))
    best = min((loss(theta, phi), phi) for phi in np.linspace(-4, 4, 4001))
    for other in (theta - 0.02, theta + 0.02):
        assert min(loss(other, phi) for phi in np.linspace(best[1] - 0.2, best[1] + 0.2, 401)) > best[0]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth, num = 1 / (1 + math.exp(-0.3)), 60
    hits = 0
    for seed in range(num):
        found = length_controlled(*sample(theta=0.3, phi=1.0, num=150, seed=seed), num_resamples=200)
        hits += found.low <= truth <= found.high
    assert hits >= 0.85 * num


def test_equal_lengths_leave_the_win_rate_as_it_is():
    found = length_controlled([1, 0, 0, 0], [3, 3, 3, 3])
    assert found.mean == pytest.approx(0.25)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_without_a_loss_or_a_win_nothing_is_fitted(outcome):
    found = length_controlled([outcome] * 5, [1, 2, 3, 4, 5])
    assert (found.mean, found.low, found.high) == (outcome, outcome, outcome)


def test_wins_that_length_separates_stay_finite():
    found = length_controlled([0, 0, 0, 1, 1, 1], [-30, -20, -10, 10, 20, 30])
    assert found.mean == pytest.approx(0.5, abs=1e-6)
