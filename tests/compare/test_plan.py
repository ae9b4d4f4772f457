"""The plan of a comparison is computed from its configuration and from the runs that are in its folder."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_nexus.cli.app import app
from hf_nexus.compare.analysis import compare_arms
from hf_nexus.compare.config import ComparisonConfig, MinimaSearch
from hf_nexus.compare.plan import pilot_of, print_plan
from hf_nexus.evaluation.statistics import detectable, pairs_needed
from tests.support.comparison import against_baseline, make_records


def planned(config: ComparisonConfig, differences=(0.012,)) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    print_plan(config, "hf-nexus compare mine.yaml", differences, console)
    return console.export_text()


@pytest.fixture
def config(tmp_path: Path) -> ComparisonConfig:
    return ComparisonConfig.load("compare", output_dir=str(tmp_path / "out"))


def save(folder: str | Path, gains: dict[str, float], seeds) -> list:
    records = make_records(gains, seeds, noise=0.02)
    for record in records:
        record.save(Path(folder, "arms", record.arm, f"seed-{record.seed}"))
    return records


def test_a_plan_without_runs_says_what_it_cannot_know(config):
    text, arms = planned(config), len(config.arms)
    assert f"{arms} arms x 3 seeds, {3 * arms} not finished" in text
    assert f"{60 * 16 * 128:,} per run, {3 * arms * 60 * 16 * 128:,} in all runs" in text
    assert f"{2 * arms} runs, {2 * arms * 30 * 16 * 128:,} tokens" in text
    assert "device hours │ not known: no run has finished here." in text and "under 0.01" in text
    assert "Seeds that a difference needs: not known" in text and "hf-nexus compare mine.yaml --pilot" in text
    assert not Path(config.output_dir).exists()


def test_a_plan_reads_the_runs_and_the_pilot(config):
    arms = {"adamw": 0.0, "nexus-0.05": 0.0}
    records = save(config.output_dir, arms, [1]) + save(pilot_of(config).output_dir, arms, range(4, 9))
    analysis = compare_arms(records, against_baseline())
    text = planned(config)
    assert f"{3 * len(config.arms) - 2} not finished" in text
    speed = records[0].end.tokens / records[0].seconds
    left = 3 * len(config.arms) - 2
    assert f"{left * 122_880 / speed / 3600:.2g} for what is left, at {speed:,.0f} tokens/s in 12 runs" in text
    unseen, needed = [], []
    for where in ("end", "matched"):
        found = analysis.row("nexus-0.05", "ood_loss", where).difference
        assert found.n == 6
        unseen.append(f"{detectable(found.deviation, 3):.2g}")
        needed.append(f"{pairs_needed(0.012, found.deviation):,} to ")
    assert re.search(rf"differences below +│ +{unseen[0]} │ +{unseen[1]} ", text)
    assert re.search(rf"0\.012 +│ +{needed[0]}\d+ │ +{needed[1]}\d+ ", text)


def test_a_pilot_trains_the_primary_arm_on_other_seeds(config):
    pilot = pilot_of(config)
    assert set(pilot.arms) == {"adamw", "nexus-0.05"} and not {*pilot.seeds} & {*config.seeds, *config.tuning.seeds}
    assert len(pilot.seeds) == 5 and Path(pilot.output_dir).parent == Path(config.output_dir)


def test_a_pilot_has_the_minima_of_its_two_arms(config):
    primary = replace(config.primary, metric="minima_distance")
    minima = MinimaSearch(sources=["code", "records"], arms=["adamw", "gamma-0", "nexus-0.05"])
    pilot = pilot_of(replace(config, primary=primary, minima=minima))
    assert pilot.minima is not None and pilot.minima.arms is None


def test_a_large_streaming_base_is_planned_offline(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: 130m\narms: {adamw: {nexus: false}, nexus: {}}\nbaseline: adamw\nprimary: {arm: nexus}\n"
        f"seeds: [1, 2]\noutput_dir: {tmp_path / 'out'}\ntraining: {{max_steps: 12_000}}\n"
    )
    result = CliRunner().invoke(app, ["compare", str(path), "--plan", "--difference", "0.012"], terminal_width=200)
    assert result.exit_code == 0 and "3,145,728,000 per run, 12,582,912,000 in all runs" in result.output
    assert re.search(r"not known: no run has finished here. The arithmetic of", result.output)
    assert re.search(r"what is left +takes 7 on", " ".join(result.output.replace("│", " ").split()))
