"""The sentences of a report follow from its numbers, also if some are missing."""

import re
from dataclasses import replace

import pytest

from hf_nexus.compare import analysis as analyses
from hf_nexus.compare.analysis import compare_arms
from hf_nexus.compare.conclusions import conclusions, limitations, p_text, plain_words, rounded
from hf_nexus.evaluation.statistics import power
from tests.support.comparison import SETTINGS, against_baseline, diverge, make_records

PRIMARY = ("nexus-0.05", "ood_loss")
PLAIN = {"adamw": 0.0, "nexus-0.05": 0.0}
SHAKEN = "normalization with a perturbation in any direction alone"


def analyse(records, primary=PRIMARY, where="end", **options):
    return compare_arms(records, against_baseline(*primary, where), **options)


def concluded(records, primary=PRIMARY, **options):
    return "\n".join(conclusions(analyse(records, primary, **options)))


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0009, "p < 0.001"),
        (0.0012, "p = 0.001"),
        (0.0499, "p = 0.0499"),
        (0.0503, "p = 0.0503"),
        (0.0561, "p = 0.056"),
    ],
)
def test_a_p_value_shows_on_which_side_of_5_percent_it_is(p, text):
    assert p_text(p) == text


@pytest.mark.parametrize(
    ("half", "text"),
    [(None, "1.2346"), (2.0, "1.2346"), (0.0012, "1.2346"), (0.00012, "1.23457"), (1e-20, "1.234567891")],
)
def test_numbers_have_two_digits_of_half_the_interval(half, text):
    assert rounded(1.23456789123, half) == text


def test_a_known_effect_is_found():
    gains = {"adamw": 0.0, "gamma-0": 0.0, "random": 0.0, "nexus-0.05": 0.03}
    text = concluded(make_records(gains, noise=0.0005))
    assert re.match(r"Primary comparison. OOD loss: nexus-0.05 is 0.0\d* lower than adamw \(95 % interval -0.0", text)
    assert "This **supports a difference**, in favour of nexus-0.05." in text
    assert "So normalization alone does not give the whole effect, and whether it gives a part is open." in text
    assert not re.search("no effect|no conclusion", text, re.IGNORECASE)


def test_only_a_lower_loss_is_in_favour_of_an_arm():
    first = concluded(make_records({"adamw": 0.0, "nexus-0.05": 0.03}), primary=("nexus-0.05", "minima_distance"))
    assert "This **supports a difference**." in first.partition("\n")[0]


def test_a_known_harm_is_found():
    first = concluded(make_records({"adamw": 0.0, "nexus-0.05": -0.03})).partition("\n")[0]
    assert "higher than adamw" in first and "**supports a difference**, against nexus-0.05" in first


def test_an_inconclusive_comparison_names_what_it_could_see():
    records = make_records({"adamw": 0.0, "gamma-0": 0.0, "nexus-0.05": 0.0}, noise=0.02)
    text = concluded(records)
    smallest = re.search(r"\*\*Inconclusive\*\*: differences below ([\d.]+) could not have been seen\.", text)
    found = analyse(records).row(*PRIMARY).difference
    assert power(float(smallest[1]), found.deviation, found.n) == pytest.approx(0.8, abs=0.01)
    assert "shows no difference that this control could explain" in text
    assert "no effect" not in text.lower() and "supports a difference" not in text
    assert re.search(r"Control gamma-0 .*95 % interval, not corrected, .*, Holm-corrected p = ", text)
    assert re.search(r"at matched .*, exploratory, not corrected, p = ", text)
    assert "No control by random direction or source mixing was run." in text


def test_a_family_could_see_larger_differences_only():
    analysis = analyse(make_records({"adamw": 0.0, "gamma-0": 0.0, "nexus-0.05": 0.0}, noise=0.02))
    (control,) = [text for text in conclusions(analysis) if text.startswith("Control gamma-0")]
    smallest = re.search(r"\*\*Inconclusive\*\*: differences below ([\d.]+) could", control)
    found = analysis.row("gamma-0", "ood_loss").difference
    assert power(float(smallest[1]), found.deviation, found.n, 0.05 / 2) == pytest.approx(0.8, abs=0.01)


def explained(random, margin=None, noise=0.002):
    """The conclusions and the plain words on a gain of 0.03, and of the control by random directions."""
    records = make_records({"adamw": 0.0, "random": random, "nexus-0.05": 0.03}, range(6), noise=noise)
    analysis = analyse(records, margin=margin)
    return "\n".join(conclusions(analysis)), plain_words(analysis)


def test_a_control_with_the_same_effect_leaves_the_cause_open():
    text, plain = explained(0.03)
    assert f"So {SHAKEN} gives a part of the effect or all of it." in text
    assert plain.endswith(f"{SHAKEN} gives a part of the effect or all of it.")


def test_a_control_within_the_margin_gives_the_whole_effect():
    for random in (0.03, 0.025):  # the second differs, and by less than the margin
        text, plain = explained(random, margin=0.01, noise=0.0005)
        assert f"So {SHAKEN} gives the effect, to within 0.01." in text
        assert plain.endswith(f"{SHAKEN} gives the effect, to within 0.01.")


def test_a_difference_below_the_margin_needs_no_control():
    text, plain = explained(0.0, margin=0.5)
    assert "The difference is small, and not 0." in text
    assert "no difference that matters, which this control could explain" in text and f"So {SHAKEN}" not in text
    assert "probably real. The true difference is probably smaller than 0.5, which does not matter." in plain
    assert plain.endswith("No difference that matters was found, which they could explain.")


def test_a_control_with_a_part_of_the_effect_is_named():
    text, plain = explained(0.015)
    assert f"So {SHAKEN} gives a part of the effect, and not all of it." in text
    assert plain.endswith("alone gives a part of the effect, and not all of it.")


def test_a_noisy_control_leaves_the_cause_open():
    records = make_records({"adamw": 0.0, "random": 0.0, "nexus-0.05": 0.03}, range(6))
    for record in records[6:12]:
        end, away = record.end, 0.2 * (-1) ** record.seed
        record.curve[-1] = replace(end, ood_loss=end.ood_loss + away)
    analysis = analyse(records)
    assert f"So {SHAKEN} gives perhaps all of the effect, and perhaps nothing." in "\n".join(conclusions(analysis))
    assert plain_words(analysis).endswith("alone gives perhaps all of the effect, and perhaps nothing.")


def concluded_on(losses, **options):
    """The conclusions and the plain words on OOD losses of six seeds; an arm without losses is planned."""
    records = make_records({arm: 0.0 for arm, found in losses.items() if found}, range(6))
    for record in records:
        record.curve[-1] = replace(record.end, ood_loss=losses[record.arm][record.seed])
    analysis = analyse(records, arms={arm: SETTINGS[arm] for arm in losses}, seeds=range(6), **options)
    return "\n".join(conclusions(analysis)), plain_words(analysis)


# Losses without an effect, with one of -0.1, and with half of it, which is too noisy for a test against no effect.
BASE = [3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
FULL = [loss - 0.1 + away for loss, away in zip(BASE, (0.05, -0.05, 0.03, -0.03, 0.04, -0.04), strict=True)]
HALF = [loss + 0.05 + away for loss, away in zip(FULL, (0.01, -0.01, 0.02, -0.01, 0.01, -0.02), strict=True)]


def test_a_control_of_half_the_effect_is_not_called_none():
    text, plain = concluded_on({"adamw": BASE, "gamma-0": HALF, "nexus-0.05": FULL})
    share = "normalization alone does not give the whole effect, and whether it gives a part is open."
    assert text.count("**Inconclusive**: differences") == 1 and f"So {share}" in text and plain.endswith(share)


def test_an_opposite_or_no_effect_is_not_that_of_the_arm():
    for worse, options in ((0.05, {}), (0.002, {"margin": 0.02})):
        control = [loss + worse + away for loss, away in zip(BASE, (0.01, -0.01) * 3, strict=True)]
        text, plain = concluded_on({"adamw": BASE, "gamma-0": control, "nexus-0.05": FULL}, **options)
        assert "So normalization alone does not give the effect." in text
        assert plain.endswith("normalization alone does not give the effect.")


def test_an_equivalent_control_gives_the_whole_effect():
    """Also if its own effect is not significant after correction."""
    wide = [2 * loss - base + 0.1 for loss, base in zip(FULL, BASE, strict=True)]  # p = 0.04, not corrected
    near = [loss + away for loss, away in zip(wide, (0.001, -0.001) * 3, strict=True)]
    noisy = [loss + away for loss, away in zip(BASE, (0.3, -0.3) * 3, strict=True)]
    text, plain = concluded_on({"adamw": BASE, "gamma-0": near, "random": noisy, "nexus-0.05": wide}, margin=0.01)
    (paragraph,) = [line for line in text.split("\n") if line.startswith("Control gamma-0")]
    assert "**Inconclusive**" in paragraph and "**Equivalent**" in paragraph
    assert paragraph.endswith("So normalization alone gives the effect, to within 0.01.")
    assert "normalization alone gives the effect, to within 0.01;" in plain


def test_a_control_like_the_baseline_lacks_the_whole_effect():
    """Also if it is within the margin of the arm, which is not within that of the baseline."""
    away = (0.0001, -0.0001) * 3
    part = [loss - 0.0015 + a for loss, a in zip(BASE, away, strict=True)]
    full = [loss - 0.006 - a for loss, a in zip(BASE, away, strict=True)]
    share = "normalization alone gives a part of the effect, and not all of it."
    text, plain = concluded_on({"adamw": BASE, "gamma-0": part, "nexus-0.05": full}, margin=0.005)
    (paragraph,) = [line for line in text.split("\n") if line.startswith("Control gamma-0")]
    assert paragraph.count("**Equivalent**") == 2 and paragraph.endswith(f"So {share}") and plain.endswith(share)


def test_a_planned_control_without_runs_is_not_known():
    text, plain = concluded_on({"adamw": BASE, "gamma-0": [], "nexus-0.05": FULL})
    assert (
        "Control gamma-0 (gamma 0) shows the effect that normalization has alone. It has no runs to compare." in text
    )
    assert plain.endswith("normalization alone has an effect that is not known.")


def test_a_control_with_two_seeds_is_not_tested():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03}) + make_records({"random": 0.03}, [0, 1])
    text = concluded(records)
    assert text.count("Not tested: too few seeds.") == 2 and "significant" not in text
    assert f"So {SHAKEN} gives perhaps all of the effect, and perhaps nothing." in text


@pytest.mark.parametrize("options", [{}, {"margin": 0.02}])
def test_a_control_added_later_concludes_nothing(options):
    near = [loss + away for loss, away in zip(FULL, (0.001, -0.001) * 3, strict=True)]
    for losses in (near, HALF, [loss - 0.5 for loss in HALF]):
        losses = {"adamw": BASE, "gamma-0": losses, "nexus-0.05": FULL}
        text, plain = concluded_on(losses, family=[], **options)
        assert re.search("Control gamma-0 .*(This is only a hint|This hints)", text)
        assert "So normalization alone gives perhaps all of the effect, and perhaps nothing." in text
        assert plain.endswith("alone gives perhaps all of the effect, and perhaps nothing.")


def test_plain_words_say_that_controls_are_missing():
    assert plain_words(analyse(make_records({"adamw": 0.0, "nexus-0.05": 0.03}))).endswith(
        "No arm lacks just one ingredient of nexus-0.05, so nothing shows which of them has an effect."
    )


def test_a_baseline_may_be_a_control():
    """Its comparison is the primary one, and in no family."""
    records = make_records({"gamma-0": 0.0, "adamw": 0.01, "nexus-0.05": 0.03})
    analysis = compare_arms(records, analyses.Test("nexus-0.05", "gamma-0", "ood_loss", "end"))
    assert analysis.controls == {} and analysis.baseline_kind == "gamma 0"
    assert [test[:2] for test in analysis.family] == [("adamw", "gamma-0")]
    text = "\n".join(conclusions(analysis))
    assert "No control by random direction or source mixing" in text and "counted" not in text


def test_plain_words_of_a_difference_without_spread():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.0}, range(5))
    for record in records:
        record.curve[-1] = replace(record.end, ood_loss=2.0)
    assert plain_words(analyse(records)).endswith("is 0.0000 at every seed, which leaves nothing to test.")


def test_a_control_with_a_larger_effect_is_named():
    text = concluded(make_records({"adamw": 0.0, "random": 0.09, "nexus-0.05": 0.03}))
    assert f"So {SHAKEN} has a larger effect than nexus-0.05." in text


def test_a_control_says_what_it_shows():
    records = make_records({"adamw": 0.0, "mixed": 0.0, "nexus-0.05": 0.03})
    for record in records[4:8]:
        record.settings = {"inner_lr": 0.05, "source_schedule": "mixed", "learning_rate": 0.1}
    said = "Control mixed (source mixing) shows the effect that normalization with a walk over mixed data has alone."
    assert said in concluded(records, tuned={key: ["learning_rate"] for key in ["mixed", "nexus-0.05"]})
    without = concluded(records)
    assert "Control mixed" not in without and "The limitations say what disqualifies mixed." in without
    assert "No control by gamma 0, random direction or source mixing was run." in without
    assert "disqualifies" not in concluded(records, arms={"clean": {"inner_lr": 0.05, "source_schedule": "mixed"}})
    (line,) = [line for line in limitations(analyse(records)) if line.startswith("mixed: no control")]
    assert line == "mixed: no control of nexus-0.05, since they differ in learning_rate as well."


def test_two_seeds_give_no_conclusion_and_no_p_value():
    text = concluded(make_records({"adamw": 0.0, "nexus-0.05": 0.03}, seeds=[0, 1]))
    assert "**No conclusion** on the primary comparison: 2 paired seeds, and a test needs 3 or more." in text
    assert not re.search(r"\bp (=|<|0)|supports a difference|is significant", text)


def test_untested_comparisons_are_counted_by_reason():
    few = concluded(make_records(PLAIN, seeds=[0, 1]))
    assert re.search(r"\d+ comparisons not tested: fewer than 3 paired seeds", few)
    assert "difference is the same" not in few
    alike = concluded(make_records(PLAIN, noise=0.0))
    assert re.search(r"\d+ comparisons not tested: the difference is the same at every seed", alike)
    assert "fewer than 3" not in alike


def test_the_same_difference_at_every_seed_gives_no_conclusion():
    text = concluded(make_records(PLAIN, noise=0.0))
    assert text.startswith("**No conclusion**") and "Check that the seed changes these runs." in text
    assert "is significant" not in text


def test_only_an_equivalence_test_shows_that_arms_are_alike():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.0}, range(8))
    half = analyse(records).row(*PRIMARY).difference.half
    alike = "**Equivalent**: they differ by less than 0.01 (two one-sided t-tests, p "
    assert alike in concluded(records, margin=0.01)
    assert "**Equivalent**" not in concluded(records, margin=half / 2)
    shifted = make_records({"adamw": 0.0, "nexus-0.05": 0.012}, range(8))
    assert "**Equivalent**" not in concluded(shifted, margin=0.01)
    assert "The difference is small, and not 0." in concluded(shifted, margin=0.1)


@pytest.mark.parametrize(("p", "said"), [(0.049, "probably real"), (0.051, "the question stays open")])
def test_plain_words_follow_the_p_value(p, said):
    analysis = analyse(make_records(PLAIN))
    row = analysis.primary_row
    changed = replace(row, difference=replace(row.difference, p=p))
    assert said in plain_words(replace(analysis, rows=[changed]))


def test_plain_words_ask_for_four_times_the_seeds():
    words = plain_words(analyse(make_records({"adamw": 0.0, "nexus-0.05": 0.0}, range(30))))
    assert 110 < int(re.search(r"one half as large, about (\d+) seeds are needed", words)[1]) < 130


def test_plain_words_answer_the_question():
    def words(gain, **options):
        records = make_records({"adamw": 0.0, "nexus-0.05": gain}, range(options.pop("seeds", 8)))
        return plain_words(analyse(records, **options))

    assert "it is 0.0293 lower" in words(0.03) and "probably real" in words(0.03)
    assert "the question stays open. That is not the same as no difference" in words(0.0)
    assert "probably smaller than 0.01, which does not matter" in words(0.0, margin=0.01)
    assert "too few finished runs" in words(0.03, seeds=2)
    assert "fit their training text equally well" in words(0.03, where="matched")


def test_sparse_evaluations_are_named():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.0}, train=0.0)
    for record in records[4:]:  # trains faster, with the target between its last two points
        record.curve[-1] = replace(record.curve[-1], train_loss=record.end.train_loss - 0.5)
    (line,) = [line for line in limitations(analyse(records)) if "too sparse" in line]
    assert line.startswith("nexus-0.05 against adamw:") and "Lower `eval_steps`" in line
    assert not [line for line in limitations(analyse(make_records(PLAIN))) if "too sparse" in line]


def test_a_fifth_of_the_half_interval_is_left_to_interpolation():
    analysis = analyse(make_records(PLAIN))
    row = analysis.primary_row
    for share in (0.19, 0.21):
        changed = replace(row, interpolation=share * row.difference.half)
        named = [line for line in limitations(replace(analysis, rows=[changed])) if "too sparse" in line]
        assert len(named) == (share > 0.2)


def test_twelve_exploratory_comparisons_are_listed():
    gains = {"adamw": 0.0, **{f"arm-{i}": 0.03 for i in range(6)}, "nexus-0.05": 0.03}
    text = concluded(make_records(gains))
    found = int(re.search(r"not corrected: (\d+) below 0.05", text)[1])
    *listed, rest = [line for line in text.split("\n") if line.startswith("- ")]
    assert found > 12 == len(listed) and rest == f"- and {found - 12} more, in the tables"


def test_other_comparisons_need_the_corrected_p_value():
    """30 arms of pure noise: some raw p-values are below 0.05, and none may be called significant."""
    arms = dict.fromkeys(["adamw", *(f"arm-{i}" for i in range(30)), "nexus-0.05"], 0.0)
    analysis = analyse(make_records(arms))
    raw = [row.difference.p for row in analysis.rows if row.difference and row.difference.p is not None]
    assert min(raw) < 0.01
    assert all(row.p_holm is None or row.p_holm >= row.difference.p for row in analysis.rows)
    assert all(row.p_holm >= 0.05 for row in analysis.rows if row.p_holm is not None)
    text = "\n".join(conclusions(analysis))
    assert "supports a difference" not in text and "Declared family: 30 comparisons" in text
    assert re.search(r"exploratory comparisons, whose p-values are not corrected: \d+ below 0.05, and chance", text)


def test_a_diverged_run_is_named():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    diverge(records[-2])
    assert limitations(analyse(records))[0].startswith("nexus-0.05, seed 2: diverged.")
    for text in (concluded(records), plain_words(analyse(records))):
        assert ". It holds only for runs that stay finite; left out: nexus-0.05, seed 2." in text


@pytest.mark.parametrize(
    ("metric", "left_out"), [("train_loss", True), ("ood_loss", True), ("validation_loss", False)]
)
def test_what_the_primary_comparison_leaves_out_is_named(metric, left_out):
    analysis = analyse(make_records({"adamw": 0.0, "nexus-0.05": 0.03}))
    first = conclusions(replace(analysis, non_finite=[("nexus-0.05", 2, [metric])]))[0]
    assert ("left out: nexus-0.05, seed 2." in first) == left_out


def test_a_loss_that_is_not_finite_during_training_is_named():
    records = make_records(PLAIN)
    diverge(records[0], at=2)
    (line,) = [line for line in limitations(analyse(records)) if line.startswith("adamw, seed 0")]
    assert "train_loss at step 20" in line


def test_three_metrics_that_are_not_finite_are_named():
    few, many = ("adamw", 0, ["a", "b", "c"]), ("adamw", 1, ["a", "b", "c", "d", "e"])
    first, second = limitations(replace(analyse(make_records(PLAIN)), non_finite=[few, many]))[:2]
    assert first == "adamw, seed 0: not finite, and in no mean or test: a, b, c."
    assert second == "adamw, seed 1: not finite, and in no mean or test: a, b, c and 2 more."


def test_missing_runs_are_named():
    records = [r for r in make_records({"adamw": 0.0, "nexus-0.05": 0.03}) if (r.arm, r.seed) != ("adamw", 1)]
    planned = {"arms": {"never-run": {}}, "seeds": [0, 1, 2, 3]}
    for text in (concluded(records, **planned), plain_words(analyse(records, **planned))):
        assert ". Planned runs are missing: adamw, seed 1." in text
    assert "never-run: no run for seeds 0, 1, 2, 3." in limitations(analyse(records, **planned))


def test_changes_after_the_first_results_are_named():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03, "late": 0.0})
    analysis = analyse(records, family=[])
    assert limitations(replace(analysis, declared=(analysis.arms, analysis.seeds))) == limitations(analysis)
    changed = replace(analysis, declared=(["adamw", "nexus-0.05"], [0, 1, 4]), ignored=["old/seed-1"])
    first, second, third = limitations(changed)[:3]
    assert first == "late: added after the first results, so no comparison with it is in the family."
    assert second.startswith("Declared before the first results: seeds 0, 1, 4; now: seeds 0, 1, 2, 3.")
    assert third == "Finished runs that the configuration no longer names are in no number: old/seed-1."
    assert "The seeds are not those that were declared" in conclusions(changed)[0]


def test_the_family_counts_what_was_not_tested():
    text = concluded(
        make_records({"adamw": 0.0, "nexus-0.05": 0.03}), arms={"a": {}, "b": {}, "gamma-0": {"inner_lr": 0}}
    )
    assert "Declared family: 4 comparisons, with p-values" in text and "method. Not tested, and counted: 4." in text


def test_the_family_counts_what_has_too_few_seeds():
    text = concluded(make_records({"adamw": 0.0, "gamma-0": 0.0, "nexus-0.05": 0.03}, seeds=[0, 1]))
    assert "Declared family: 2 comparisons, with p-values" in text and "Not tested, and counted: 2." in text


def test_an_exploratory_equivalence_is_only_a_hint():
    text = concluded(make_records(PLAIN, range(8)), margin=0.01)
    assert (
        "This hints that they differ by less than 0.01 (two one-sided t-tests, exploratory, not corrected, p" in text
    )
    assert text.count("**Equivalent**") == 1


def test_searches_that_did_not_converge_are_counted():
    assert any(
        line.startswith("8 of 16 minima searches did not") for line in limitations(analyse(make_records(PLAIN)))
    )


def test_without_ood_sources_other_metrics_can_decide():
    records = make_records(PLAIN, ood=False)
    assert "**No conclusion** on the primary comparison: no seed has the OOD loss" in concluded(records)
    text = concluded(records, primary=("nexus-0.05", "validation_loss"))
    assert "**Inconclusive**: differences below" in text and "OOD loss:" not in text


def test_the_correlation_says_what_it_lacks():
    text = concluded(make_records({"adamw": 0.0, "nexus-0.05": 0.03}, minima=False))
    assert "needs minima searches" in text and "**supports a difference**" in text
    assert "needs at least 3 arms" in concluded(make_records(PLAIN))
    text = concluded(make_records({"adamw": 0.0, "random": 0.01, "nexus-0.05": 0.02, "nexus-0.2": 0.03}))
    assert re.search(r"4 arms: Pearson's r (-1\.00|-0\.9)", text)
