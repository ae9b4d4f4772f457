"""Comparisons: what they are told, their runs and records, and going on after an interruption."""

import csv
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer

from hf_nexus.cli.compare import main
from hf_nexus.compare import comparison as compare_module
from hf_nexus.compare import outcome as outcome_module
from hf_nexus.compare.comparison import Comparison, compare
from hf_nexus.compare.config import ComparisonConfig
from hf_nexus.compare.minima import search_minima
from hf_nexus.compare.pool import Job, Outcome, run_jobs
from hf_nexus.compare.records import RECORD_NAME, RunRecord
from hf_nexus.compare.runs import Run, train_sample
from tests.support.tiny_config import STEPS, write_config

ARMS: dict[str, Any] = {"adamw": {"nexus": False}, "nexus": {"inner_lr": 0.05}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def given(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "arms": ARMS,
        "baseline": "adamw",
        "primary": {"arm": "nexus", "figure": "ood_loss"},
        "seeds": [1, 2, 3],
        "output_dir": str(output),
        "training": {"gradient_cosine_steps": 3, "save_strategy": "no", "logging_steps": 1},
        "train_sample_rows": 4,
        "workers": 2,
    } | changes


def make(base: Path, output: Path, **changes: Any) -> ComparisonConfig:
    return ComparisonConfig.from_dict(given(base, output, **changes))


def one_run(config: ComparisonConfig, folder: Path, arm: str = "nexus", seed: int = 1, **settings: Any) -> Run:
    base = yaml.safe_load(Path(config.base).read_text())
    return Run(config, arm, seed, config.settings(arm) | settings, folder, base["model"]["tokenizer"])


# ---- What it is told ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": {}}, "arm: unknown key. Did you mean 'arms'"),
        ({"arms": {"adamw": {}}}, "arms: .* must be a mapping of two or more"),
        ({"arms": ARMS | {"a b": {}}}, "arms.a b: a name holds"),
        ({"arms": ARMS | {"x": {"inner_Ir": 1}}}, "arms.x.inner_Ir: not a training field"),
        ({"arms": ARMS | {"x": {"inner_lrr": 1}}}, r"arms.x.inner_lrr: not a .*. Did you mean 'inner_lr'\?"),
        ({"arms": ARMS | {"x": {"seed": 1}}}, r"arms.x.seed: not a training field that an arm may set\.$"),
        ({"baseline": "adam"}, "baseline: 'adam' is not among"),
        ({"primary": {"arm": "adamw"}}, "is the baseline itself"),
        ({"primary": {"arm": "nexus", "figure": "odd_loss"}}, "primary.figure: 'odd_loss' is not known"),
        ({"seeds": [1, 1]}, "seeds: .* different whole numbers"),
        ({"seeds": []}, "seeds: "),
        ({"tuning": {"grid": {"learning_rate": 1e-3}}}, "must be a list of values"),
        ({"tuning": {"grid": {"learning_rat": [1e-3]}}}, "not a training field that can be tuned"),
        ({"tuning": {"grid": {"learning_rate": [1e-3]}, "seeds": [3]}}, "are seeds of the comparison, too"),
        ({"minima": {"seeds": [9]}}, "minima.seeds: .9. are not among"),
        ({"minima": {"sources": ["digits"]}}, "minima.sources: .* two different"),
        ({"minima": {"grid": 1}}, "minima.grid: 1"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown key"),
        ({"tasks": {"quiz": {"path": "q.jsonl", "prompt": "Q:"}}}, "does not contain {question}"),
        ({"workers": 0}, "workers: 0"),
        ({"arms": ["adamw", "nexus"]}, "arms: .* must be a mapping"),
        ({"arms": ARMS | {"x": 3}}, "arms.x: 3 must be a mapping"),
        ({"model": None}, "model: None .* must be a mapping"),
        ({"primary": None}, "primary: missing"),
        ({"tasks": ["a"]}, "tasks: .* must be a mapping"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: the comparison decides"),
        (
            {
                "tuning": {"grid": {"learning_rate": [1e-3, 2e-3]}},
                "arms": ARMS | {"x": {"tuning": {"inner_lr": [0.1, 0.2, 0.3]}}},
            },
            "has 3 trials, and the common grid 2",
        ),
    ],
)
def test_a_mistake_is_named(base, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make(base, tmp_path, **changes)


def test_every_arm_makes_as_many_trials(base, tmp_path):
    own = {"inner_lr": [0.1, 0.2]}
    config = make(
        base, tmp_path, tuning={"grid": {"learning_rate": [1, 2]}}, arms=ARMS | {"own": {"tuning": own, "nexus": True}}
    )
    assert [list(config.trials(arm)) for arm in config.arms] == [
        [{"learning_rate": 1}, {"learning_rate": 2}],
        [{"learning_rate": 1}, {"learning_rate": 2}],
        [{"inner_lr": 0.1}, {"inner_lr": 0.2}],
    ]
    assert config.settings("own") == {"nexus": True}


def test_the_comparison_of_the_package_is_whole(tmp_path):
    config = ComparisonConfig.load("compare", output_dir=str(tmp_path))
    assert len(config.seeds) >= 3
    kinds = [config.settings(arm) for arm in config.arms]
    assert {"nexus": False} in kinds
    assert {"inner_lr": 0.0} in kinds
    assert any(kind.get("inner_direction") == "random" for kind in kinds)
    assert any(kind.get("inner_lr_schedule") == "follow" for kind in kinds)


def test_several_processes_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it alone"):
        Comparison(make(base, tmp_path), Console(quiet=True)).check()


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, base):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(given(base, tmp_path, baseline="adam")))
    with pytest.raises(SystemExit, match=r"^error: .*wrong\.yaml: baseline: 'adam' is not among the arms"):
        main([str(path)])
    with pytest.raises(ValueError, match=r"There is no comparison 'compar'\. Did you mean 'compare'"):
        ComparisonConfig.load("compar")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ARMS | {"x": {"max_steps": 7}}}, "not all train on as many rows"),
        ({"tuning": {"grid": {"learning_rate": [1e-3, "much"]}}}, r"^arms\.adamw with .*learning_rate.*'much'"),
        ({"arms": ARMS | {"nexus": {"inner_lr": "hello"}}}, r"^arms\.nexus: training\.inner_lr: 'hello'"),
        ({"minima": {"sources": ["letters", "signs"]}}, "signs.* are not among the training sources"),
        ({"tasks": {"quiz": {"path": "no/such.jsonl"}}}, "no/such.jsonl"),
    ],
)
def test_what_would_fail_later_is_found_before_anything_runs(base, tmp_path, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        Comparison(make(base, tmp_path, **changes), Console(quiet=True)).check()
    assert not (tmp_path / "arms").exists()


def test_the_primary_endpoint_is_declared_once(base, tmp_path):
    Comparison(make(base, tmp_path), Console(quiet=True)).check()
    Comparison(make(base, tmp_path, seeds=[1, 2, 3, 4]), Console(quiet=True)).check()
    changed = make(base, tmp_path, primary={"arm": "nexus", "figure": "validation_loss"})
    with pytest.raises(ValueError, match="declared after seeing results"):
        Comparison(changed, Console(quiet=True)).check()


# ---- A run ----


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, RunRecord]:
    """A run of the arm `nexus`."""
    folder = tmp_path_factory.mktemp("run")
    tasks = {"quiz": {"path": str(folder / "quiz.jsonl"), "prompt": "{question} ", "max_rows": 2}}
    rows = [{"question": "abcd", "answer": f"dc #### {i}"} for i in range(3)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    minima = {"max_steps": 40, "eval_steps": 2, "eval_rows": 4, "grid": 3, "learning_rate": 1e-2}
    run = one_run(make(base, folder, tasks=tasks, minima=minima), folder / "nexus")
    return run, run.execute()


def test_a_record_holds_what_was_measured(finished):
    run, record = finished
    assert [point.step for point in record.curve] == [0, 3, STEPS]
    assert record.end.tokens == STEPS * 4 * 2 * 32
    end = record.end
    assert set(end.train) == set(end.validation) == {"letters", "digits"}
    assert set(end.ood) == {"signs"}
    assert end.ood_loss == end.ood["signs"]
    assert all(loss < record.curve[0].train[name] for name, loss in end.train.items())
    assert [step for step, _ in record.cosines] == [0, 3, STEPS]
    assert [pair[:2] for pair in record.cosines[-1][1]] == [("digits", "letters")]
    assert [figures["step"] for figures in record.path] == list(range(1, STEPS + 1))
    assert all(figures["inner_lr"] == 0.05 for figures in record.path)
    assert set(record.downstream) == {"quiz/answer_loss"}
    assert record.seconds > 0
    assert RunRecord.load(run.folder) == record == run.record()


def test_the_training_loss_is_that_of_the_saved_weights_on_the_sample(finished):
    from hf_nexus.pretrain.parsing import parse_arguments
    from hf_nexus.pretrain.run import prepare_run

    run, record = finished
    resumed = prepare_run(
        parse_arguments(["--config", str(run.folder / "run.yaml"), "--output_dir", f"{run.folder}-again"])
    )
    saved = AutoModelForCausalLM.from_pretrained(run.folder)
    resumed.trainer.model.load_state_dict(saved.state_dict())
    sample = train_sample(resumed.mixture, 4)
    metrics = resumed.trainer.evaluate(sample, metric_key_prefix="x")
    assert metrics["x_loss"] == pytest.approx(record.end.train_loss, abs=1e-6)
    assert all(len(rows) == 4 for rows in sample.values())


def test_the_sample_does_not_depend_on_the_seed(base, tmp_path):
    from hf_nexus.pretrain.parsing import parse_arguments
    from hf_nexus.pretrain.run import prepare_run

    samples = []
    for seed in (1, 2):
        flags = ["--config", str(base), "--output_dir", str(tmp_path / str(seed)), "--seed", str(seed)]
        rows = train_sample(prepare_run(parse_arguments(flags)).mixture, 4)
        samples.append({name: [list(row["input_ids"]) for row in part] for name, part in rows.items()})
    assert samples[0] == samples[1]


def test_arms_of_one_seed_start_from_the_same_weights_and_read_the_same_rows(base, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    config = make(base, tmp_path)
    compute_loss = Trainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            rows.append(inputs["input_ids"].clone())
        if not weights:
            weights.extend(p.detach().clone() for p in model.parameters())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    for name, arm, seed in (("a", "adamw", 1), ("b", "nexus", 1), ("c", "nexus", 2)):
        rows: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        one_run(config, tmp_path / name, arm, seed).execute()
        seen[name] = [*weights, *rows]
    same = [all(torch.equal(x, y) for x, y in zip(seen["a"], seen[other], strict=True)) for other in "bc"]
    assert same == [True, False]


def test_a_run_with_other_settings_is_not_taken_for_this_one(finished, base):
    run, _ = finished
    other = Run(run.config, run.arm, run.seed, run.settings | {"inner_lr": 0.1}, run.folder, run.tokenizer)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        other.record()
    sampled = replace(run, config=replace(run.config, train_sample_rows=5))
    with pytest.raises(ValueError, match=r"other settings \(see measured\.yaml"):
        sampled.record()


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_record(finished, tmp_path, monkeypatch):
    run, record = finished
    saving = {**given(Path(run.config.base), tmp_path), "tasks": {}}
    saving["training"] = {**saving["training"], "save_strategy": "steps", "save_steps": 3}
    broken = one_run(ComparisonConfig.from_dict(saving), tmp_path / "run")
    training_step, calls = Trainer.training_step, []

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 * 4 + 2:  # in the fifth window
            raise RuntimeError("the power went off")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        broken.execute()
    assert broken.record() is None
    again = broken.execute()
    assert len(calls) < 2 * STEPS * 4  # not from the start
    assert again.curve == record.curve
    assert again.path == record.path


def test_minima_are_searched_and_reported(finished):
    run, before = finished
    weights = {name: p.clone() for name, p in AutoModelForCausalLM.from_pretrained(run.folder).state_dict().items()}
    found = search_minima(run).minima
    assert found is not None
    searched = replace(run, config=replace(run.config, minima=replace(run.config.minima, learning_rate=1.0)))
    with pytest.raises(ValueError, match=r"minima\.yaml"):
        searched.refuse_other_minima()
    run.refuse_other_minima()
    assert RunRecord.load(run.folder).minima == found
    assert set(found.steps) == {"letters", "digits"}
    for name in found.steps:
        assert found.end_loss[name] < found.start_loss[name]
        assert 0 < found.steps[name] <= 40
        assert found.converged[name] == (found.steps[name] + 2 * 2 <= 40)
        assert found.to_start[name] > 0
    assert found.positions == [0, 0.5, 1]
    (a, b, losses), (_, _, barrier) = found.segments[0], found.barriers[0]
    assert (a, b) == ("digits", "letters")
    assert barrier == pytest.approx(max(0, losses[1] - (losses[0] + losses[2]) / 2))
    assert found.relative_distance == found.pairwise[0][2] / found.parameter_norm
    after = AutoModelForCausalLM.from_pretrained(run.folder).state_dict()
    assert all(torch.equal(p, after[name]) for name, p in weights.items())
    assert before.curve == RunRecord.load(run.folder).curve


# ---- Many runs ----


def _die() -> None:
    os._exit(9)


def _fail() -> None:
    print("about to fail")
    raise OSError("no\nspace")


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    jobs = [
        Job("bad", _fail, tmp_path / "bad" / "log.txt"),
        Job("good", partial(sum, [1, 2]), tmp_path / "good.txt"),
    ]
    outcomes = {outcome.job.name: outcome for outcome in run_jobs(jobs, 1)}
    assert outcomes["good"].result == 3
    assert outcomes["bad"].error == "OSError: no space"
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert log.startswith("about to fail")
    assert "Traceback" in log


def test_a_worker_that_dies_takes_no_other_job_with_it(tmp_path):
    jobs = [Job("killed", _die, tmp_path / "a"), Job("sum", partial(sum, [1, 2]), tmp_path / "b")]
    outcomes = {outcome.job.name: outcome for outcome in run_jobs(jobs, 1)}
    assert str(outcomes["killed"].error).startswith("its process died")
    assert outcomes["sum"].result == 3


def test_a_comparison_from_the_command_line_and_again(base, tmp_path, capsys):
    minima = {"max_steps": 4, "eval_steps": 2, "eval_rows": 2, "grid": 3, "seeds": [1]}
    tuning = {"grid": {"learning_rate": [1e-5, 1e-2]}, "max_steps": 3}
    path = tmp_path / "mine.yaml"
    output = tmp_path / "out"
    path.write_text(yaml.safe_dump(given(base, output, minima=minima, tuning=tuning)))
    main([str(path)])
    report = (output / "report.md").read_text()
    rows = list(csv.DictReader((output / "results.csv").open()))
    for arm in ARMS:
        for seed in (1, 2, 3):
            record = RunRecord.load(output / "arms" / arm / f"seed-{seed}")
            assert record.settings["learning_rate"] == 1e-2  # 1e-5 barely learns
            assert (record.minima is not None) == (seed == 1)
            (value,) = [
                float(row["value"])
                for row in rows
                if (row["arm"], row["seed"], row["figure"], row["where"]) == (arm, str(seed), "ood_loss", "end")
            ]
            assert value == pytest.approx(record.end.ood_loss)
    chosen = [trial for trial in json.loads((output / "tuning.json").read_text()) if trial["chosen"]]
    assert [trial["learning_rate"] for trial in chosen] == [1e-2, 1e-2]
    card = (output / "arms" / "nexus" / "seed-1" / "README.md").read_text()
    assert "The last columns compare with adamw" in card
    assert "The last columns" not in (output / "arms" / "adamw" / "seed-1" / "README.md").read_text()
    assert "4 to do" in capsys.readouterr().out
    assert "no conclusion" not in report.lower()
    for line in report.splitlines():
        if line.startswith("!["):
            assert (output / line.partition("](")[2].rstrip(")")).exists()

    # The same command again has nothing to do; with a record gone, it does that run only.
    lost = output / "arms" / "nexus" / "seed-2"
    kept = json.loads((lost / RECORD_NAME).read_text())
    shutil.rmtree(lost)
    main([str(path)])
    printed = capsys.readouterr().out
    assert "1 to do" in printed
    assert "nexus seed 2" in printed
    assert "nexus seed 1" not in printed.replace("minima of nexus seed 1", "")
    assert json.loads((lost / RECORD_NAME).read_text())["curve"] == kept["curve"]


def test_failed_runs_are_named_and_the_rest_is_reported(base, tmp_path, monkeypatch, capsys):
    config = make(base, tmp_path / "out")
    comparison = Comparison(config, Console(width=200))

    def all_but_one(jobs: Any, workers: int) -> Any:
        for job in jobs:
            if job.name == "nexus seed 3":
                yield Outcome(job, error="RuntimeError: out of luck")
            else:
                record = RunRecord.load(done[job.name.split()[0]])
                record.seed = int(job.name.split()[-1])
                record.save(job.log.parent)
                yield Outcome(job, record)

    done = {}
    for arm in ARMS:
        done[arm] = tmp_path / arm
        one_run(config, done[arm], arm).execute()
    monkeypatch.setattr(compare_module, "run_jobs", all_but_one)
    monkeypatch.setattr(outcome_module, "plot_comparison", lambda *args, **kwargs: 1 / 0)
    report = compare(comparison).read_text()
    assert [outcome.job.name for outcome in comparison.failed] == ["nexus seed 3"]
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: out of luck" in printed
    assert "The pictures could not be drawn: ZeroDivisionError" in printed
    assert "seed 3" in report
    assert "no conclusion" in report.lower()  # two pairs of seeds are left
