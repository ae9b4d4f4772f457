"""The numbers of studies in the documentation are those of their runs, which docs/studies/ holds."""

import csv
import itertools
import math
import re
from pathlib import Path

import pytest
from scipy import stats

from hf_nexus.evaluation.statistics import Estimate, detectable, holm, pairs_needed

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("results", "results_ladder", "results_ladder_table", "results_pilot", "evidence", "choosing")
}
RESULTS = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("results*.md")))
README = (ROOT / "README.md").read_text()
RUNGS = ("0.03M", "0.1M", "0.3M")
REPORTED = 0.012  # OOD loss, by the paper
STUDIES = sorted((ROOT / "docs" / "studies").glob("*.csv"))
HEADER = re.compile(r"^\| \w+ \| arm \| against \| pairs \| (.*) \|$")


class Study:
    """The values of the runs of a study, and differences paired by seed."""

    def __init__(self, path: Path):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.values = {(r["arm"], r["seed"], r["metric"], r["where"]): float(r["value"]) for r in rows}
        self.arms = list(dict.fromkeys(arm for arm, *_ in self.values))
        self.seeds = sorted({seed for _, seed, _, _ in self.values})

    def sides(self, arm: str, versus: str, metric: str, where: str) -> list[tuple[float, float]]:
        """The values of both arms at each seed."""
        at = ("end", "end") if where == "end" else (f"matched with {versus}", f"matched with {arm}")
        keys = [((arm, seed, metric, at[0]), (versus, seed, metric, at[1])) for seed in self.seeds]
        return [(self.values[a], self.values[b]) for a, b in keys if a in self.values and b in self.values]

    def difference(self, arm: str, versus: str, metric: str = "ood_loss", where: str = "matched") -> Estimate:
        gaps = [a - b for a, b in self.sides(arm, versus, metric, where)]
        half = stats.sem(gaps) * stats.t.ppf(0.975, len(gaps) - 1)
        assert math.isfinite(half)
        return Estimate(sum(gaps) / len(gaps), half, len(gaps), stats.ttest_1samp(gaps, 0).pvalue)


LADDER = {rung: Study(ROOT / "docs" / "studies" / f"ladder-{rung}.csv") for rung in RUNGS}
# With other seeds.
PILOTS = {rung: Study(ROOT / "docs" / "studies" / f"ladder-{rung}-pilot.csv") for rung in ("0.03M", "0.1M")}
RATE = Study(ROOT / "docs" / "studies" / "ladder-0.1M-rate.csv")  # all arms with one learning rate
CONTROLS = ("gamma-0", "random-0.2", "mixed-0.2", "follow-0.2")


def flat(text: str) -> str:
    """Text without line breaks."""
    return " ".join(text.split())


def published(study: str) -> list[tuple[str, str, str, str, str]]:
    """Arm, against, pairs, name and text of each number in the tables of a study."""
    found, columns = [], []
    for line in RESULTS.splitlines():
        columns = header[1].split(" | ") if (header := HEADER.match(line)) else columns
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == study and len(cells) == 4 + len(columns):
            found += [(*cells[1:4], name, text) for name, text in zip(columns, cells[4:], strict=True)]
    return found


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_table_holds_the_differences_of_its_runs(path):
    """The test computes the statistics from the values of the runs."""
    study, numbers = Study(path), published(path.stem)
    assert numbers
    for arm, versus, pairs, name, text in numbers:
        label, where = name.split(", ")
        metric = {"OOD loss": "ood_loss", "training loss": "train_loss", "validation loss": "validation_loss"}[label]
        found = study.difference(arm, versus, metric, where)
        digits = len(text.rpartition(".")[2])
        assert (pairs, text) == (str(found.n), f"{found.mean:+.{digits}f} ± {found.half:.{digits}f}"), (arm, versus)


def test_pages_state_the_seeds_of_the_ladder():
    counts = {rung: str(len(study.seeds)) for rung, study in LADDER.items()}
    of_gammas = counts | {"0.1M": str(len(PILOTS["0.1M"].seeds))}  # which alone has both
    for name, expected in (("evidence", counts), ("choosing", of_gammas)):
        found = re.findall(r"(0\.\d+M)(?: parameters)?,? \(?(\d+) seeds", flat(PAGES[name]))
        assert dict(found) == expected and len(found) == len(expected), name
    (found,) = re.findall(r"\(docs/results_ladder\.md\) \((\d+), (\d+) and (\d+) seeds\)", flat(README))
    assert list(found) == list(counts.values())
    declared = "{} seeds at 0.03M, {} seeds at 0.1M, and {} at 0.3M".format(*counts.values())
    assert declared in flat(PAGES["results_ladder_table"])


def test_pages_state_the_primary_comparison_of_the_ladder():
    found = [study.difference("nexus-0.2", "adamw") for study in LADDER.values()]
    text = flat(PAGES["results_ladder"])
    for rung, each in zip(RUNGS, found, strict=True):
        assert f"{each.mean:+.4f} at {rung}" in text
        assert f"{each.low:+.4f} to {each.high:+.4f}, p = {each.p:.2g}" in text
    unseen = [f"{detectable(each.deviation, each.n):.2g}" for each in found]
    assert "Differences below {}, {} and {} could not".format(*unseen) in text
    needed = [pairs_needed(REPORTED, each.deviation) for each in found]
    assert f"{REPORTED} needs {{}}, {{}} and {{}} seeds".format(*needed) in text
    assert "the rungs have {}, {} and {}.".format(*(each.n for each in found)) in text
    cells = [f"{each.mean:+.4f} ± {each.half:.4f}" for each in found]
    assert "{}, {} and {} for gamma 0.2".format(*cells) in flat(PAGES["evidence"])


def test_the_ladder_calls_faster_training_exploratory():
    small, middle = (LADDER[rung].difference("gamma-0", "adamw", "train_loss", "end") for rung in RUNGS[:2])
    assert small.mean < 0 and middle.mean < 0 and max(small.p, middle.p) < 1e-3
    at_end = f"({small.mean:+.4f} in training loss at the end, p = {small.p:.2g})"
    stated = f"0.03M {at_end} and at 0.1M ({middle.mean:+.4f}; "
    assert f"{stated}both are exploratory and not corrected)" in flat(PAGES["results_ladder"])


def equivalence(found: Estimate) -> float:
    """The p-value that a difference is below the reported one."""
    return float(stats.t.sf((REPORTED - abs(found.mean)) / (found.deviation / math.sqrt(found.n)), found.n - 1))


def test_the_ladder_excludes_a_path_as_large_as_reported():
    """On the smallest rung, where normalized gradients without a path have the whole effect."""
    smallest, text = LADDER["0.03M"], flat(PAGES["results_ladder"])
    assert smallest.difference("nexus-0.2", "adamw").high < 0
    found = [smallest.difference("nexus-0.2", control) for control in ("gamma-0", "random-0.2")]
    assert all(-REPORTED < each.low < 0 < each.high < REPORTED for each in found)
    margins = [equivalence(each) for each in found]
    assert "which was not declared before the runs, gives p = {:.2g} and {:.2g}".format(*margins) in text
    pilot = [PILOTS["0.03M"].difference("nexus-0.2", versus) for versus in ("adamw", "gamma-0")]
    cells = [f"{each.mean:+.4f} ± {each.half:.4f}" for each in pilot]
    assert "gave {} against AdamW and {} against gamma 0".format(*cells) in flat(PAGES["results_ladder_table"])


def test_the_ladder_states_its_minima_distances():
    smallest, text = LADDER["0.03M"], flat(PAGES["results_ladder"])
    arms, seeds = ("nexus-0.2", "adamw", "gamma-0", "random-0.2"), ("17", "18", "19")
    far = [[smallest.values[arm, seed, "minima_distance", "end"] for seed in seeds] for arm in arms]
    stated = "{} parameter norms apart with Nexus 0.2, {} with AdamW, {} with gamma 0 and {} with random directions"
    assert stated.format(*(f"{sum(found) / 3:.1f}" for found in far)) in text
    gap = smallest.difference("nexus-0.2", "adamw", "minima_distance", "end")
    assert f"Nexus differs from AdamW by {gap.mean:+.2f} ± {gap.half:.2f}" in text


def corrected(study: Study) -> dict[tuple[str, str], float | None]:
    """Holm's p-values of the declared family, in which tests of arms without runs count."""
    arms = [arm for arm in LADDER["0.03M"].arms if arm not in ("adamw", "nexus-0.2")]
    tests = [(arm, "adamw") for arm in arms] + [("nexus-0.2", control) for control in CONTROLS]
    return holm({test: study.difference(*test).p if {*test} <= {*study.arms} else None for test in tests})


def test_the_ladder_states_its_corrected_p_values():
    small, middle, large, pilot = (corrected(study) for study in (*LADDER.values(), PILOTS["0.1M"]))
    text, mixed, path = flat(PAGES["results_ladder"]), ("nexus-0.2", "mixed-0.2"), ("nexus-0.2", "gamma-0")
    holds = [{test for test, p in found.items() if p is not None and p < 0.05} for found in (small, large, pilot)]
    against = [(arm, "adamw") for arm in ("gamma-0", "random-0.2", "mixed-0.2", "nexus-0.05")]
    assert holds == [{mixed, *against}, set(), {mixed}]
    assert f"(Holm p = {small[mixed]:.2g} and {pilot[mixed]:.3f})" in text
    assert f"(Holm p = {pilot['nexus-0.2', 'follow-0.2']:.2f})" in text
    assert all(f"(Holm p = {small[test]:.2g})" in text for test in against)
    random = [("random-0.2", "adamw"), ("nexus-0.2", "random-0.2")]
    assert all(f"(Holm p = {middle[test]:.2g})" in text for test in (path, ("gamma-0", "adamw"), *random))
    assert "all Holm p = 1" in text and set(large.values()) == {1.0}


def test_the_ladder_finds_no_equivalence_at_the_second_rung():
    """With the margin that was declared before the runs."""
    study = LADDER["0.1M"]
    found = [study.difference("nexus-0.2", versus) for versus in ("adamw", "gamma-0")]
    assert found[1].high < 0 and min(map(equivalence, found)) > 0.05


def test_the_ladder_states_what_is_left_with_one_rate():
    text, path = flat(PAGES["results_ladder"]), ("nexus-0.2", "gamma-0")
    tests = [("gamma-0", "adamw"), ("random-0.2", "adamw"), path, ("nexus-0.2", "random-0.2")]
    p = holm({test: RATE.difference(*test).p for test in tests})
    primary = RATE.difference("nexus-0.2", "adamw")
    cells = [f"{primary.mean:+.4f} ± {primary.half:.4f} (p = {primary.p:.2g})"]
    for test in (path, ("nexus-0.2", "random-0.2")):
        found = RATE.difference(*test)
        cells.append(f"{found.mean:+.4f} ± {found.half:.4f} (Holm p = {p[test]:.2g})")
    assert "from AdamW by {}, from gamma 0 by {} and from random directions by {}".format(*cells) in text
    unseen = [RATE.difference("nexus-0.2", versus) for versus in ("adamw", "gamma-0", "random-0.2")]
    unseen = [f"{detectable(each.deviation, each.n):.2g}" for each in unseen]
    assert "Differences below {}, {} and {} could not have been seen. AdamW ends".format(*unseen) in text
    ends = [RATE.values["adamw", seed, "ood_loss", "end"] for seed in RATE.seeds]
    before = LADDER["0.1M"]
    chosen = [before.values["adamw", seed, "ood_loss", "end"] for seed in before.seeds]
    assert stats.ttest_ind(ends, chosen).pvalue < 1e-6 and sum(ends) / len(ends) < sum(chosen) / len(chosen)
    assert f"{len(RATE.seeds)} of the 55 seeds that were declared" in text


def test_the_ladder_says_which_runs_are_read_early():
    early = []
    for study in LADDER.values():
        sides = study.sides("nexus-0.2", "adamw", "ood_loss", "matched")
        ends = study.sides("nexus-0.2", "adamw", "ood_loss", "end")
        assert all((a == c) != (b == d) for (a, b), (c, d) in zip(sides, ends, strict=True))
        early += [sum(a != c for (a, _), (c, _) in zip(sides, ends, strict=True)), len(sides)]
    stated = "{} of {} pairs with AdamW at 0.03M, of {} of {} at 0.1M and of {} of {} at 0.3M".format(*early)
    assert stated in flat(PAGES["results_ladder"])


def test_the_ladder_has_only_differences_of_its_runs():
    known = set()
    for study in [*LADDER.values(), *PILOTS.values(), RATE]:
        for arm, versus in itertools.permutations(study.arms, 2):
            for metric, where in (("ood_loss", "matched"), ("ood_loss", "end"), ("train_loss", "end")):
                if study.sides(arm, versus, metric, where):
                    found = study.difference(arm, versus, metric, where)
                    known |= {f"{abs(number):.4f}" for number in (found.mean, found.half, found.low, found.high)}
    ladder_row = next(line for line in PAGES["evidence"].splitlines() if "[our ladder]" in line)
    pages = PAGES["results_ladder"] + PAGES["results_ladder_table"] + ladder_row
    pages = re.sub(r"p = [\d.e-]+( and [\d.e-]+)?", "", flat(pages))  # other tests compute them
    numbers = re.findall(r"\d\.\d{4}(?!\d)", pages)
    assert len(numbers) > 100 and [number for number in numbers if number not in known] == []


def test_the_results_state_what_the_pilot_could_not_see():
    pilot, text = Study(ROOT / "docs" / "studies" / "pilot.csv"), flat(PAGES["results_pilot"])
    end, matched = (pilot.difference("nexus-0.05", "adamw", where=where) for where in ("end", "matched"))
    assert f"of {end.deviation:.3f} at the end and {matched.deviation:.3f} at matched" in text
    assert f"five seeds could not have seen differences below {detectable(end.deviation, end.n):.3f}" in text
    needed = [pairs_needed(REPORTED, each.deviation) for each in (end, matched)]
    assert "needs {} seeds at the end, or {} at matched".format(*needed) in text
    assert f"(p = {matched.p:.3f}, exploratory)" in text


def test_the_readme_has_only_numbers_that_a_page_explains():
    """Each decimal number of the paragraph on evidence is in the results, or in what is known from others."""
    (paragraph,) = re.findall(r"- \*\*Evidence\.\*\* (.*?)(?=\n\n|\n- )", README, re.DOTALL)
    numbers = re.findall(r"\d+\.\d+", paragraph)
    sources = RESULTS + PAGES["evidence"]
    assert numbers and [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?!\d)", sources)] == []
