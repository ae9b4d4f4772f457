"""Statistics over runs: pairing, correction, matched training loss, correlation, and what counts in none of them."""

from itertools import product

import pytest

from hf_nexus.compare.analysis import compare_arms
from hf_nexus.compare.records import LossPoint, RunRecord
from hf_nexus.evaluation.statistics import equivalence_p, holm
from tests.support.comparison import against_baseline, diverge, make_record, make_records

PRIMARY = ("nexus-0.05", "ood_loss")
PLAIN = {"adamw": 0.0, "nexus-0.05": 0.0}


def analyse(records, primary=PRIMARY, where="end", **options):
    return compare_arms(records, against_baseline(*primary, where), **options)


@pytest.mark.parametrize("where", ["end", "matched"])
def test_the_family_is_the_primary_metric_of_the_arms(where):
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.01, "gamma-0": 0.01, "other": 0.02})
    analysis = analyse(records, where=where)
    primary = analysis.primary_row
    assert primary.where == where and primary.role == "primary"
    assert primary.p_holm is None and primary.p == primary.difference.p is not None
    family = [row for row in analysis.rows if row.p_holm is not None]
    assert {(row.arm, row.versus) for row in family} == {
        ("gamma-0", "adamw"), ("other", "adamw"), ("nexus-0.05", "gamma-0")
    }  # fmt: skip
    assert {(row.metric, row.where) for row in family} == {("ood_loss", where)}
    smallest = min(family, key=lambda row: row.difference.p)
    assert smallest.p == smallest.p_holm == pytest.approx(min(1.0, 3 * smallest.difference.p))
    rest = [row for row in analysis.rows if row not in (primary, *family)]
    assert rest and all(row.role == "exploratory" for row in rest)
    assert all(row.p == row.difference.p for row in rest if row.difference)


def test_a_declared_family_replaces_the_default():
    family = [against_baseline("other", "validation_loss", "matched")._replace(versus="nexus-0.05")]
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.01, "other": 0.02})
    analysis = analyse(records, family=family)
    (row,) = [row for row in analysis.rows if row.role == "family"]
    assert row.test == family[0] and row.p_holm == row.difference.p


def test_arms_without_runs_count_in_the_family():
    gains = {"adamw": 0.0, "nexus-0.05": 0.01, "other": 0.002, "third": 0.0}
    records = make_records(gains)
    whole = analyse(records)
    part = analyse([record for record in records if record.arm != "third"], arms={key: {} for key in gains})
    assert part.family == whole.family and len(whole.family) == 2
    test = ("other", "ood_loss")
    assert part.row(*test).p_holm == pytest.approx(min(1.0, 2 * part.row(*test).difference.p))
    planned = analyse(records[:8], arms={"gamma-0": {"inner_lr": 0.0}})
    assert ("nexus-0.05", "gamma-0", "ood_loss", "end") in planned.family


def test_equivalence_is_corrected_like_differences():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.0, "other": 0.001, "third": 0.002})
    analysis = analyse(records, margin=0.01)
    raw = {row.test: equivalence_p(row.difference, 0.01) for row in analysis.rows if row.difference}
    assert analysis.primary_row.p_equivalent == raw[analysis.primary_row.test]
    family = [row for row in analysis.rows if row.role == "family"]
    assert {row.test: row.p_equivalent for row in family} == holm({row.test: raw[row.test] for row in family})
    assert analysis.row("nexus-0.05", "validation_loss").p_equivalent is None
    assert all(row.p_equivalent is None for row in analyse(records).rows)


def test_a_bound_on_interpolation_shrinks_with_more_points():
    """Training losses are 4 * 0.4**step, and OOD losses their squares."""
    found = {}
    for points in (4, 13):
        records = []
        for arm, end, seed in product(("adamw", "nexus-0.05"), (3.0,), range(3)):
            end += 0.2 * (arm == "adamw") + 0.01 * seed
            losses = [4.0 * 0.4 ** (end * i / (points - 1)) for i in range(points)]
            curve = [LossPoint(i, i, {}, {}, {}, x, x, x * x) for i, x in enumerate(losses)]
            records.append(RunRecord(arm, seed, curve=curve))
        row = analyse(records).row(*PRIMARY, "matched")
        found[points] = row.interpolation
        assert 0 < abs(row.difference.mean) <= row.interpolation  # the true difference is 0
    assert found[13] < found[4] / 4


def test_two_paired_seeds_have_no_p_value():
    analysis = analyse(make_records(PLAIN, seeds=[0, 1]))
    assert all(row.difference is None or row.difference.p is None for row in analysis.rows)


def test_a_missing_seed_leaves_the_others_paired():
    records = [r for r in make_records({"adamw": 0.0, "nexus-0.05": 0.03}) if (r.arm, r.seed) != ("adamw", 1)]
    analysis = analyse(records, arms={"adamw": {}, "nexus-0.05": {}, "never-run": {}}, seeds=[0, 1, 2, 3])
    assert analysis.row(*PRIMARY).mean.n == 4 and analysis.row(*PRIMARY).difference.n == 3
    ends = {(r.arm, r.seed): r.end.ood_loss for r in records}
    expected = sum(ends["nexus-0.05", s] - ends["adamw", s] for s in (0, 2, 3)) / 3
    assert analysis.row(*PRIMARY).difference.mean == pytest.approx(expected)
    assert analysis.missing == {"adamw": [1], "never-run": [0, 1, 2, 3]}


def test_a_diverged_run_is_in_no_mean():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    without = analyse([record for record in records if (record.arm, record.seed) != ("nexus-0.05", 2)])
    assert (records[-2].arm, records[-2].seed) == ("nexus-0.05", 2)
    diverge(records[-2])
    analysis = analyse(records)
    assert analysis.row(*PRIMARY) == without.row(*PRIMARY) and analysis.row(*PRIMARY).difference.n == 3
    assert [(arm, seed) for arm, seed, _ in analysis.non_finite] == [("nexus-0.05", 2)]
    assert analysis.pairs == 3 and not [v for v in analysis.values if v[:2] == ("nexus-0.05", 2) and v[3] is not None]
    assert analysis.row("nexus-0.05", "downstream/sums/exact_match").mean.n == 3


def test_a_second_record_of_a_run_is_an_error():
    records = make_records(PLAIN)
    with pytest.raises(ValueError, match=r"Several records for \[\('adamw', 0\)\]"):
        analyse([*records, records[0]])


def test_faster_training_alone_has_no_effect_when_matched():
    """OOD loss is training loss + 1 in both arms, and one arm trains longer."""
    fast = [make_record("nexus-0.05", seed, noise=0.0) for seed in range(3)]
    slow = [make_record("adamw", seed, noise=0.0) for seed in range(3)]
    for record in slow:
        record.curve = record.curve[:-2]
    analysis = analyse(fast + slow)
    assert analysis.row(*PRIMARY).difference.mean == pytest.approx(-(4.0 * 0.4**3 - 4.0 * 0.4**5))
    assert analysis.row(*PRIMARY, "matched").difference.mean == pytest.approx(0.0, abs=1e-12)
    assert analysis.row("nexus-0.05", "train_loss", "matched") is None
    assert not analysis.unmatched and analysis.pairs == 3


def test_a_bad_arm_does_not_move_the_match_of_the_others():
    """Two runs of a seed are matched at the higher one of their final training losses."""
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    alone = analyse(records).row(*PRIMARY, "matched")
    bad = [make_record("bad", seed, train=0.5) for seed in range(4)]
    analysis = analyse([*records, *bad])
    assert analysis.row(*PRIMARY, "matched").difference == alone.difference
    ends = {r.seed: r.end.ood_loss for r in bad}
    read = {v[1]: v[4] for v in analysis.values if v[:1] + v[2:4] == ("bad", "ood_loss", "adamw")}
    assert read == pytest.approx(ends)  # the higher of the two is that of the bad arm, at its end


def test_a_run_that_never_reaches_the_target_is_unmatched():
    records = make_records(PLAIN)
    records[0].curve = records[0].curve[-1:]  # measured at its end only, which is not the highest
    for record in records[4:]:
        record.curve = record.curve[:-1]
    assert analyse(records).unmatched == [("nexus-0.05", "adamw", 0)]


def test_the_correlation_of_distance_and_gain_has_its_sign():
    """By construction, distance is 2 - 20 gain, relative to a norm of 10."""
    analysis = analyse(make_records({"adamw": 0.0, "random": 0.01, "nexus-0.05": 0.02, "nexus-0.2": 0.03}))
    assert analysis.across_arms.n == 4 and analysis.across_arms.pearson < -0.95
    assert analysis.across_arms.spearman == pytest.approx(-1)
