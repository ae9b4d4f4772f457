"""Statistics of few seeds, against textbook values, against scipy's own functions, and by their properties."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_nexus.evaluation.statistics import (
    correlate,
    detectable,
    equivalence_p,
    highest_deviation,
    holm,
    mean,
    paired_difference,
    pairs_needed,
    power,
    value_at,
)

LOSSES = st.floats(0, 20, allow_subnormal=False)
SEVERAL = st.lists(LOSSES, min_size=2, max_size=8)
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=8)
P_VALUES = st.dictionaries(st.text(max_size=3), st.none() | st.floats(0, 1), max_size=12)

# Student's sleep data (1908): extra hours of sleep of ten patients under two drugs.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# Anscombe's first set (1973).
ANSCOMBE = (
    [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5],
    [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68],
)

# ---- Means and paired differences ----


def test_students_sleep_data():
    """As published in textbooks: t = -4.0621 with 9 degrees of freedom, p = 0.002833, -2.4599 to -0.7001."""
    found = paired_difference(FIRST, SECOND)
    assert found.n == 10 and found.mean == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)


def test_the_interval_of_three_values_by_hand():
    """The 97.5 % quantile of t with 2 degrees of freedom is 4.3027; the standard deviation of 1, 2, 3 is 1."""
    assert mean([1.0, 2.0, 3.0]).half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


@given(PAIRS)
def test_differences_agree_with_scipy(pairs):
    values, baseline = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    assume(max(differences) - min(differences) > 1e-6)
    expected = stats.ttest_rel(values, baseline)
    found = paired_difference(values, baseline)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6, abs=1e-9)


@given(PAIRS)
def test_p_is_below_5_percent_where_the_interval_leaves_out_0(pairs):
    found = paired_difference(*zip(*pairs, strict=True))
    assume(found.p is not None and abs(found.p - 0.05) > 1e-9)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@given(PAIRS)
def test_exchanging_the_sides_changes_the_sign_only(pairs):
    values, baseline = zip(*pairs, strict=True)
    one, other = paired_difference(values, baseline), paired_difference(baseline, values)
    assert (one.mean, one.half, one.p) == pytest.approx((-other.mean, other.half, other.p))


@given(SEVERAL, st.randoms(use_true_random=False))
def test_the_interval_contains_the_mean_in_any_order(values, chance):
    found = mean(values)
    shuffled = chance.sample(values, len(values))
    assert (found.mean, found.half) == pytest.approx((mean(shuffled).mean, mean(shuffled).half))
    assert min(values) - 1e-12 <= found.mean <= max(values) + 1e-12
    if found.half is not None:
        assert found.low <= found.mean <= found.high and found.half > 0


def test_the_interval_covers_as_often_as_it_says():
    import random

    chance = random.Random(0)
    samples = [mean([chance.gauss(5.0, 1.0) for _ in range(3)]) for _ in range(2000)]
    covered = sum(found.low <= 5.0 <= found.high for found in samples)
    assert 0.935 < covered / 2000 < 0.965


def test_one_value_has_no_interval_and_no_test():
    assert (mean([2.0]).mean, mean([2.0]).half, mean([2.0]).low) == (2.0, None, None)
    assert (paired_difference([2.0], [1.5]).mean, paired_difference([2.0], [1.5]).p) == (0.5, None)


@pytest.mark.parametrize("shift", [0.0, 0.1, -3.3])
def test_differences_that_are_all_the_same_are_no_certainty(shift):
    """Up to rounding: 1.1 + 0.1 - 1.1 is not 0.1 exactly. scipy says p = 0 or nan here."""
    baseline = [1.1, 2.3, 3.7, 1e3]
    found = paired_difference([value + shift for value in baseline], baseline)
    assert found.mean == pytest.approx(shift, abs=1e-12) and found.half is None and found.p is None


def test_small_differences_are_not_taken_for_rounding():
    assert paired_difference([1 + 1e-9, 1 + 2e-9, 1 + 3e-9], [1.0, 1.0, 1.0]).p == pytest.approx(0.0742, abs=1e-3)


# ---- Power and equivalence ----


def test_power_agrees_with_published_tables():
    """G*Power, paired t-test, two-sided, alpha 0.05: 34 pairs for d = 0.5, 199 for 0.2, 15 for 0.8 at 80 %."""
    assert [pairs_needed(d, 1.0) for d in (0.5, 0.2, 0.8)] == [34, 199, 15]
    assert power(0.5, 1.0, 34) == pytest.approx(0.8077775, abs=1e-6)


@given(st.floats(0.01, 1e3), st.integers(2, 500), st.floats(1e-4, 0.1))
def test_the_detectable_difference_has_80_percent_power(deviation, pairs, alpha):
    size = detectable(deviation, pairs, alpha)
    assert power(size, deviation, pairs, alpha) == pytest.approx(0.8, abs=1e-6)


@given(st.floats(0.2, 30), st.floats(0.1, 10))
def test_one_pair_fewer_than_needed_is_too_few(ratio, deviation):
    pairs = pairs_needed(ratio * deviation, deviation)
    assert power(ratio * deviation, deviation, pairs) >= 0.8
    assert pairs == 3 or power(ratio * deviation, deviation, pairs - 1) < 0.8


def test_without_a_difference_the_power_is_alpha():
    assert [power(0.0, 1.0, n, alpha) for n in (2, 30) for alpha in (0.05, 0.001)] == pytest.approx([0.05, 0.001] * 2)


@given(SEVERAL, st.floats(0.01, 5))
def test_equivalence_agrees_with_two_one_sided_tests(values, margin):
    assume(max(values) - min(values) > 1e-3)
    found = equivalence_p(paired_difference(values, [2.0] * len(values)), margin)
    differences = [value - 2.0 for value in values]
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert found == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)


def test_the_highest_deviation_holds_in_80_percent_of_samples():
    import random

    chance = random.Random(0)
    samples = [[chance.gauss(0.0, 1.0) for _ in range(5)] for _ in range(2000)]
    held = sum(highest_deviation(mean(sample).deviation, 5) >= 1.0 for sample in samples)
    assert 0.78 < held / 2000 < 0.82


# ---- Holm ----


def test_holm_by_hand():
    """0.005 * 4, then 0.01 * 3, then 0.03 * 2, and 0.04 * 1 is lifted to what comes before it."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_what_was_not_tested_counts_in_the_correction():
    assert holm({"a": 0.02, "b": None, "c": 0.01}) == {"a": 0.04, "b": None, "c": 0.03}
    assert holm({}) == {}


@given(P_VALUES)
def test_holm_never_lowers_keeps_the_order_and_stays_below_1(p_values):
    found = holm(p_values)
    assert list(found) == list(p_values)
    assert [key for key in found if found[key] is None] == [key for key in p_values if p_values[key] is None]
    tested = [(p, found[key]) for key, p in p_values.items() if p is not None]
    assert all(p <= corrected <= 1 for p, corrected in tested)
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(sorted(tested)))
    if tested:  # Bonferroni's bound, reached by the smallest
        assert min(tested)[1] == min(1.0, len(p_values) * min(tested)[0])


@given(P_VALUES, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(p_values, chance):
    items = list(p_values.items())
    chance.shuffle(items)
    assert holm(dict(items)) == holm(p_values)


# ---- Matched loss ----

CURVES = st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=10)


def test_between_two_points():
    """At 2.25, linear interpolation is off by 0.25 * 0.75 times the second divided difference, -0.5."""
    assert value_at([4.0, 3.0, 2.0], [8.0, 7.0, 5.0], 2.25) == (5.5, 0.09375)
    assert value_at([4.0, 3.0, 2.0], [8.0, 7.0, 5.0], 3.0) == (7.0, 0.0)
    assert value_at([4.0, 3.0, 2.0], [8.0, 7.0, 5.0], 4.0) == (8.0, 0.0)


def test_the_bound_is_that_of_the_larger_curvature():
    """The second divided differences at 3 and at 2 are -0.5 and -1.5. Around the first gap, only one is known."""
    assert value_at([4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 5.0, 0.0], 2.5) == (6.0, 0.375)
    assert value_at([4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 5.0, 0.0], 3.5) == (7.5, 0.125)


def test_without_a_third_point_the_bound_is_the_gap():
    assert value_at([4.0, 2.0], [8.0, 7.0], 3.0) == (7.5, 1.0)
    assert value_at([4.0, 2.0], [8.0, 7.0], 2.0) == (7.0, 0.0)


def test_the_bound_holds_for_a_curve_that_turns():
    """(x - 1.5) ** 2 is the same at both neighbors, and 0 between them."""
    assert value_at([3.0, 2.0, 1.0], [2.25, 0.25, 0.25], 1.5) == (0.25, 0.25)


@given(st.floats(0.3, 0.9), st.integers(3, 20), st.floats(0.01, 0.99))
def test_the_bound_holds_for_a_smooth_curve(decay, points, place):
    """OOD loss 2 + x**2 + x for the training losses x = decay**i: the curvature changes in no direction."""
    xs = [4.0 * decay**i for i in range(points)]
    target = xs[-1] + place * (xs[0] - xs[-1])
    found, bound = value_at(xs, [2 + x**2 + x for x in xs], target)
    assert abs(found - (2 + target**2 + target)) <= bound + 1e-12


def test_the_first_passage_counts_and_only_from_above():
    assert value_at([4.0, 2.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0], 3.0)[0] == 1.5
    assert value_at([2.0, 4.0, 2.0], [1.0, 2.0, 3.0], 3.0)[0] == 2.5
    assert value_at([2.0, 4.0], [1.0, 2.0], 3.0) is None


def test_what_is_never_reached_has_no_value():
    assert value_at([4.0, 3.0], [8.0, 7.0], 2.9) is None
    assert value_at([4.0, 3.0], [8.0, 7.0], 5.0) is None
    assert value_at([], [], 1.0) is None


def test_points_that_are_not_finite_are_passed_over():
    assert value_at([4.0, math.inf, math.nan, 2.0], [8.0, 1.0, 1.0, 6.0], 3.0)[0] == 7.0
    assert value_at([4.0, 3.0, 2.0], [8.0, math.nan, 6.0], 3.0)[0] == 7.0
    assert value_at([4.0, math.nan], [8.0, math.nan], 3.0) is None


@given(CURVES, LOSSES)
def test_a_matched_value_lies_between_its_neighbours(curve, target):
    found = value_at([x for x, _ in curve], [y for _, y in curve], target)
    passed = [(a, b) for a, b in itertools.pairwise(curve) if a[0] > target >= b[0]]
    if curve[0][0] == target:
        assert found == (curve[0][1], 0.0)
    elif not passed:
        assert found is None
    else:
        (_, before), (_, after) = passed[0]
        assert min(before, after) <= found[0] <= max(before, after) and found[1] >= 0


@given(CURVES, st.integers(0, 9))
def test_the_loss_matched_with_itself_is_the_target(curve, index):
    xs = [x for x, _ in curve]
    target = xs[index % len(xs)]
    found = value_at(xs, xs, target)
    assert found is None or found[0] == pytest.approx(target, rel=1e-12, abs=1e-12)
    assert found is not None or xs[0] < target


# ---- Correlation ----


def test_anscombes_first_set():
    found = correlate(*ANSCOMBE)
    assert (found.pearson, found.pearson_p, found.n) == pytest.approx((0.81642, 0.00217, 11), abs=1e-5)


def test_small_ranks_are_counted():
    """Two of all 120 orders of five are in line: p = 1/60. Of three, two of 6."""
    assert correlate([1, 2, 3, 4, 5], [1, 4, 9, 16, 26]).spearman_p == pytest.approx(1 / 60)
    assert correlate([1, 2, 3], [9, 5, 1]).spearman_p == pytest.approx(1 / 3)
    assert correlate([1, 2, 3], [9, 5, 1]).spearman == pytest.approx(-1)
    assert correlate(range(8), range(8)).spearman_p == pytest.approx(2 / math.factorial(8))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=6))
def test_correlations_agree_with_scipy(pairs):
    xs, ys = zip(*pairs, strict=True)
    found = correlate(xs, ys)
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        assert found is None
        return
    expected = stats.pearsonr(xs, ys)
    assert (found.pearson, found.pearson_p) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-9)
    assert found.spearman == pytest.approx(stats.spearmanr(xs, ys).statistic)


@settings(max_examples=5)
@given(st.permutations(range(5)))
def test_the_exact_p_value_is_that_of_a_permutation_test(ys):
    xs = range(5)
    expected = stats.permutation_test(
        (xs,), lambda x: stats.spearmanr(x, ys).statistic, permutation_type="pairings", n_resamples=10**6
    )
    assert correlate(xs, ys).spearman_p == pytest.approx(expected.pvalue)


def test_too_little_has_no_correlation():
    assert correlate([1.0, 2.0], [1.0, 2.0]) is None
    assert correlate([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
