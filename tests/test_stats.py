"""Intervals and tests against the libraries they stand on, by simulation, and at the edges."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as distributions
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

from lib import seeds, stats

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spread(k: int, questions: int) -> list[int]:
    return [1] * k + [0] * (questions - k)


# ---------------------------------------------------------------- rates


def test_eight_of_twenty_is_22_to_61_percent() -> None:
    low, high = stats.wilson(8, 20)
    assert (round(float(low), 2), round(float(high), 2)) == (0.22, 0.61)
    population = stats.population_interval(spread(8, 20), [1] * 20)
    assert population.method == "wilson"
    assert population.low == pytest.approx(float(low), abs=0.006)
    assert population.high == pytest.approx(float(high), abs=0.006)


def test_many_one_answer_questions_are_plain_wilson() -> None:
    found = stats.population_interval(spread(4, 100), [1] * 100)
    assert (found.low, found.high) == pytest.approx(proportion_confint(4, 100, method="wilson"))


@pytest.mark.parametrize("questions", [5, 8, 20, 37, 50])
def test_one_answer_a_question_covers_at_every_rate(questions: int) -> None:
    k = np.arange(questions + 1)
    limits = [stats.population_interval(spread(int(c), questions), [1] * questions) for c in k]
    low, high = np.array([i.low for i in limits]), np.array([i.high for i in limits])
    rates = np.linspace(0.0007, 0.9993, 3001)
    inside = (low[:, None] <= rates) & (high[:, None] >= rates)
    exact = (distributions.binom.pmf(k[:, None], questions, rates) * inside).sum(axis=0)
    assert exact.min() > 0.94
    assert np.allclose(low, 1 - high[::-1])
    assert (np.diff(low) >= 0).all()


def test_clustered_answers_widen_the_interval_far_beyond_wilson() -> None:
    k, n = [50, 45, 0, 0, 2, 0, 1, 0], [50] * 8
    found = stats.population_interval(k, n)
    low, high = stats.wilson(sum(k), sum(n))
    assert found.method.startswith("korn-graubard")
    assert found.high - found.low > 2 * (high - low)
    assert found.icc > 0.5
    fixed_low, fixed_high = stats.fixed_interval(k, n)
    assert fixed_high - fixed_low < high - low
    assert fixed_low < sum(k) / sum(n) < fixed_high


def test_independent_answers_approach_clopper_pearson_from_outside() -> None:
    rng = np.random.default_rng(0)
    k = rng.binomial(20, 0.3, 200)
    found = stats.population_interval(k, [20] * 200)
    low, high = proportion_confint(k.sum(), 4000, method="beta")
    assert found.low <= low + 0.002
    assert found.high >= high - 0.002
    assert found.high - found.low < 1.35 * (high - low)
    assert abs(found.icc) < 0.03


@pytest.mark.parametrize("k", [[0] * 10, [5] * 10])
def test_all_or_none_counts_questions_not_answers(k: list[int]) -> None:
    found = stats.population_interval(k, [5] * 10)
    expected = proportion_confint(sum(k) / 5, 10, method="beta")
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.n_effective == 10
    assert math.isnan(found.icc)


def test_too_few_questions_give_no_interval() -> None:
    found = stats.population_interval([1, 2, 3, 4], [50] * 4)
    assert found.method == stats.TOO_FEW
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not math.isnan(stats.fixed_interval([1, 2, 3, 4], [50] * 4)[0])


def test_no_scored_answers() -> None:
    assert stats.population_interval([0, 0], [0, 0]).method == "no scored answers"
    assert math.isnan(stats.fixed_interval([], [])[0])
    assert math.isnan(stats.wilson(0, 0)[0])


def test_misaligned_and_aligned_are_mirror_images() -> None:
    k, n = np.array([3, 0, 9, 1, 0, 4]), np.array([10, 12, 9, 10, 11, 10])
    one, other = stats.population_interval(k, n), stats.population_interval(n - k, n)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))


def test_coverage_on_a_few_hard_cells(coverage: ModuleType) -> None:
    rng = np.random.default_rng(1)
    for shape, rate, questions, samples in itertools.product(("beta", "logit-normal"), (0.02, 0.1, 0.5), (8, 20), (5, 50)):
        own = coverage.own_rates(shape, rate, 0.3)
        k = rng.binomial(samples, rng.choice(own, (1500, questions))).astype(float)
        low, high, _ = stats.population_intervals(k, np.full_like(k, samples))
        accepted, covered = coverage.covered(low, high, rate)
        assert accepted == 1
        assert covered >= 0.925, (shape, rate, questions, samples)


def test_closed_form_of_the_bias_reduced_gee_is_that_of_statsmodels(coverage: ModuleType) -> None:
    k, m = np.array([[3.0, 0, 5, 1, 2, 4, 0, 1]]), 6
    y = np.concatenate([[1] * int(c) + [0] * (m - int(c)) for c in k[0]])
    groups = np.repeat(np.arange(8), m)
    fit = sm.GEE(y, np.ones((len(y), 1)), groups=groups, family=sm.families.Binomial()).fit(cov_type="bias_reduced")
    half = distributions.t.ppf(0.975, 7) * fit.bse[0]
    low, high = coverage.gee_bias_reduced(k, m)
    assert (low[0], high[0]) == pytest.approx((expit(fit.params[0] - half), expit(fit.params[0] + half)), rel=1e-4)


def test_benchmark_reports_cells_and_verdict(coverage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("RATES", (0.1,)), ("QUESTIONS", (8, 30)), ("SAMPLES", (1, 5)), ("ICCS", (0.0, 0.3)), ("CHANGES", ((0.1, 0.3),))):
        monkeypatch.setattr(coverage, name, few)
    outcome = coverage.simulate(200)
    assert outcome["verdict"]["cells"] == len(outcome["rates"]["data"]) - 4  # the stress test is summed up apart
    assert outcome["verdict"]["least_accepted_from_20_questions"] == 1
    assert outcome["verdict"]["least_coverage"] > 0.9
    assert set(outcome["verdict"]["candidates"]) == set(coverage.CANDIDATES)


def test_intraclass_correlation_is_found() -> None:
    rng = np.random.default_rng(2)
    size = 1 / 0.3 - 1
    k = rng.binomial(20, rng.beta(0.4 * size, 0.6 * size, 2000))
    assert stats.intraclass_correlation(k, [20] * 2000) == pytest.approx(0.3, abs=0.03)
    assert math.isnan(stats.intraclass_correlation([1, 0], [1, 1]))


def test_mean_interval_is_scipys_t_interval() -> None:
    values = np.array([10.0, 20, 35, 40, 50, np.nan])
    mean, low, high = stats.mean_interval(values)
    expected = distributions.t.interval(0.95, 4, loc=values[:5].mean(), scale=distributions.sem(values[:5]))
    assert mean == 31
    assert (low, high) == pytest.approx(expected)
    assert math.isnan(stats.mean_interval([1.0, 2.0])[1])


def test_misaligned_at_k_is_unbiased() -> None:
    rng = np.random.default_rng(3)
    found = [stats.misaligned_at_k(rng.binomial(6, 0.2, 50), [6] * 50, 4) for _ in range(300)]
    assert np.mean(found) == pytest.approx(1 - 0.8**4, abs=0.01)
    assert stats.misaligned_at_k([3], [6], 1) == pytest.approx(0.5)
    assert math.isnan(stats.misaligned_at_k([3], [6], 7))


# ---------------------------------------------------------------- changes


def test_paired_change_is_a_t_interval_on_questions_that_is_never_narrower() -> None:
    d = np.array([0.1, 0.2, 0.3, 0.1, 0.4, 0.2, 0.25, 0.5])
    found = stats.paired_change(d)
    plain = distributions.ttest_1samp(d, 0).confidence_interval()
    assert found.change == pytest.approx(d.mean())
    assert found.low <= plain.low
    assert found.high >= plain.high
    assert found.low > 0
    assert (found.n_questions, found.p, found.smallest_p) == (8, 2 / 256, 2 / 256)


def test_questions_that_one_side_did_not_answer_are_left_out() -> None:
    assert stats.paired_change([0.1, math.nan, 0.3]).n_questions == 2
    assert stats.paired_change([math.nan]).method == "no question answered by both"


@pytest.mark.parametrize("d", [[0.0] * 10, [0.5, 0, 0, 0, 0, 0, 0, 0], [0.1, 0.2, 0.3]])
def test_no_interval_with_few_changes(d: list[float]) -> None:
    found = stats.paired_change(d)
    assert found.method == (stats.TOO_FEW if len(d) < 5 else stats.TOO_FEW_CHANGED)
    assert math.isnan(found.low)


def test_changes_that_are_all_alike_have_an_exact_interval() -> None:
    found = stats.paired_change([1.0] * 10)
    assert (found.method, found.high) == (stats.ALL_ALIKE, 1.0)
    assert found.low == pytest.approx(2 * 0.025**0.1 - 1)
    # 0.8 − 0.3 and 0.9 − 0.4 differ in their last bit; that is no spread.
    assert stats.paired_change([0.8 - 0.3, 0.9 - 0.4] * 5).method == stats.ALL_ALIKE


def test_the_exact_interval_covers_the_worst_population() -> None:
    """Most questions change by 1 and the rest by −1: the rest are rarely seen, and move the mean the most."""
    rng = np.random.default_rng(0)
    for share in (0.6, 0.69, 0.8, 0.95):
        d = np.where(rng.random((4000, 10)) < share, 1.0, -1.0)
        _, low, high = stats.paired_intervals(d)
        assert ((low <= 2 * share - 1) & (2 * share - 1 <= high)).mean() >= 0.93


def test_sign_flip_is_exact() -> None:
    d = np.array([0.3, -0.1, 0.2, 0.4, 0.0, 0.15])
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))
    assert stats.sign_flip(d) == pytest.approx((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean())
    assert stats.sign_flip([0.0, 0.0]) == 1
    assert 0 < stats.sign_flip(np.full(40, 0.1)) < 0.001


def test_max_t_holds_its_level_over_steps_and_sees_an_effect() -> None:
    rng = np.random.default_rng(4)
    rejected = 0
    for _ in range(200):
        base = rng.normal(0, 0.2, 10)
        steps = rng.normal(0, 0.2, (6, 10)) - base
        rejected += bool((stats.max_t(steps) < 0.05).any())
    assert rejected / 200 < 0.09
    strong = np.vstack([rng.normal(0, 0.1, 10), rng.normal(0.6, 0.1, 10)])
    p = stats.max_t(strong)
    assert p[0] > 0.05
    assert p[1] == pytest.approx(2 / 1024)
    assert (stats.max_t(np.zeros((3, 8))) == 1).all()


def test_holm_skips_what_was_not_tested() -> None:
    adjusted = stats.holm([0.01, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.04)
    assert stats.holm([]) == []


def test_largest_drop_pays_for_the_chosen_peak() -> None:
    rng = np.random.default_rng(5)
    shape = np.array([0.0, 0.2, 0.4, 0.4, 0.4, 0.4])
    p = [stats.largest_drop(shape + rng.normal(0, 0.15, (12, 6)), seed=i, draws=500)[3] for i in range(150)]
    assert np.mean(np.array(p) < 0.05) < 0.1
    fall, peak, trough, p_fall = stats.largest_drop(np.array([0, 0.8, 0.1]) + rng.normal(0, 0.05, (10, 3)))
    assert fall == pytest.approx(0.7, abs=0.1)
    assert (peak, trough) == (1, 2)
    assert p_fall < 0.01
    assert math.isnan(stats.largest_drop(np.zeros((3, 4)))[3])
    assert stats.largest_drop(np.tile([0.1, 0.2, 0.3], (8, 1)))[0] == 0


# ---------------------------------------------------------------- seeds and planning


def test_seeds_enter_the_interval() -> None:
    rng = np.random.default_rng(6)
    questions = rng.uniform(0.1, 0.3, 12)
    alike = np.tile(questions, (3, 1))
    apart = alike + np.array([[-0.1], [0.0], [0.1]])
    _, low, high, between = seeds.pooled_over_seeds(alike)
    _, low_apart, high_apart, between_apart = seeds.pooled_over_seeds(apart)
    assert between == pytest.approx(0, abs=1e-12)
    assert between_apart == pytest.approx(0.1)
    assert high_apart - low_apart > high - low
    assert math.isnan(seeds.pooled_over_seeds(np.ones((3, 8)))[1])
    mean, low, _, _ = seeds.pooled_over_seeds(alike[:1])
    assert mean == pytest.approx(questions.mean())
    assert math.isnan(low)


def test_pooled_interval_covers_when_seeds_and_questions_vary() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        truth = 0.4 + rng.normal(0, 0.05, (4, 1)) + rng.normal(0, 0.1, (1, 12))
        rates = rng.binomial(20, np.clip(truth, 0, 1)) / 20
        _, low, high, _ = seeds.pooled_over_seeds(rates)
        hits += low <= 0.4 <= high
    assert hits / 400 > 0.93


def test_domains_need_three_seeds() -> None:
    assert math.isnan(seeds.compare_seeds([0.1, 0.2], [0.3, 0.3])[1])
    mean, low, high = seeds.compare_seeds([0.5, 0.6, 0.55], [0.2, 0.25, 0.22])
    assert low < mean < high
    assert low > 0


def test_power_is_what_simulation_gives_and_grows() -> None:
    rng = np.random.default_rng(8)
    base, difference, questions, samples, icc = 0.3, 0.25, 20, 5, 0.2

    def draw(rate: float) -> np.ndarray:
        size = 1 / icc - 1
        return rng.binomial(samples, rng.beta(rate * size, (1 - rate) * size, (3000, questions))) / samples

    d = draw(base + difference) - draw(base)
    seen = (distributions.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    told = seeds.power(difference, base, questions=questions, samples=samples, icc=icc, shared=0)
    assert told == pytest.approx(seen, abs=0.04)
    assert seeds.power(0.2, 0.1, questions=30, samples=5) > seeds.power(0.2, 0.1, questions=10, samples=5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        seeds.power(0.5, 0.8, questions=8, samples=1)
