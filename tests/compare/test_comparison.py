"""A whole comparison: errors before any run, its stages and files, and continuing after an interruption."""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from rich.console import Console

from hf_nexus.cli.app import main
from hf_nexus.compare import benchmarks
from hf_nexus.compare import comparison as module
from hf_nexus.compare.comparison import Comparison
from hf_nexus.compare.config import ComparisonConfig
from hf_nexus.compare.records import RECORD_NAME, RunRecord
from hf_nexus.compare.workers import Call, CallResult
from hf_nexus.hub.run_summary import RunSummary
from hf_nexus.plots.style import new_plot, save_plot
from tests.support import lm_eval as support
from tests.support.comparison import ARMS, comparison_fields, diverge, make_comparison
from tests.support.hub.server import ALICE, HubServer
from tests.support.tiny_config import write_config

MINIMA = {"max_steps": 4, "eval_steps": 2, "eval_rows": 2, "grid": 3, "seeds": [1]}
TUNING = {"grid": {"learning_rate": [1e-5, 1e-2]}, "max_steps": 2}
# Two evaluations of a short run: what a run measures is tested in test_runs.
SHORT = {"max_steps": 4, "eval_steps": 2, "eval_on_start": False, "save_strategy": "no"}
pytestmark = pytest.mark.usefixtures("plots_not_drawn")
stand_in = support.stand_in  # the fixture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def without_workers(calls: Sequence[Call], workers: int) -> Iterator[CallResult]:
    """Makes the calls in this process; those whose folder holds `fail.txt` fail."""
    for call in calls:
        if (call.log.parent / "fail.txt").exists():
            yield CallResult(call, error="RuntimeError: out of luck")
            continue
        try:
            yield CallResult(call, call.function())
        except RuntimeError as error:
            yield CallResult(call, error=f"RuntimeError: {error}")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "call_in_workers", without_workers)


def save_blank(records: Sequence[RunRecord], folder: Path, baseline: str) -> list[Path]:
    return [save_plot(new_plot(1, 1), folder / "losses.png")]


def run(config: ComparisonConfig) -> tuple[Comparison, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    comparison = Comparison(config, console)
    comparison.check()
    comparison.run()
    return comparison, console.export_text()


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ComparisonConfig, str]:
    """A comparison that was run, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call_in_workers", without_workers)
        patch.setattr(module, "plot_comparison", save_blank)
        output = tmp_path_factory.mktemp("run") / "out"
        config = make_comparison(base, output, training=SHORT, minima=MINIMA, tuning=TUNING)
        return config, run(config)[1]


@pytest.fixture
def copied(finished: tuple[ComparisonConfig, str], tmp_path: Path) -> ComparisonConfig:
    """The finished comparison in another folder: its runs count as finished there."""
    return replace(finished[0], output_dir=str(shutil.copytree(finished[0].output_dir, tmp_path / "moved")))


@pytest.mark.slow
def test_minima_are_searched_from_the_chosen_runs(copied, monkeypatch):
    """Those of runs that are chosen later are added, and found ones are kept."""
    searched: list[str] = []

    def record(calls: Sequence[Call], workers: int) -> Iterator[CallResult]:
        searched.extend(call.name for call in calls)
        return iter(())

    monkeypatch.setattr(module, "call_in_workers", record)
    wider = replace(copied, minima=replace(copied.minima, arms=["nexus"], seeds=[1, 2]))
    run(wider)
    assert searched == ["minima of nexus seed 2"]


def test_a_schedule_that_is_longer_than_the_runs_is_named(base, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    decay = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}}
    Comparison(make_comparison(base, tmp_path, training=SHORT | decay), console).check()
    assert "arms.adamw: The run ends before its schedule" in console.export_text()


def test_several_processes_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Start it as one process"):
        Comparison(make_comparison(base, tmp_path), Console(quiet=True)).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS | {"x": {"max_steps": 7}}}, "must train on the same number of rows"),
        (
            {"tuning": {"grid": {"load_best_model_at_end": [False, True]}}},
            r"^arms\.adamw with .*: .*requires the save",
        ),
        ({"arms": ARMS | {"nexus": {"load_best_model_at_end": True}}}, r"^arms\.nexus: .*requires the save"),
        ({"minima": {"sources": ["letters", "signs"]}}, "signs.* are not among the training sources"),
        ({"question_sets": {"quiz": {"path": "no/such.jsonl"}}}, "no/such.jsonl"),
        ({"training": {"load_best_model_at_end": True}}, r"^arms\.adamw: load_best_model_at_end"),
        ({"training": {"label_smoothing_factor": 0.1}}, r"^arms\.adamw: label_smoothing_factor is not supported"),
        ({"training": {"save_only_model": True}}, r"^arms\.adamw: save_only_model is not supported"),
        ({"training": {"fsdp": True, "gradient_cosine_steps": 0}}, r"^arms\.adamw: fsdp .* devices_per_run"),
        ({"primary": {"arm": "nexus", "metric": "minima_distance"}}, "'minima_distance' is not measured"),
        ({"primary": {"arm": "nexus", "metric": "downstream/quiz/acc"}}, "'downstream/quiz/acc' is not measured"),
        ({"family": [{"arm": "nexus", "metric": "ood/letters"}]}, "'ood/letters' is not measured"),
        (
            {
                "arms": {"adamw": ARMS["adamw"] | {"fsdp": True, "gradient_cosine_steps": 0}, "nexus": ARMS["nexus"]},
                "training": {"use_cpu": True},
                "devices_per_run": 2,
                "primary": {"arm": "nexus", "metric": "gradient_cosine"},
            },
            "'gradient_cosine' is not measured",
        ),
    ],
)
def test_errors_are_found_before_any_run(base, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        Comparison(make_comparison(base, tmp_path, **changes), Console(quiet=True)).check()
    assert not (tmp_path / "arms").exists()


@pytest.mark.parametrize(
    ("kept", "message"),
    [("letters digits", "'ood_loss' is not measured"), ("signs", "no training source has held-out rows")],
)
def test_losses_without_held_out_rows_are_refused(base, tmp_path, kept, message):
    content = yaml.safe_load(base.read_text())
    sources = content["data"]["sources"]
    for name in sources.keys() - kept.split():
        if name == "signs":
            del sources[name]
            break
        del sources[name]["eval_rows"]
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        Comparison(make_comparison(path, tmp_path / "out"), Console(quiet=True)).check()


def test_all_arms_must_read_the_same_rows_of_streams(base, tmp_path):
    content = yaml.safe_load(base.read_text())
    for source in content["data"]["sources"].values():
        source |= {"streaming": True, "weight": 1} if "role" not in source else {}
    path = tmp_path / "streams.yaml"
    path.write_text(yaml.safe_dump(content))

    def check(source: Path, rows: int, accumulated: int) -> None:
        arm = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
        config = make_comparison(source, tmp_path, arms=ARMS | {"other": arm}, training=training)
        Comparison(config, Console(quiet=True))._check_settings()

    check(path, 16, 2)
    check(base, 4, 8)
    with pytest.raises(ValueError, match=r"arms\.adamw and arms\.other would train on other rows of streaming"):
        check(path, 4, 8)


@pytest.mark.parametrize(("changes", "same"), [({"gradient_accumulation_steps": 2}, True), ({}, False)])
def test_arms_of_as_many_epochs_train_on_as_many_rows(base, tmp_path, changes, same):
    """At any batch size. Twice as many epochs of batches of half the size are other rows."""
    arm = {"per_device_train_batch_size": 2} | (changes or {"per_device_train_batch_size": 1, "num_train_epochs": 2})
    training = {"max_steps": -1, "num_train_epochs": 1, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    config = make_comparison(base, tmp_path, arms=ARMS | {"other": arm}, training=training)
    with nullcontext() if same else pytest.raises(ValueError, match=r"same number of rows, not .*of 2 epochs"):
        Comparison(config, Console(quiet=True))._check_settings()


CONTROL = {"gamma-0": {"inner_lr": 0.0}}


@pytest.fixture
def declare(base, tmp_path):
    """Declares a comparison in a folder as its start does, and returns what the folder has declared."""

    def declare(arms=CONTROL, **changes):
        comparison = Comparison(make_comparison(base, tmp_path, arms=ARMS | arms, **changes), Console(quiet=True))
        comparison._declare()
        return comparison._declared()

    return declare


def finish_a_run(output: Path) -> None:
    folder = output / "arms" / "adamw" / "seed-1"
    folder.mkdir(parents=True)
    (folder / RECORD_NAME).touch()


def test_the_primary_comparison_cannot_change(declare, tmp_path):
    declare()
    finish_a_run(tmp_path)
    assert declare(primary={"arm": "nexus", "metric": "ood_loss", "versus": "adamw"}) == declare(seeds=[1, 2, 3, 4])
    for changes, message in (
        (
            {"primary": {"arm": "nexus", "metric": "validation_loss"}},
            "primary: nexus against adamw, ood_loss (end) was",
        ),
        ({"primary": {"arm": "nexus", "where": "matched"}}, "primary: nexus against adamw, ood_loss (end) was"),
        ({"baseline": "gamma-0"}, "primary: nexus against adamw, ood_loss (end) was"),
        ({"equivalence_margin": 0.1}, "equivalence_margin: None was"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)} declared. .* chosen after seeing results"):
            declare(**changes)


def test_the_family_is_that_of_the_first_results(declare, tmp_path):
    first = declare()
    finish_a_run(tmp_path)
    assert len(first["tests"]) == 2 and first["arms"] == ["adamw", "nexus", "gamma-0"]
    assert declare(CONTROL | {"other": {"inner_lr": 0.2}}, seeds=[1, 2, 3, 4]) == first
    assert declare(dict(reversed(CONTROL.items()))) == first
    test, tests = (
        {"arm": "nexus", "metric": "validation_loss"},
        [{"arm": "gamma-0"}, {"arm": "nexus", "versus": "gamma-0"}],
    )
    for changes, message in (
        ({"arms": {}}, "arms: gamma-0 is missing"),
        ({"arms": {"renamed": {"inner_lr": 0.0}}}, "arms: gamma-0 is missing"),
        ({"arms": {"gamma-0": {"inner_lr": 0.1}}}, "family: nexus against gamma-0, ood_loss (end) is missing"),
        ({"family": [test, *tests]}, "family: nexus against adamw, validation_loss (end) is new"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}. {re.escape(str(tmp_path))} has finished runs"):
            declare(**changes)


def test_everything_may_change_before_the_first_results(declare):
    declare()
    assert declare({"renamed": {"inner_lr": 0.0}})["arms"] == ["adamw", "nexus", "renamed"]
    assert declare({}, equivalence_margin=0.1)["tests"] == []
    assert (
        declare(primary={"arm": "nexus", "metric": "train_loss"})["primary"] == "nexus against adamw, train_loss (end)"
    )


@pytest.mark.parametrize(
    "content", [None, "", "[]", pytest.param("[" * 100_000, id="nested"), '{"arm": "nexus", "metric": "ood_loss"}']
)
def test_a_damaged_declaration_is_named(declare, tmp_path, content):
    finish_a_run(tmp_path)
    if content is not None:
        (tmp_path / "declared.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'declared.json'))}: it does not say what was"):
        declare()


def test_a_report_names_what_was_added_and_removed(copied, monkeypatch):
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: [])
    more = replace(copied, seeds=[1, 2, 4], arms=copied.arms | {"late": copied.arms["nexus"]})
    shutil.copytree(Path(copied.output_dir, "tuning", "nexus"), Path(copied.output_dir, "tuning", "late"))
    comparison = Comparison(more, Console(quiet=True))
    for run in comparison._trial_runs():
        run.write()
    text = comparison.report().read_text()
    assert "- late: added after the first results" in text
    assert "- Declared before the first results: seeds 1, 2, 3; now: seeds 1, 2, 4." in text
    assert "no longer names are in no number: adamw/seed-3, nexus/seed-3." in text


def test_a_comparison_tunes_runs_and_searches(finished):
    config, printed = finished
    output = Path(config.output_dir)
    check_results(output)
    assert "](losses.png)" in (output / "report.md").read_text()
    for stage in ("tuning: 0 of 4 done, 4 to do", "runs: 0 of 6 done, 6 to do", "minima: 0 of 2 done, 2 to do"):
        assert stage in printed


def check_results(output: Path) -> None:
    rows = list(csv.DictReader((output / "results.csv").open()))
    for arm in ARMS:
        for seed in (1, 2, 3):
            record = RunRecord.load(output / "arms" / arm / f"seed-{seed}")
            assert record.settings["learning_rate"] == 1e-2  # 1e-5 barely learns
            assert (record.minima is not None) == (seed == 1)
            key = (arm, str(seed), "ood_loss", "end")
            (value,) = [row["value"] for row in rows if (row["arm"], row["seed"], row["metric"], row["where"]) == key]
            assert float(value) == pytest.approx(record.end.ood_loss)
    chosen = [trial for trial in json.loads((output / "tuning.json").read_text()) if trial["chosen"]]
    assert [trial["learning_rate"] for trial in chosen] == [1e-2, 1e-2]
    card = (output / "arms" / "nexus" / "seed-1" / "README.md").read_text()
    assert "The last columns compare with adamw" in card
    assert "The last columns" not in (output / "arms" / "adamw" / "seed-1" / "README.md").read_text()
    assert "no conclusion" not in (output / "report.md").read_text().lower()


def test_only_missing_runs_are_run_again(copied, in_process, monkeypatch):
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: [])
    lost = Path(copied.output_dir, "arms", "nexus", "seed-2")
    kept = json.loads((lost / RECORD_NAME).read_text())
    shutil.rmtree(lost)
    _, printed = run(copied)
    assert "runs: 5 of 6 done, 1 to do" in printed and "6/6  nexus seed 2" in printed
    assert "tuning:" not in printed and "minima:" not in printed
    assert json.loads((lost / RECORD_NAME).read_text())["curve"] == kept["curve"]


def test_runs_are_made_one_at_a_time(copied, in_process, monkeypatch):
    """As on several machines: each has its own comparison in the same folder."""
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: [])
    output = Path(copied.output_dir)
    results = (output / "results.csv").read_text()
    for name in ("arms/nexus/seed-2", "tuning/nexus/trial-0"):
        shutil.rmtree(output / name)
    (output / "results.csv").unlink()
    made = []
    for name in ("tuning/nexus/trial-0/seed-0", "nexus/seed-2", "nexus/seed-2"):
        comparison = Comparison(copied, console := Console(width=200, record=True, file=io.StringIO()))
        if not made:
            with pytest.raises(ValueError, match=r"'nexus/seed-22' is not a run\. Did you mean 'nexus/seed-2'"):
                comparison.run_one("nexus/seed-22")
            for call in (comparison.report, partial(comparison.run_one, "nexus/seed-2")):
                with pytest.raises(ValueError, match="tuning: 1 runs are missing, the first is 'tuning/nexus/trial-0"):
                    call()
        comparison.run_one(name)
        made.append(console.export_text().count("run: 0 of 1 done"))
    assert made == [1, 1, 0]
    comparison.report()
    assert (output / "results.csv").read_text() == results


def test_no_run_starts_while_a_trial_is_missing(copied, in_process):
    """Otherwise an arm would choose among fewer trials, and among others if the command is repeated."""
    output = Path(copied.output_dir)
    failing = output / "tuning" / "nexus" / "trial-1" / "seed-0"
    (failing / RECORD_NAME).unlink()
    (failing / "fail.txt").touch()
    shutil.rmtree(output / "arms")
    with pytest.raises(ValueError, match=r"tuning: 1 runs are missing, the first is 'tuning/nexus/trial-1/seed-0'"):
        run(copied)
    assert not (output / "arms").exists()


def test_a_trial_that_diverged_is_not_chosen(copied):
    output = Path(copied.output_dir)
    shutil.rmtree(output / "arms")
    for trial, message in (("trial-1", None), ("trial-0", "All trials of nexus diverged")):
        folder = output / "tuning" / "nexus" / trial / "seed-0"
        record = RunRecord.load(folder)
        diverge(record)
        record.save(folder)
        comparison = Comparison(copied, Console(quiet=True))
        if message is None:
            comparison._choose()
            assert comparison._chosen == {"adamw": {"learning_rate": 1e-2}, "nexus": {"learning_rate": 1e-5}}
        else:
            with pytest.raises(SystemExit, match=message):
                comparison._choose()


@pytest.mark.parametrize("tuning", [None, TUNING])
def test_a_report_of_a_mistyped_folder_is_refused(base, tmp_path, tuning):
    folder = tmp_path / "typo"
    comparison = Comparison(make_comparison(base, folder, tuning=tuning), Console(quiet=True))
    with pytest.raises(ValueError, match=f"^--report: no run has finished in {re.escape(str(folder))}"):
        comparison.report()
    assert not folder.exists()


def test_a_run_that_another_process_trains_is_refused(copied, hold):
    (Path(copied.output_dir, "arms", "nexus", "seed-2") / RECORD_NAME).unlink()
    comparison = Comparison(copied, Console(quiet=True))
    comparison._choose()
    run = next(run for run in comparison.runs() if run.name == "nexus/seed-2")
    process = hold(run.folder)
    with pytest.raises(ValueError, match=f"is used by process {process.pid} "):
        run.train()


def test_failed_runs_are_named_and_the_rest_is_reported(copied, in_process, monkeypatch):
    failing = Path(copied.output_dir, "arms", "nexus", "seed-3")
    (failing / RECORD_NAME).unlink()
    (failing / "fail.txt").touch()
    for folder in (failing, failing.with_name("seed-2")):  # as of runs that skipped inner steps
        summary = RunSummary.load(folder)
        summary.mixture = [replace(row, tokens=row.tokens // 2) for row in summary.mixture]
        summary.save(folder)
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: 1 / 0)
    comparison, printed = run(copied)
    assert [result.call.name for result in comparison.failed] == ["nexus seed 3"]
    assert "FAILED: RuntimeError: out of luck" in printed
    assert "Plots failed: ZeroDivisionError" in printed
    assert printed.count("is not compared") == printed.count("The card of nexus seed 2 is not compared") == 1
    report = Path(copied.output_dir, "report.md").read_text()
    assert "seed 3" in report
    assert "no conclusion" in report.lower()  # two pairs of seeds are left


def test_runs_are_scored_on_benchmarks(copied, in_process, monkeypatch, stand_in, tmp_path):
    """Scores enter records, statistics and cards. A task that failed is run again."""
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: [])
    monkeypatch.setattr(benchmarks, "require_lm_eval", lambda: None)
    (tmp_path / "sums.yaml").write_text("task: sums")
    results = json.dumps(support.raw("sums", "acc,none"))
    code = f"""
    results, model = json.loads({results!r}), settings["model_args"]["pretrained"]
    if "seed-3" in model and not os.path.exists({str(tmp_path / "again")!r}):
        sys.exit("no luck")
    results["results"]["sums"]["acc,none"] = 0.25 + 0.5 * ("nexus" in model) + 0.01 * int(model[-1])
    succeed(results)
    """
    stand_in(code)
    config = replace(copied, benchmarks=[str(tmp_path / "sums.yaml")])
    comparison, printed = run(config)
    assert "benchmarks: 0 of 6 done, 6 to do" in printed and "sums/acc 76" in printed
    assert sorted(r.call.name for r in comparison.failed) == [f"benchmarks of {arm} seed 3" for arm in ARMS]
    (tmp_path / "again").touch()
    comparison, printed = run(config)
    assert "benchmarks: 4 of 6 done, 2 to do" in printed and not comparison.failed
    rows = list(csv.DictReader((Path(config.output_dir) / "results.csv").open()))
    key = ("nexus", "2", "downstream/sums/acc", "end")
    (row,) = [row for row in rows if (row["arm"], row["seed"], row["metric"], row["where"]) == key]
    assert float(row["value"]) == pytest.approx(77)
    report = Path(config.output_dir, "report.md").read_text()
    assert "sums/acc" in report and "50" in report
    assert "sums" in Path(config.output_dir, "arms", "nexus", "seed-1", "README.md").read_text()
    assert "benchmarks:" not in run(config)[1]
    record = RunRecord.load(Path(config.output_dir, "arms", "nexus", "seed-1"))
    for limit, missing in ((None, []), (100, ["sums"])):
        part = replace(record, benchmarks={"sums": limit})
        assert [task.name for task in benchmarks.missing_tasks(config, part)] == missing


def test_a_part_of_a_benchmark_is_scored_again(copied, in_process, monkeypatch, stand_in):
    """Scores on the first examples are not those on all."""
    monkeypatch.setattr(benchmarks, "require_lm_eval", lambda: None)
    stand_in("succeed()")
    comparison = Comparison(replace(copied, benchmarks=["gsm8k"]), Console(quiet=True))
    comparison._choose()
    run = next(run for run in comparison.runs() if run.name == "nexus/seed-1")
    record = run.load()
    record.benchmarks, record.downstream = {"gsm8k": 100}, {"gsm8k/exact_match": 7.0}
    record.save(run.folder)
    found = benchmarks.score_benchmarks(run)
    assert found.benchmarks == {"gsm8k": None} and found.downstream == {"gsm8k/exact_match": pytest.approx(41.2)}


def test_scores_on_parts_are_not_compared_with_those_on_all(copied, monkeypatch):
    monkeypatch.setattr(module, "plot_comparison", lambda *args, **kwargs: [])
    config, scores = replace(copied, benchmarks=["gsm8k"]), ["gsm8k/exact_match", "mmlu/acc"]
    for folder in Path(config.output_dir, "arms").glob("*/seed-*"):
        record = RunRecord.load(folder)
        record.benchmarks = {"gsm8k": 100 if folder.name == "seed-1" else None, "mmlu": 100}
        record.downstream = dict.fromkeys(scores, 7.0)
        record.save(folder)
    Comparison(config, Console(quiet=True)).report()
    rows = list(csv.DictReader(Path(config.output_dir, "results.csv").read_text().splitlines()))
    found = [{row["seed"] for row in rows if row["metric"] == f"downstream/{name}"} for name in scores]
    assert found == [{"2", "3"}, {"1", "2", "3"}]


def test_every_filter_of_a_benchmark_has_its_own_score(copied, monkeypatch, stand_in):
    results = support.raw("gsm8k_cot", "exact_match,strict-match", 0.25)
    results["results"]["gsm8k_cot"] |= {"exact_match,flexible-extract": 0.5, "acc,none": 0.75}
    stand_in(f"succeed(json.loads({json.dumps(results)!r}))")
    comparison = Comparison(replace(copied, benchmarks=["gsm8k_cot"]), Console(quiet=True))
    comparison._choose()
    scores = {"exact_match,strict-match": 25.0, "exact_match,flexible-extract": 50.0, "acc": 75.0}
    found = benchmarks.score_benchmarks(comparison.runs()[0]).downstream
    assert found == {f"gsm8k_cot/{name}": pytest.approx(value) for name, value in scores.items()}


def test_a_question_set_named_like_a_benchmark_is_refused(base, tmp_path):
    config = make_comparison(base, tmp_path, benchmarks=["gsm8k"], question_sets={"gsm8k": {"path": "no.jsonl"}})
    with pytest.raises(ValueError, match=r"question_sets: \['gsm8k'\] are names of benchmarks"):
        Comparison(config, Console(quiet=True)).check()


def test_a_run_that_diverged_is_not_scored(copied):
    record = RunRecord.load(Path(copied.output_dir, "arms", "nexus", "seed-1"))
    config = replace(copied, benchmarks=["gsm8k"])
    assert [task.name for task in benchmarks.missing_tasks(config, record)] == ["gsm8k"]
    diverge(record)
    assert benchmarks.missing_tasks(config, record) == []


@pytest.mark.slow
def test_runs_are_pushed_with_cards_that_compare(base, tmp_path, monkeypatch, capsys):
    path, output = tmp_path / "mine.yaml", tmp_path / "out"
    more = {"seeds": [1], "training": SHORT | {"save_strategy": "steps", "save_steps": 2}, "push_to": "alice/tiny"}
    path.write_text(yaml.safe_dump(comparison_fields(base, output, **more)))
    with HubServer(tmp_path / "hub") as hub:
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(path)])
        assert stop.value.code == 0
        titles = {arm: [c["title"] for c in hub.history(f"alice/tiny-{arm}-seed-1")] for arm in ARMS}
        # A newer save replaces one that is not sent yet, so only the last one of a run is certain.
        assert titles["adamw"] and "Compare with other arms" not in titles["adamw"]
        assert titles["nexus"][0] == "Compare with other arms"
        assert "record.json" in hub.files("alice/tiny-adamw-seed-1")  # with which nothing is compared
        files = hub.files("alice/tiny-nexus-seed-1")
        assert b"The last columns compare with adamw" in files["README.md"] and "record.json" in files
        assert not any(str(tmp_path).encode() in content for content in files.values())
        with pytest.raises(SystemExit):
            main(["compare", str(path), "--report"])
        assert len(hub.history("alice/tiny-nexus-seed-1")) == len(titles["nexus"])  # nothing has changed
        shutil.rmtree(output / "arms" / "adamw")
        run = next(run for run in Comparison(ComparisonConfig.load(str(path)), Console()).runs() if run.arm == "adamw")
        run.write()
        run.train()
        senders = [child for child in psutil.Process().children() if any("uploader" in arg for arg in child.cmdline())]
        assert not [child for child in senders if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_the_command_runs_a_comparison_in_worker_processes(base, tmp_path, capsys):
    path, output = tmp_path / "mine.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(comparison_fields(base, output, minima=MINIMA, tuning=TUNING)))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path)])
    assert stop.value.code == 0 and "Report: " in capsys.readouterr().out
    check_results(output)
    report = (output / "report.md").read_text()
    links = [line.partition("](")[2].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert len(links) == 5 and all((output / link).exists() for link in links)
    lost = output / "arms" / "nexus" / "seed-2"
    kept = json.loads((lost / RECORD_NAME).read_text())
    shutil.rmtree(lost)
    with pytest.raises(SystemExit):
        main(["compare", str(path)])
    printed = capsys.readouterr().out
    assert "1 to do" in printed and "nexus seed 2" in printed
    assert json.loads((lost / RECORD_NAME).read_text())["curve"] == kept["curve"]
