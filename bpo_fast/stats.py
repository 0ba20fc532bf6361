"""Point estimates with 95% percentile-bootstrap intervals: over prompts, seeds, both, or runs by stratum.

The aggregates (median, IQM, mean, optimality gap) and their stratified bootstrap are those of Agarwal et al. 2021
(arXiv 2108.13264), as in the library rliable, whose dependencies (scipy, pandas, statsmodels, arch) are left out here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
LEVELS = (2.5, 97.5)
RIDGE = 1.0
NEWTON_STEPS = 30


@dataclass(frozen=True)
class Interval:
    """A point estimate (a mean, unless said otherwise) and its 95% percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value a prompt (or seed) with its interval; for a paired comparison, give it the differences.

    Args:
        values: at least one.
        num_resamples: bootstrap samples.
        seed: of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [generator.choice(array, array.size).mean() for _ in range(num_resamples)]
    return _interval(array.mean(), means)


def crossed_bootstrap(values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """Mean of a table of seeds by prompts, both resampled: every seed was judged on the same prompts.

    Args:
        values: [seeds, prompts] float64; NaN where nobody judged.
        num_resamples: bootstrap samples.
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_prompts = values.shape
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for _ in range(num_resamples):
        rows = np.bincount(generator.integers(num_seeds, size=num_seeds), minlength=num_seeds)
        columns = np.bincount(generator.integers(num_prompts, size=num_prompts), minlength=num_prompts)
        means.append(rows @ filled @ columns / max(1, rows @ known @ columns))
    return _interval(float(np.nanmean(values)), means)


def length_controlled(
    wins: Sequence[float], length_differences: Sequence[float], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Win rate at equal length (Dubois et al. 2024, arXiv 2404.04475), in the form without instruction difficulty.

    Fits P(win) = sigmoid(theta + phi tanh(d / sd(d))) by penalised maximum likelihood, with (1/2) phi^2 added to the
    negative log-likelihood and theta free, and returns sigmoid(theta): the length term at d = 0. The interval
    resamples prompts and fits anew. With wins or losses alone it is 1 or 0.

    Args:
        wins: one a prompt: 1 won, 0 lost, values between for ties and shared verdicts.
        length_differences: length of the output minus that of its opponent, in any unit.
        num_resamples: bootstrap samples.
        seed: of the resampling.
    """
    y, d = np.asarray(wins, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    x = np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)
    counts = np.random.default_rng(seed).multinomial(y.size, np.full(y.size, 1.0 / y.size), size=num_resamples)
    (rate,) = _rates_at_equal_length(x, y, np.ones((1, y.size)))
    return _interval(rate, _rates_at_equal_length(x, y, counts.astype(np.float64)))


def _rates_at_equal_length(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] sigmoid(theta) of R weighted fits, by Newton's method on all of them at once."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    share = weights @ y / weights.sum(1)
    mixed = (share > 0) & (share < 1)
    for _ in range(NEWTON_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(theta[:, None] + phi[:, None] * x, -40, 40)))
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        g0, g1 = residual.sum(1), residual @ x - RIDGE * phi
        h00, h01, h11 = curvature.sum(1) + 1e-9, curvature @ x, curvature @ x**2 + RIDGE
        determinant = h00 * h11 - h01**2
        # at most two units in one step: far from the optimum the curvature is too small to be trusted
        theta += np.clip((h11 * g0 - h01 * g1) / determinant, -2.0, 2.0) * mixed
        phi += np.clip((h00 * g1 - h01 * g0) / determinant, -2.0, 2.0) * mixed
    return np.where(mixed, 1.0 / (1.0 + np.exp(-np.clip(theta, -40, 40))), share)


def aggregates(
    scores: Sequence[Sequence[float]], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Median, IQM, mean and optimality gap of the runs of one method, with stratified-bootstrap intervals.

    Args:
        scores: by stratum (task), one score in [0, 1] a run; strata may differ in size.
        num_resamples: bootstrap samples; each draws the runs of every stratum anew.
        seed: of the resampling.
    """
    strata = [np.asarray(s, dtype=np.float64) for s in scores]
    generator = np.random.default_rng(seed)
    drawn = [[generator.choice(s, s.size) for s in strata] for _ in range(num_resamples)]
    return {name: _interval(of(strata), [of(sample) for sample in drawn]) for name, of in AGGREGATES.items()}


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut from either end."""
    ordered = np.sort(values.ravel())
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


AGGREGATES: dict[str, Callable[[Sequence[np.ndarray]], float]] = {
    "median": lambda strata: float(np.median([s.mean() for s in strata])),
    "IQM": lambda strata: interquartile_mean(np.concatenate(strata)),
    "mean": lambda strata: float(np.mean([s.mean() for s in strata])),
    "optimality gap": lambda strata: float(1.0 - np.minimum(np.concatenate(strata), 1.0).mean()),
}


def _interval(estimate: float, resampled: Sequence[float] | np.ndarray) -> Interval:
    low, high = np.percentile(resampled, LEVELS)
    return Interval(float(estimate), float(low), float(high))
