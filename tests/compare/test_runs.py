"""One run: what its record holds, that arms of a seed differ in nothing else, and that it resumes exactly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer

from hf_nexus.compare import minima, runs
from hf_nexus.compare.config import ComparisonConfig, QuestionSet
from hf_nexus.compare.minima import search_minima
from hf_nexus.compare.records import RunRecord
from hf_nexus.compare.runs import MEASURED_NAME, Run, read_questions, train_sample
from hf_nexus.hub.publisher import FinalFlush
from hf_nexus.hub.queue import QUEUE_NAME
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import PretrainRun, prepare_run
from hf_nexus.trainer.checkpoints import STAGING_DIR
from hf_nexus.trainer.config import NexusConfig
from hf_nexus.trainer.mixin import NexusTrainer
from tests.support.comparison import make_comparison
from tests.support.tiny_config import STEPS, write_config

pytestmark = pytest.mark.usefixtures("plots_not_drawn")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def one_run(config: ComparisonConfig, folder: Path, arm: str = "nexus", seed: int = 1) -> Run:
    base = yaml.safe_load(Path(config.base).read_text())
    run = Run(config, arm, seed, config.settings(arm), folder, base["model"]["tokenizer"])
    run.write()
    return run


def prepare(config: Path, output: Path, *flags: str) -> PretrainRun:
    return prepare_run(parse_arguments(["--config", str(config), "--output_dir", str(output), *flags]))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, RunRecord]:
    """A run of the arm `nexus`."""
    folder = tmp_path_factory.mktemp("run")
    question_sets = {"quiz": {"path": str(folder / "quiz.jsonl"), "prompt": "{question} ", "max_rows": 2}}
    rows = [{"question": "abcd", "answer": f"dc #### {i}"} for i in range(3)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    minima = {"max_steps": 40, "eval_steps": 2, "eval_rows": 4, "grid": 3, "learning_rate": 1e-2}
    run = one_run(make_comparison(base, folder, question_sets=question_sets, minima=minima), folder / "nexus")
    return run, run.train()


def test_a_sharded_model_has_no_cosines_and_no_text(base, tmp_path, monkeypatch):
    """One process has a part of its weights."""
    monkeypatch.setattr(NexusTrainer, "sharded", True)
    run = one_run(make_comparison(base, tmp_path), tmp_path / "nexus")
    assert run.train().cosines == []
    assert "Generated text" not in (run.folder / "RUN.md").read_text()


def test_a_record_holds_all_measurements(finished):
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
    assert [entry["step"] for entry in record.path] == list(range(1, STEPS + 1))
    assert all(entry["inner_lr"] == 0.05 for entry in record.path)
    assert set(record.downstream) == {"quiz/answer_loss"}
    assert record.seconds > 0
    assert RunRecord.load(run.folder) == record == run.load()


def test_other_weights_are_compared_on_those_of_the_base(base, tmp_path):
    arms = {"adamw": {"nexus": False}, "nexus": {"mixture_weights": {"letters": 0.9, "digits": 0.1}}}
    short = {"max_steps": 1, "lr_scheduler_kwargs": {"num_decay_steps": 1}, "eval_strategy": "no"}
    config = make_comparison(base, tmp_path, arms=arms, training=short | {"save_strategy": "no"})
    end = one_run(config, tmp_path / "run").train().end
    weights = prepare(base, tmp_path / "base").mixture.weights
    for mean, losses in ((end.train_loss, end.train), (end.validation_loss, end.validation)):
        assert mean == pytest.approx(sum(weights[name] * loss for name, loss in losses.items()))


def test_the_training_loss_is_that_of_the_saved_weights(finished, tmp_path):
    run, record = finished
    again = prepare(run.folder / "run.yaml", tmp_path)
    again.trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(run.folder).state_dict())
    sample = train_sample(again, 4, 2)
    metrics = again.trainer.evaluate(sample, metric_key_prefix="x")
    assert metrics["x_loss"] == pytest.approx(record.end.train_loss, abs=1e-6)
    assert all(len(rows) == 4 for rows in sample.values())


def test_the_sample_does_not_depend_on_the_seed(base, tmp_path):
    samples = []
    for seed in ("1", "2"):
        rows = train_sample(prepare(base, tmp_path / seed, "--seed", seed), 4, 2)
        samples.append({name: [list(row["input_ids"]) for row in part] for name, part in rows.items()})
    assert samples[0] == samples[1] and all(len(part) == 4 for part in samples[0].values()) and samples[0]


def test_arms_of_a_seed_share_weights_and_rows(base, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    short = {"max_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    short |= {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}
    config = make_comparison(base, tmp_path, training=short)
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
        one_run(config, tmp_path / name, arm, seed).train()
        seen[name] = [*weights, *rows]
        assert len(rows) == 2 * 4
    same = [all(torch.equal(x, y) for x, y in zip(seen["a"], seen[other], strict=True)) for other in "bc"]
    assert same == [True, False]


@pytest.fixture(scope="module")
def streams(base: Path) -> Path:
    """The configuration with streaming sources."""
    content = yaml.safe_load(base.read_text())
    for source in content["data"]["sources"].values():
        source |= {"streaming": True, "weight": 1} if "role" not in source else {}
    path = base.with_name("streams.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_sample_of_a_stream_is_what_all_arms_read_first(streams, tmp_path, monkeypatch):
    short = {"max_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 1}, "eval_steps": 1, "save_strategy": "no"}
    minima = {"max_steps": 2, "eval_steps": 1, "eval_rows": 2, "grid": 3}
    config = make_comparison(streams, tmp_path, training=short, minima=minima)
    trained: dict[str, list[list[int]]] = {}
    compute_loss = Trainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            trained.setdefault(arm, []).extend(inputs["input_ids"].tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    samples: list[dict[str, Any]] = []

    def keep(run: PretrainRun, rows: int, batch: int) -> dict[str, Any]:
        samples.append(train_sample(run, rows, batch))
        return samples[-1]

    monkeypatch.setattr(runs, "train_sample", keep)
    for arm in ("adamw", "nexus"):
        run = one_run(config, tmp_path / arm, arm)
        record = run.train()
    assert trained["adamw"] == trained["nexus"] and len(trained["nexus"]) == 2 * 4 * 2
    first, other = ({n: [r["input_ids"].tolist() for r in rows] for n, rows in of.items()} for of in samples)
    assert first == other and all(len(rows) == 4 for rows in first.values())
    for rows in first.values():
        assert [row for row in trained["nexus"] if row in rows] == rows  # in their order
    assert record.end.train_loss < record.curve[0].train_loss
    assert search_minima(run).minima is not None


TWO_STEPS = {"max_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 1}, "save_strategy": "no"}


@pytest.mark.slow
def test_arms_with_other_batches_share_their_measurements(base, streams, tmp_path, monkeypatch):
    """Their first ones are on the same weights. All train on the rows of streams that they are measured on."""
    arms = {"adamw": {"nexus": False}, "nexus": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}}
    training = TWO_STEPS | {"per_device_train_batch_size": 8, "gradient_cosine_steps": 1}
    samples, trained = list[dict[str, Any]](), list[list[int]]()
    compute_loss = Trainer.compute_loss

    def keep(run: PretrainRun, rows: int, batch: int) -> dict[str, Any]:
        samples.append(train_sample(run, rows, batch))
        return samples[-1]

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            trained.extend(inputs["input_ids"].tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(runs, "train_sample", keep)
    monkeypatch.setattr(Trainer, "compute_loss", spy)
    for kind in (base, streams):
        config = make_comparison(kind, tmp_path, arms=arms, training=training)
        records = [one_run(config, tmp_path / kind.stem / arm, arm).train() for arm in arms]
        for first, other in zip(*(record.cosines[0][1] for record in records), strict=True):
            assert first[:2] == other[:2] and first[2] == pytest.approx(other[2], rel=1e-4)
        assert records[0].curve[0] == records[1].curve[0]
    for row in (row for rows in samples[-1].values() for row in rows):
        assert row["input_ids"].tolist() in trained[-2 * 2 * 16 :]


def test_searches_do_not_depend_on_the_batches_of_the_arm(base, tmp_path, monkeypatch):
    given = list[dict[str, Any]]()

    def keep(**settings: Any) -> NexusConfig:
        given.append({name: value for name, value in settings.items() if name != "output_dir"})
        return NexusConfig(**settings)

    monkeypatch.setattr(minima, "NexusConfig", keep)
    arms = {
        "adamw": {"nexus": False, "adam_beta1": 0.8},
        "nexus": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "adam_beta2": 0.9},
    }
    search = {"max_steps": 2, "eval_steps": 1, "eval_rows": 2, "grid": 3}
    config = make_comparison(base, tmp_path, arms=arms, training=TWO_STEPS, minima=search)
    for arm in arms:
        run = one_run(config, tmp_path / arm, arm)
        run.train()
        search_minima(run)
    first, other = given[:2], given[2:]
    assert first == other and first[0]["gradient_accumulation_steps"] == 4 and first[0]["adam_beta1"] == 0.8


def test_searches_may_repeat_a_source_more_often_than_runs(base, tmp_path):
    content = yaml.safe_load(base.read_text())
    for name in ("letters", "digits"):
        content["data"]["sources"][name]["max_epochs"] = 1
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(content))
    search = {"max_steps": 1000, "eval_steps": 1, "eval_rows": 2, "grid": 3, "learning_rate": 10.0}  # ends at once
    run = one_run(make_comparison(path, tmp_path, training=TWO_STEPS, minima=search), tmp_path / "nexus")
    run.train()
    assert search_minima(run).minima is not None


def test_a_folder_with_other_settings_is_refused(finished):
    run, record = finished
    pushed = replace(run, config=replace(run.config, push_to="alice/study"))
    assert pushed.repo_id == "alice/study-nexus-seed-1" and pushed.load() == record  # only pushes are new
    pushed.check()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        replace(run, settings=run.settings | {"inner_lr": 0.1}).check()
    with pytest.raises(ValueError, match=r"other settings \(see measured\.yaml"):
        replace(run, config=replace(run.config, train_sample_rows=5)).check()
    for trial in (False, True):  # more devices have a larger batch
        with pytest.raises(ValueError, match=r"other settings \(see measured\.yaml"):
            replace(run, config=replace(run.config, devices_per_run=2), trial=trial).check([MEASURED_NAME])


def test_the_end_of_a_worker_does_not_wait_for_the_hub(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_comparison(Path(finished[0].config.base), tmp_path, push_to="alice/study")
    run = one_run(config, tmp_path / "run")
    run.train()
    queue = run.folder.resolve() / QUEUE_NAME
    assert any(queue.iterdir()) and queue not in FinalFlush._open


@pytest.mark.parametrize(
    "named",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["", "killed before the checkpoint got its name"],
)
def test_an_interrupted_run_resumes_to_the_same_record(finished, tmp_path, monkeypatch, named):
    run, record = finished
    training = run.config.training | {"save_strategy": "steps", "save_steps": 3}
    broken = one_run(make_comparison(Path(run.config.base), tmp_path, training=training), tmp_path / "run")
    training_step, calls = Trainer.training_step, []

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 * 4 + 2:  # in the fifth window
            raise RuntimeError("power failure")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        broken.train()
    assert broken.load() is None
    earlier = json.loads((broken.folder / "checkpoint-3" / "totals.json").read_text())["seconds"]
    if not named:
        (broken.folder / STAGING_DIR).mkdir()
        (broken.folder / "checkpoint-3").rename(broken.folder / STAGING_DIR / "checkpoint-3")
    again = broken.train()
    assert len(calls) < 2 * STEPS * 4  # not from the start
    assert again.curve == record.curve
    assert again.path == record.path
    log = json.loads((broken.folder / "trainer_state.json").read_text())["log_history"]
    runtime = next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry)
    assert again.seconds == pytest.approx(earlier + runtime, abs=1)


def test_minima_are_found_and_saved(finished):
    run, before = finished
    weights = {name: p.clone() for name, p in AutoModelForCausalLM.from_pretrained(run.folder).state_dict().items()}
    found = search_minima(run).minima
    assert found is not None
    other = replace(run, config=replace(run.config, minima=replace(run.config.minima, learning_rate=1.0)))
    with pytest.raises(ValueError, match=r"minima\.yaml"):
        other.check()
    assert run.load().minima == found
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
    assert before.curve == run.load().curve


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", pytest.param("[" * 100_000, id="nested"), '{"question": "a"}', '{"question": "a", "answer": 1}'],
)
def test_a_file_that_is_no_question_set_is_an_error(text, tmp_path):
    (tmp_path / "quiz.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"quiz\.jsonl: each line must be a JSON object"):
        read_questions(QuestionSet(str(tmp_path / "quiz.jsonl")))


def test_a_question_without_a_final_answer_is_found_early(tmp_path):
    rows = [{"question": "6 * 7?", "answer": "#### 42"}, {"question": "7 * 6?", "answer": "42"}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_questions(QuestionSet(str(tmp_path / "quiz.jsonl")))) == 2
    with pytest.raises(ValueError, match=r"quiz\.jsonl: `answer` in line 2 must end in a line '#### <answer>'"):
        read_questions(QuestionSet(str(tmp_path / "quiz.jsonl"), max_new_tokens=4))
