"""The files of a report and the console's table hold the numbers of the records."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from hf_nexus.compare.analysis import compare_arms
from hf_nexus.compare.report import console_table, write_report
from hf_nexus.plots.style import new_plot, save_plot
from tests.support.comparison import against_baseline, diverge, make_records

PRIMARY = ("nexus-0.05", "ood_loss")


def analyse(records, **options):
    return compare_arms(records, against_baseline(*PRIMARY), **options)


def write(records, folder: Path, seeds=(), **options) -> str:
    details = {"command": "hf-nexus compare", "versions": {"torch": "2.13"}, "seeds": [0, 1]}
    analysis = analyse(records, seeds=seeds)
    text = write_report(analysis, records, folder, title="A title", details=details, **options).read_text("utf-8")
    assert_tables_are_well_formed(text)
    json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return text


def assert_tables_are_well_formed(text: str) -> None:
    """Each line has as many columns as the header, and empty lines are around the table."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if "|" in block.split("\n")[0][:1]]
    assert blocks
    for block in blocks:
        assert re.fullmatch(r"\|(---\|)+", block[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
        assert all(line.startswith("| ") and line.endswith(" |") for line in [block[0], *block[2:]])


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_names_diverged_and_unmatched_runs(tmp_path):
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    diverge(records[-2])
    assert "- nexus-0.05, seed 2: diverged." in write(records, tmp_path)
    lost = [line for line in read_csv(tmp_path) if not math.isfinite(float(line["value"]))]
    assert {(line["arm"], line["seed"]) for line in lost} == {("nexus-0.05", "2")}
    records[0].curve = records[0].curve[-1:]  # measured at its end only, which is not the highest
    for record in records[4:]:
        record.curve = record.curve[:-1]
    assert "3 of 4 pairs reach it. Not: nexus-0.05 and adamw, seed 0." in write(records, tmp_path)


@pytest.mark.parametrize("gains", [{}, {"adamw": 0.0}], ids=["no run", "only the baseline"])
def test_a_report_without_the_primary_arm(gains, tmp_path):
    text = write(make_records(gains), tmp_path, seeds=[0, 1])
    assert "**No conclusion** on the primary comparison" in text and "- nexus-0.05: no run for seeds 0, 1" in text


def test_results_csv_holds_the_values_of_the_records(tmp_path):
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    write(records, tmp_path)
    lines = read_csv(tmp_path)
    found = {
        (line["arm"], int(line["seed"]), line["metric"]): float(line["value"])
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
    assert {line["where"] for line in lines} == {"end", "matched with adamw", "matched with nexus-0.05"}


def test_results_json_holds_the_statistics(tmp_path):
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    write(records, tmp_path, trials=[{"arm": "adamw", "learning_rate": 1e-3, "validation_loss": math.inf}])
    kept = json.loads((tmp_path / "results.json").read_text())
    row = analyse(records).row(*PRIMARY)
    (same,) = [r for r in kept["analysis"]["rows"] if (r["arm"], r["metric"], r["where"]) == (*PRIMARY, "end")]
    assert same["difference"]["mean"] == row.difference.mean and same["difference"]["p"] == row.difference.p
    assert kept["details"]["versions"] == {"torch": "2.13"} and kept["tuning"][0]["validation_loss"] is None


@pytest.mark.parametrize(
    ("seeds", "rates", "warned"), [(1, (1e-3, 2e-3), True), (1, (1e-3, 1e-3), False), (3, (1e-3, 2e-3), False)]
)
def test_settings_that_few_seeds_chose_are_a_limitation(tmp_path, seeds, rates, warned):
    trials = [
        {"arm": arm, "learning_rate": rate, "seeds": seeds, "validation_loss": 2.0, "chosen": True}
        for arm, rate in zip(("adamw", "nexus-0.05"), rates, strict=True)
    ]
    trials += [trials[0] | {"learning_rate": 0.5, "chosen": False}]
    text = write(make_records({"adamw": 0.0, "nexus-0.05": 0.03}), tmp_path, trials=trials)
    assert ("- The tuning chose other values of learning_rate for some arms, by 1 seed:" in text) == warned
    assert ("The tuning chose" in text) == warned


def test_the_report_shows_tuning_details_and_plots(tmp_path):
    trials = [{"arm": "adamw", "learning_rate": 1e-3, "chosen": True}, {"arm": "a|b", "inner_lr": 0.05}]
    plots = [save_plot(new_plot(1, 1), tmp_path / "plots" / "ood against train.png")]
    text = write(make_records({"adamw": 0.0, "nexus-0.05": 0.0}), tmp_path, trials=trials, plots=plots)
    assert "| adamw | 0.001 | yes |  |" in text and "| a\\|b |  |  | 0.05 |" in text
    assert "](plots/ood%20against%20train.png)" in text
    assert "- command: hf-nexus compare" in text and "- versions: torch 2.13" in text


def test_the_page_holds_the_report_and_needs_no_other_file(tmp_path):
    plots = [save_plot(new_plot(1, 1), tmp_path / "ood against train.png")]
    records = make_records({"adamw": 0.0, "nexus-0.05": 0.03})
    write(records, tmp_path, plots=plots, trials=[{"arm": "<b>", "learning_rate": 1e-3}])
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(image) for image in images] == [plots[0].read_bytes()]
    assert not re.search(r"https?:|<link|@import|url\(|src=\"(?!data:)", page)
    text = (tmp_path / "report.md").read_text()
    assert page.count("<table>") == text.count("\n|---|") and page.count("<details>") == 2
    (plain,) = re.findall(r"## In plain words\n\n(.*)\n", text)
    assert plain in page and "lower is better" in plain and "probably real" in plain
    assert "<td>&lt;b&gt;</td>" in page


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_console_table_shows_every_arm_and_its_difference(width):
    """In a narrow terminal, with fewer metrics, but never with cut names or numbers."""
    analysis = analyse(make_records({"adamw": 0.0, "nexus-0.05": 0.03, "other": 0.01}), arms={"never-run": {}})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_table(analysis, width))
    text = console.export_text()
    assert all(arm in text for arm in ("adamw", "nexus-0.05", "never-run")) and "…" not in text
    difference = analysis.row(*PRIMARY).difference
    assert "Holm p " in text
    assert f"{difference.mean:+.4f}" in text and f"p {difference.p:.3f}" in text.replace("p < 0.001", "p 0.000")
    assert ("More metrics are in the report: " in " ".join(text.split())) == (width < 200)
