"""The numbers of studies in the documentation are those of their runs, which docs/studies/ holds."""

import csv
import math
import re
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "results_ladder.md"))
STUDIES = sorted((ROOT / "docs" / "studies").glob("*.csv"))
HEADER = re.compile(r"^\| \w+ \| arm \| against \| pairs \| (.*) \|$")


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
    with path.open(newline="") as file:
        values = {(r["arm"], r["seed"], r["metric"], r["where"]): float(r["value"]) for r in csv.DictReader(file)}
    seeds = sorted({seed for _, seed, _, _ in values})
    numbers = published(path.stem)
    assert numbers
    for arm, versus, pairs, name, text in numbers:
        label, where = name.split(", ")
        metric = {"OOD loss": "ood_loss", "training loss": "train_loss", "validation loss": "validation_loss"}[label]
        at = ("end", "end") if where == "end" else (f"matched with {versus}", f"matched with {arm}")
        keys = [((arm, seed, metric, at[0]), (versus, seed, metric, at[1])) for seed in seeds]
        gaps = [values[one] - values[other] for one, other in keys if one in values and other in values]
        half = stats.sem(gaps) * stats.t.ppf(0.975, len(gaps) - 1)
        assert math.isfinite(half) and str(len(gaps)) == pairs, (arm, versus, name)
        digits = len(text.rpartition(".")[2])
        assert text == f"{sum(gaps) / len(gaps):+.{digits}f} ± {half:.{digits}f}", (arm, versus, name)


def test_the_readme_has_only_numbers_that_a_page_explains():
    """Each decimal number of the paragraph on evidence is in the results, or in what is known from others."""
    (paragraph,) = re.findall(r"- \*\*Evidence\.\*\* (.*?)(?=\n\n|\n- )", (ROOT / "README.md").read_text(), re.DOTALL)
    numbers = re.findall(r"\d+\.\d+", paragraph)
    sources = RESULTS + (ROOT / "docs" / "evidence.md").read_text()
    assert numbers and [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?!\d)", sources)] == []
