"""A comparison's report: what the words say must follow from the numbers, whatever is missing among them."""

import csv
import io
import json
import math
import random
import re

import pytest
from rich.console import Console

from hf_nexus.compare.analysis import compare_arms, incomplete_arms
from hf_nexus.compare.records import LossPoint, Minima, RunRecord
from hf_nexus.compare.report import comparison_table, write_comparison
from hf_nexus.compare.words import gaps, reading

PRIMARY = ("nexus-0.05", "ood_loss")
SETTINGS = {
    "adamw": {"nexus": False},
    "gamma-0": {"nexus": True, "inner_lr": 0.0},
    "random": {"nexus": True, "inner_lr": 0.05, "inner_direction": "random"},
    "nexus-0.05": {"nexus": True, "inner_lr": 0.05},
}


def run(arm, seed, gain=0.0, *, train=0.0, noise=0.002, ood=True, minima=True):
    """A run whose OOD loss is `gain` below that of the others, up to noise; `train` is added to its training loss."""
    chance = random.Random(f"{arm} {seed}")
    level = random.Random(seed).gauss(0, 0.05)  # of the seed: what pairing takes out
    curve = []
    for i in range(6):
        base = 3.0 + 4.0 * 0.4**i + level
        text, code = base + 0.1 + chance.gauss(0, noise), base - 0.1 + chance.gauss(0, noise)
        law = base + 1.0 - gain + chance.gauss(0, noise)
        curve.append(
            LossPoint(
                step=10 * i,
                tokens=1000 * i,
                train={"text": base + train, "code": base + train},
                validation={"text": text, "code": code},
                ood={"law": law} if ood else {},
                train_loss=base + train,
                validation_loss=(text + code) / 2,
                ood_loss=law if ood else None,
            )
        )
    distance = 2.0 - 20 * gain + 5 * chance.gauss(0, noise)
    found = Minima(
        steps={"text": 5, "code": 5},
        converged={"text": True, "code": False},
        start_loss={"text": 3.0, "code": 3.0},
        end_loss={"text": 2.9, "code": 2.9},
        parameter_norm=10.0,
        to_start={"text": 1.0, "code": 1.0},
        pairwise=[("text", "code", distance)],
        positions=[0.0, 1.0],
        segments=[("text", "code", [2.9, 2.9])],
        barriers=[("text", "code", 0.0)],
    )
    return RunRecord(
        arm,
        seed,
        SETTINGS.get(arm, {"inner_lr": 0.2}),
        curve,
        cosines=[(0, [("text", "code", 0.1)]), (50, [("text", "code", 0.2 + gain + 5 * chance.gauss(0, noise))])],
        downstream={"sums/answer_loss": 1.0 + 5 * chance.gauss(0, noise), "sums/exact_match": 0.0},
        seconds=60.0,
        minima=found if minima else None,
    )


def runs(gains, seeds=range(4), **options):
    return [run(arm, seed, gain, **options) for arm, gain in gains.items() for seed in seeds]


def diverged(record, at=-1):
    """`record` with no finite loss at the end."""
    end, nan = record.curve[at], math.nan
    losses = {name: dict.fromkeys(getattr(end, name), nan) for name in ("train", "validation", "ood")}
    record.curve[at] = LossPoint(end.step, end.tokens, **losses, train_loss=nan, validation_loss=nan, ood_loss=nan)
    return record


def analyse(records, primary=PRIMARY, **options):
    return compare_arms(records, baseline="adamw", primary=primary, **options)


def write(records, folder, primary=PRIMARY, **options):
    options.setdefault("details", {"command": "hf-nexus compare", "versions": {"torch": "2.13"}, "seeds": [0, 1]})
    report = write_comparison(records, folder, baseline="adamw", primary=primary, title="A comparison", **options)
    text = report.read_text(encoding="utf-8")
    assert_tables_are_well_formed(text)
    json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return text


def assert_tables_are_well_formed(text):
    """Lines of a table have as many columns as its header, and a table stands apart from the text around it."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if "|" in block.split("\n")[0][:1]]
    assert blocks
    for block in blocks:
        assert re.fullmatch(r"\|(---\|)+", block[1])
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(widths) == 1 and all(
            line.startswith("| ") and line.endswith(" |") for line in [block[0], *block[2:]]
        )


# ---- What the words say ----


def test_a_known_effect_is_found_and_said(tmp_path):
    gains = {"adamw": 0.0, "gamma-0": 0.0, "random": 0.0, "nexus-0.05": 0.03}
    text = write(runs(gains, noise=0.0005), tmp_path)
    assert "Primary comparison: the OOD loss of nexus-0.05 is 0.0" in text and "lower than that of adamw" in text
    assert "This **supports a difference**, in favour of nexus-0.05." in text
    assert "So gamma 0 alone does not explain the effect." in text
    assert "So random direction alone does not explain the effect." in text
    assert not re.search("no effect|no conclusion", text, re.IGNORECASE)


def test_a_known_harm_is_called_so():
    said = reading(analyse(runs({"adamw": 0.0, "nexus-0.05": -0.03})))[0]
    assert "higher than that of adamw" in said and "**supports a difference**, against nexus-0.05" in said


def test_no_effect_is_said_with_what_could_not_have_been_seen(tmp_path):
    records = runs({"adamw": 0.0, "gamma-0": 0.0, "nexus-0.05": 0.0}, noise=0.02)
    text = write(records, tmp_path)
    half = analyse(records).row(*PRIMARY).difference.half
    smallest = re.search(
        r"\*\*No effect was found\*\*: a difference smaller than ([\d.]+) could not have been seen", text
    )
    assert float(smallest[1]) == pytest.approx(half, abs=1e-3)
    assert "There is no established effect that it could explain." in text
    assert "none is significant" in text and "supports a difference" not in text
    assert "Not run: a control by random direction." in text


def test_a_control_that_does_the_same_leaves_it_open():
    said = "\n".join(reading(analyse(runs({"adamw": 0.0, "random": 0.03, "nexus-0.05": 0.03}))))
    assert "it is open whether random direction explains the effect as well" in said


def test_a_control_that_does_more_is_said_to():
    said = "\n".join(reading(analyse(runs({"adamw": 0.0, "random": 0.09, "nexus-0.05": 0.03}))))
    assert "So random direction alone does more than nexus-0.05." in said


def test_two_seeds_give_no_conclusion_and_no_p_value(tmp_path):
    text = write(runs({"adamw": 0.0, "nexus-0.05": 0.03}, seeds=[0, 1]), tmp_path)
    assert "**No conclusion**" in text and "2 seeds have it for both arms, and with fewer than 3" in text
    assert not re.search(r"\bp (=|<|0)|supports a difference|is significant", text.split("## What was compared")[0])
    assert all(
        row.difference is None or row.difference.p is None for row in analyse(runs_of(*SETTINGS, seeds=[0, 1])).rows
    )


def runs_of(*arms, seeds=range(4)):
    return runs(dict.fromkeys(arms, 0.0), seeds)


def test_the_same_difference_at_every_seed_is_no_certainty():
    records = runs({"adamw": 0.0, "nexus-0.05": 0.0}, noise=0.0)
    said = reading(analyse(records))
    assert said[0].startswith("**No conclusion**") and "Do the seeds change anything" in said[0]
    assert "is significant" not in "\n".join(said)


def test_other_comparisons_are_significant_only_after_correction():
    """30 arms of pure noise: some raw p-values are below 0.05, and none may be called significant."""
    records = runs_of("adamw", *(f"arm-{i}" for i in range(30)), "nexus-0.05", seeds=range(4))
    analysis = analyse(records)
    raw = [row.difference.p for row in analysis.rows if row.difference and row.difference.p is not None]
    assert min(raw) < 0.01
    assert all(row.p_holm is None or row.p_holm >= row.difference.p for row in analysis.rows)
    assert all(row.p_holm >= 0.05 for row in analysis.rows if row.p_holm is not None)
    assert "none is significant" in "\n".join(reading(analysis))


def test_the_primary_p_value_stands_as_it_is_and_does_not_count():
    records = runs({"adamw": 0.0, "nexus-0.05": 0.01, "other": 0.01})
    analysis = analyse(records)
    assert analysis.row(*PRIMARY).p_holm is None and analysis.row(*PRIMARY).difference.p is not None
    tested = [row for row in analysis.rows if row.p_holm is not None]
    smallest = min(tested, key=lambda row: row.difference.p)
    assert smallest.p_holm == pytest.approx(min(1.0, len(tested) * smallest.difference.p))
    assert analysis.row(PRIMARY[0], PRIMARY[1], "matched").p_holm is not None


# ---- What is missing or went wrong ----


def test_a_diverged_run_is_named_and_in_no_mean(tmp_path):
    records = runs({"adamw": 0.0, "nexus-0.05": 0.03})
    whole = analyse([record for record in records if (record.arm, record.seed) != ("nexus-0.05", 2)])
    diverged(records[-2])
    assert (records[-2].arm, records[-2].seed) == ("nexus-0.05", 2)
    analysis = analyse(records)
    row, expected = (found.row(*PRIMARY) for found in (analysis, whole))
    assert row == expected and row.difference.n == 3
    assert [(arm, seed) for arm, seed, _ in analysis.non_finite] == [("nexus-0.05", 2)]
    assert analysis.targets[2][0] == "adamw"
    assert not [v for v in analysis.values if v[:2] == ("nexus-0.05", 2) and v[3] == "matched"]
    text = write(records, tmp_path)
    assert "- nexus-0.05, seed 2: diverged. Nothing of this run is in a mean or a test." in text
    assert "It holds only for runs that stay finite, and is without nexus-0.05, seed 2" in text
    assert analysis.row("nexus-0.05", "downstream/sums/exact_match").mean.n == 3
    with (tmp_path / "results.csv").open(newline="") as file:
        lost = [line for line in csv.DictReader(file) if not math.isfinite(float(line["value"]))]
    assert {(line["arm"], line["seed"]) for line in lost} == {("nexus-0.05", "2")}


def test_a_loss_that_was_not_finite_on_the_way_is_named():
    records = runs_of("adamw", "nexus-0.05")
    diverged(records[0], at=2)
    assert "adamw, seed 0: train_loss at step 20" in gaps(analyse(records))[0]


def test_a_missing_seed_leaves_the_others_paired(tmp_path):
    records = [r for r in runs({"adamw": 0.0, "nexus-0.05": 0.03}) if (r.arm, r.seed) != ("adamw", 1)]
    analysis = analyse(records, arms=["adamw", "nexus-0.05", "never-run"], seeds=[0, 1, 2, 3])
    assert analysis.row(*PRIMARY).mean.n == 4 and analysis.row(*PRIMARY).difference.n == 3
    ends = {(r.arm, r.seed): r.end.ood_loss for r in records}
    expected = sum(ends["nexus-0.05", s] - ends["adamw", s] for s in (0, 2, 3)) / 3
    assert analysis.row(*PRIMARY).difference.mean == pytest.approx(expected)
    assert analysis.missing == {"adamw": [1], "never-run": [0, 1, 2, 3]}
    text = write(records, tmp_path, arms=["never-run"], seeds=[0, 1, 2, 3])
    assert "- never-run: no run for seeds 0, 1, 2, 3." in text and "missing are adamw, seed 1" in text
    assert incomplete_arms(records, ["adamw", "x"], [0, 1]) == ["adamw (seed 1)", "x (seeds 0, 1, 2, 3)"]


def test_only_the_baseline(tmp_path):
    text = write(runs({"adamw": 0.0}), tmp_path)
    assert "**No conclusion** on the primary comparison" in text and "nexus-0.05: no run for seeds 0, 1, 2, 3." in text


def test_nothing_at_all(tmp_path):
    assert "**No conclusion**" in write([], tmp_path)


def test_without_ood_sources(tmp_path):
    records = runs({"adamw": 0.0, "nexus-0.05": 0.0}, ood=False)
    assert "**No conclusion** on the primary comparison, OOD loss" in write(records, tmp_path)
    text = write(records, tmp_path, primary=("nexus-0.05", "validation_loss"))
    assert "**No effect was found**" in text and "OOD loss of" not in text


def test_without_minima(tmp_path):
    text = write(runs({"adamw": 0.0, "nexus-0.05": 0.03}, minima=False), tmp_path)
    assert "it takes minima searches" in text and "**supports a difference**" in text


def test_searches_that_ended_at_their_bound_are_counted():
    assert any(line.startswith("8 of 16 searches") for line in gaps(analyse(runs_of("adamw", "nexus-0.05"))))


def test_mistakes_are_refused():
    records = runs_of("adamw", "nexus-0.05")
    with pytest.raises(ValueError, match=r"more for \[\('adamw', 0\)\]"):
        analyse([*records, records[0]])
    with pytest.raises(ValueError, match="both are 'adamw'"):
        analyse(records, primary=("adamw", "ood_loss"))


# ---- At matched training loss ----


def test_an_arm_that_only_trains_faster_shows_no_effect_at_matched_loss():
    """OOD loss is training loss + 1 in both arms, and one arm has got further down."""
    fast = [run("nexus-0.05", seed, noise=0.0) for seed in range(3)]
    slow = [run("adamw", seed, noise=0.0) for seed in range(3)]
    for record in slow:
        record.curve = record.curve[:-2]
    analysis = analyse(fast + slow)
    assert {arm for arm, _ in analysis.targets.values()} == {"adamw"}
    assert analysis.row(*PRIMARY).difference.mean == pytest.approx(-(4.0 * 0.4**3 - 4.0 * 0.4**5))
    assert analysis.row(*PRIMARY, "matched").difference.mean == pytest.approx(0.0, abs=1e-12)
    assert analysis.row("nexus-0.05", "train_loss", "matched") is None
    assert not analysis.unmatched


def test_the_target_is_one_for_each_seed():
    records = runs_of("adamw") + [run("nexus-0.05", seed, train=0.01 * (-1) ** seed) for seed in range(4)]
    ends = {(r.arm, r.seed): r.end.train_loss for r in records}
    targets = analyse(records).targets
    assert targets == {s: (a, ends[a, s]) for s, a in enumerate(["nexus-0.05", "adamw"] * 2)}


def test_runs_that_never_came_down_to_the_target_are_named(tmp_path):
    records = runs_of("adamw", "nexus-0.05")
    records[0].curve = records[0].curve[-1:]  # measured at its end only, which is not the highest
    for record in records[4:]:
        record.curve = record.curve[:-1]
    assert analyse(records).unmatched == [("adamw", 0)]
    assert "7 of 8 runs reached it. Not: adamw seed 0." in write(records, tmp_path)


# ---- The correlation ----


def test_the_correlation_of_distance_and_gain_has_the_right_sign():
    """By construction, distance is 2 - 20 gain, relative to a norm of 10."""
    analysis = analyse(runs({"adamw": 0.0, "random": 0.01, "nexus-0.05": 0.02, "nexus-0.2": 0.03}))
    assert analysis.across_arms.n == 4 and analysis.across_arms.pearson < -0.95
    assert analysis.across_arms.spearman == pytest.approx(-1)
    assert analysis.across_runs.n == 12 and analysis.across_runs.pearson < -0.9
    assert "Pearson's r -1.00" in "\n".join(reading(analysis)) or "Pearson's r -0.9" in "\n".join(reading(analysis))


def test_two_arms_have_no_correlation():
    assert "it takes at least 3 arms" in "\n".join(reading(analyse(runs_of("adamw", "nexus-0.05"))))


# ---- Files ----


def test_the_csv_holds_the_values_of_the_records(tmp_path):
    records = runs({"adamw": 0.0, "nexus-0.05": 0.03})
    write(records, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = {
        (line["arm"], int(line["seed"]), line["figure"]): float(line["value"])
        for line in lines
        if line["where"] == "end"
    }
    for record in records:
        end = record.end
        expected = {"train_loss": end.train_loss, "validation_loss": end.validation_loss, "ood_loss": end.ood_loss}
        expected |= {"validation/code": end.validation["code"], "ood/law": end.ood["law"]}
        expected |= {"downstream/sums/exact_match": 0.0, "gradient_cosine": record.cosines[-1][1][0][2]}
        expected |= {"minima_distance": record.minima.pairwise[0][2] / 10.0}
        assert {name: found[record.arm, record.seed, name] for name in expected} == expected
    assert {line["where"] for line in lines} == {"end", "matched"}


def test_the_json_holds_the_tables(tmp_path):
    records = runs({"adamw": 0.0, "nexus-0.05": 0.03})
    write(records, tmp_path, tuning=[{"arm": "adamw", "learning_rate": 1e-3, "validation_loss": math.inf}])
    kept = json.loads((tmp_path / "results.json").read_text())
    row = analyse(records).row(*PRIMARY)
    (same,) = [r for r in kept["analysis"]["rows"] if (r["arm"], r["figure"], r["where"]) == (*PRIMARY, "end")]
    assert same["difference"]["mean"] == row.difference.mean and same["difference"]["p"] == row.difference.p
    assert kept["details"]["versions"] == {"torch": "2.13"} and kept["tuning"][0]["validation_loss"] is None


def test_tuning_details_and_pictures_are_in_the_report(tmp_path):
    tuning = [{"arm": "adamw", "learning_rate": 1e-3, "chosen": True}, {"arm": "a|b", "inner_lr": 0.05}]
    (tmp_path / "plots").mkdir()
    text = write(
        runs_of("adamw", "nexus-0.05"),
        tmp_path,
        tuning=tuning,
        pictures=[tmp_path / "plots" / "ood against train.png"],
    )
    assert "| adamw | 0.001 | yes |  |" in text and "| a\\|b |  |  | 0.05 |" in text
    assert "](plots/ood%20against%20train.png)" in text
    assert "- command: hf-nexus compare" in text and "- versions: torch 2.13" in text
    assert "path loss that training logs is taken at displaced weights: it is not compared" in text


def test_the_console_table_shows_every_arm_and_its_difference():
    records = runs({"adamw": 0.0, "nexus-0.05": 0.03})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(records, baseline="adamw", primary=PRIMARY, arms=["never-run"]))
    text = console.export_text()
    assert all(arm in text for arm in ("adamw", "nexus-0.05", "never-run"))
    difference = analyse(records).row(*PRIMARY).difference
    assert f"{difference.mean:+.4f}, p {difference.p:.3f}" in text or f"{difference.mean:+.4f}, p < 0.001" in text
