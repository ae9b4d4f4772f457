"""The sentences of a report follow from its numbers, also if some are missing."""

import re
from dataclasses import replace

import pytest

from hf_nexus.compare.analysis import compare_arms
from hf_nexus.compare.conclusions import conclusions, limitations, plain_words
from hf_nexus.evaluation.statistics import power
from tests.support.comparison import diverge, make_records

PRIMARY = ("nexus-0.05", "ood_loss")
PLAIN = {"adamw": 0.0, "nexus-0.05": 0.0}


def analyse(records, primary=PRIMARY, **options):
    return compare_arms(records, baseline="adamw", primary=primary, **options)


def concluded(records, primary=PRIMARY, **options):
    return "\n".join(conclusions(analyse(records, primary, **options)))


def test_a_known_effect_is_found():
    gains = {"adamw": 0.0, "gamma-0": 0.0, "random": 0.0, "nexus-0.05": 0.03}
    text = concluded(make_records(gains, noise=0.0005))
    assert re.match(r"Primary comparison. OOD loss: nexus-0.05 is 0.0\d* lower than adamw \(95 % interval -0.0", text)
    assert "This **supports a difference**, in favour of nexus-0.05." in text
    assert "So gamma 0 alone does not explain the effect." in text
    assert "So random direction alone does not explain the effect." in text
    assert not re.search("no effect|no conclusion", text, re.IGNORECASE)


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


def explained(random, margin=None, noise=0.002):
    """The conclusions and the plain words on a gain of 0.03, and of the control by random directions."""
    records = make_records({"adamw": 0.0, "random": random, "nexus-0.05": 0.03}, range(6), noise=noise)
    analysis = analyse(records, margin=margin)
    return "\n".join(conclusions(analysis)), plain_words(analysis)


def test_a_control_with_the_same_effect_leaves_the_cause_open():
    text, plain = explained(0.03)
    assert "So random direction alone has an effect. Whether it is the whole effect is open" in text
    assert "a perturbation of the weights along any path alone gives some or all of it." in plain


def test_a_control_within_the_margin_gives_the_whole_effect():
    for random in (0.03, 0.025):  # the second differs, and by less than the margin
        text, plain = explained(random, margin=0.01, noise=0.0005)
        assert "So random direction alone gives the effect, to within 0.01." in text
        assert "is open" not in text and "does not explain" not in text
        assert "alone gives the same difference, to within 0.01." in plain


def test_a_difference_below_the_margin_needs_no_control():
    text, plain = explained(0.0, margin=0.5)
    assert "The difference is small, and not 0." in text
    assert "no difference that matters, which this control could explain" in text and "does not explain" not in text
    assert "probably real. The true difference is probably smaller than 0.5, which does not matter." in plain
    assert plain.endswith("they have no difference to explain.")


def test_a_control_with_a_part_of_the_effect_is_named():
    text, plain = explained(0.015)
    assert "So random direction alone gives a part of the effect, and not all of it." in text
    assert plain.endswith("alone gives a part of it.")


def test_a_noisy_control_leaves_the_cause_open():
    records = make_records({"adamw": 0.0, "random": 0.0, "nexus-0.05": 0.03}, range(6))
    for record in records[6:12]:
        end, away = record.end, 0.2 * (-1) ** record.seed
        record.curve[-1] = replace(end, ood_loss=end.ood_loss + away)
    analysis = analyse(records)
    assert "Whether random direction explains the effect is open" in "\n".join(conclusions(analysis))
    assert plain_words(analysis).endswith("alone gives perhaps all of it, and perhaps nothing.")


def test_plain_words_say_that_controls_are_missing():
    assert plain_words(analyse(make_records({"adamw": 0.0, "nexus-0.05": 0.03}))).endswith(
        "No arm lacks just one ingredient of nexus-0.05, so nothing shows which of them has an effect."
    )


def test_a_control_with_a_larger_effect_is_named():
    text = concluded(make_records({"adamw": 0.0, "random": 0.09, "nexus-0.05": 0.03}))
    assert "So random direction alone has a larger effect than nexus-0.05." in text


def test_a_control_says_what_it_shows():
    records = make_records({"adamw": 0.0, "mixed": 0.0, "nexus-0.05": 0.03})
    for record in records[4:8]:
        record.settings = {"inner_lr": 0.05, "source_schedule": "mixed", "learning_rate": 0.1}
    said = "Control mixed (source mixing) shows the effect that a walk over mixed data has alone."
    assert said in concluded(records, tuned={key: ["learning_rate"] for key in ["mixed", "nexus-0.05"]})
    without = concluded(records)
    assert "Control mixed" not in without and "The limitations say why mixed is not a control." in without
    (line,) = [line for line in limitations(analyse(records)) if line.startswith("mixed: no control")]
    assert line == "mixed: no control of nexus-0.05, since they differ in learning_rate as well."


def test_two_seeds_give_no_conclusion_and_no_p_value():
    text = concluded(make_records({"adamw": 0.0, "nexus-0.05": 0.03}, seeds=[0, 1]))
    assert "**No conclusion** on the primary comparison: 2 paired seeds, and a test needs 3 or more." in text
    assert not re.search(r"\bp (=|<|0)|supports a difference|is significant", text)


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
    assert "It holds only for runs that stay finite; left out: nexus-0.05, seed 2." in concluded(records)


def test_a_loss_that_is_not_finite_during_training_is_named():
    records = make_records(PLAIN)
    diverge(records[0], at=2)
    (line,) = [line for line in limitations(analyse(records)) if line.startswith("adamw, seed 0")]
    assert "train_loss at step 20" in line


def test_missing_runs_are_named():
    records = [r for r in make_records({"adamw": 0.0, "nexus-0.05": 0.03}) if (r.arm, r.seed) != ("adamw", 1)]
    planned = {"arms": {"never-run": {}}, "seeds": [0, 1, 2, 3]}
    assert "Planned runs are missing: adamw, seed 1." in concluded(records, **planned)
    assert "never-run: no run for seeds 0, 1, 2, 3." in limitations(analyse(records, **planned))


def test_changes_after_the_first_start_are_named():
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03, "late": 0.0})
    analysis = analyse(records, family=[])
    assert limitations(replace(analysis, declared=(analysis.arms, analysis.seeds))) == limitations(analysis)
    changed = replace(analysis, declared=(["adamw", "nexus-0.05"], [0, 1, 4]), ignored=["old/seed-1"])
    first, second, third = limitations(changed)[:3]
    assert first == "late: added after the first start, so no comparison with it is in the family."
    assert second.startswith("The first start declared seeds 0, 1, 4, and now there are seeds 0, 1, 2, 3.")
    assert third == "Finished runs that the configuration no longer names are in no number: old/seed-1."
    assert "The seeds are not those of the first start" in conclusions(changed)[0]


def test_the_family_counts_what_was_not_tested():
    text = concluded(
        make_records({"adamw": 0.0, "nexus-0.05": 0.03}), arms={"a": {}, "b": {}, "gamma-0": {"inner_lr": 0}}
    )
    assert "Declared family: 4 comparisons, with p-values corrected together by Holm's method. 4 of them" in text


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
    assert re.search(r"4 arms \(adamw at gain 0\): Pearson's r (-1\.00|-0\.9)", text)
