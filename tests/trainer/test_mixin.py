"""NexusTrainer as users call it: arguments, logs, evaluation, saving, resuming and errors."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_nexus import MixtureConfig, NexusConfig, NexusTrainer, NexusTrainerMixin, load_mixture
from hf_nexus.hub.publisher import Publisher
from hf_nexus.trainer.config import save_settings, warn_of_changes
from tests.support.faults import AtEvents
from tests.support.tiny import Rows, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def last_log(trainer, key="loss") -> dict:
    return [entry for entry in trainer.state.log_history if key in entry][-1]


class Batches(TrainerCallback):
    """Records the sources of each window."""

    def __init__(self):
        self.trainer, self.windows = None, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.windows.append(list(self.trainer._window.sources))


# ---- Data ----


def test_dict_of_sources_trains_and_logs_each_source(make_trainer, sources):
    trainer = make_trainer(sources, max_steps=6)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(before, weights(trainer))
    logs = last_log(trainer)
    tokens = {name: logs[f"tokens/{name}"] for name in sources}
    assert sum(tokens.values()) == 6 * 4 * 2 * 15  # windows, micro-batches, rows, predicted positions
    for key in ("path_cosine", "pseudo_gradient_norm", "inner_lr", "inner_steps_skipped", "tokens_per_second"):
        assert key in logs
    assert logs["inner_lr"] == 0.05
    assert any(f"loss/{name}" in logs for name in sources)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_mixture_are_never_padded(make_trainer, tmp_path, streaming):
    """The tokenizers of GPT-2, Llama and SmolLM2 have no padding token. Rows of a mixture are full."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} fox " * 9}) + "\n" for i in range(90)))
    source = {"path": str(tmp_path / "text.jsonl"), "eval_rows": 5, "streaming": streaming, "weight": 1}
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    config = MixtureConfig.from_dict({"sources": {"text": source}, "sequence_length": 16})
    mixture = load_mixture(config, tokenizer, cache_dir=tmp_path / "cache")
    seen = []

    class Watched(NexusTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    kwargs = {"processing_class": tokenizer}
    trainer = make_trainer(mixture, tiny_llama(vocab_size=320), kwargs, Watched, dataloader_num_workers=1)
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 8 and all(set(batch) == {"input_ids", "labels", "position_ids"} for batch in seen)
    eos = [batch["labels"][batch["input_ids"] == tokenizer.eos_token_id] for batch in seen]
    assert any(len(labels) for labels in eos) and all((labels == tokenizer.eos_token_id).all() for labels in eos)


def test_loss_per_source_is_that_sources_mean_loss(make_trainer, sources):
    trainer = make_trainer({"text": sources["text"]}, max_steps=1, inner_lr=0.0, gradient_accumulation_steps=3)
    trainer.train()
    logs = last_log(trainer)
    assert logs["loss/text"] == pytest.approx(logs["loss"], rel=1e-4)


@pytest.mark.parametrize("nexus", [True, False])
def test_padded_micro_batches_weigh_by_their_tokens(make_trainer, nexus):
    """The losses of the window and of each source are means over tokens, computed by hand here."""
    rows = Rows(8, 3, pad=True)
    trainer = make_trainer(
        {"text": rows}, max_steps=1, learning_rate=0.0, inner_lr=0.0, nexus=nexus, gradient_accumulation_steps=4
    )
    trainer.train()
    model, total, count = tiny_llama(), 0.0, 0
    for i in range(8):
        n = int((rows.labels[i, 1:] != -100).sum())
        loss = model(input_ids=rows.ids[i : i + 1], labels=rows.labels[i : i + 1]).loss
        total, count = total + float(loss.detach()) * n, count + n
    logs = last_log(trainer)
    assert logs["loss"] == pytest.approx(total / count, rel=1e-5)
    assert logs["loss/text"] == pytest.approx(total / count, rel=1e-5)
    assert logs["tokens/text"] == count


@pytest.mark.parametrize("nexus", [True, False])
def test_a_micro_batch_without_loss_tokens_adds_nothing(make_trainer, nexus):
    rows = Rows(8, 3)
    rows.labels[:4] = -100
    settings = {"learning_rate": 0.0, "inner_lr": 0.0, "nexus": nexus, "max_steps": 1}
    trainer = make_trainer({"text": rows}, per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    trainer.train()
    logs = last_log(trainer)
    assert logs["tokens/text"] == 4 * 15 and math.isfinite(logs["loss/text"])
    assert logs["loss/text"] == pytest.approx(logs["loss"], rel=1e-5)


def test_a_micro_batch_holds_one_source_in_schedule_order(make_trainer, sources):
    from hf_nexus.mixture import SourceSchedule

    batches = Batches()
    share = {"text": 0.5, "code": 0.25, "math": 0.25}
    trainer = make_trainer(sources, trainer_kwargs={"callbacks": [batches]}, max_steps=5, mixture_weights=share)
    batches.trainer = trainer
    trainer.train()
    schedule = SourceSchedule(share, trainer.args.seed)
    expected = [schedule.names[s] for s in schedule.sources(0, 20)]
    assert [name for window in batches.windows for name in window] == expected


def test_stratified_schedule_balances_each_window(make_trainer, sources):
    batches = Batches()
    trainer = make_trainer(
        sources,
        trainer_kwargs={"callbacks": [batches]},
        max_steps=4,
        gradient_accumulation_steps=3,
        source_schedule="stratified",
        mixture_weights='{"text": 1, "code": 1, "math": 1}',
    )
    batches.trainer = trainer
    trainer.train()
    assert all(sorted(window) == ["code", "math", "text"] for window in batches.windows)


def test_epochs_count_rows_whatever_the_weights(make_trainer, sources):
    trainer = make_trainer(
        sources, max_steps=-1, num_train_epochs=2, mixture_weights={"text": 8, "code": 1, "math": 1}
    )
    trainer.train()
    micro_batches = sum(len(rows) for rows in sources.values()) // 2
    assert trainer.state.global_step == 2 * math.ceil(micro_batches / 4)
    assert trainer.state.epoch == 2
    assert last_log(trainer)["tokens/text"] > 10 * last_log(trainer)["tokens/math"] / 2


def test_datasets_and_collators_of_other_kinds(make_trainer, sources, tmp_path):
    datasets = pytest.importorskip("datasets")
    hf = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"input_ids": rows.ids.tolist(), "labels": rows.labels.tolist(), "note": ["x"] * len(rows)}
            )
            for name, rows in sources.items()
        }
    )
    one = datasets.concatenate_datasets([part.add_column("source", [name] * len(part)) for name, part in hf.items()])

    def collate(features):
        return {key: torch.tensor([f[key] for f in features]) for key in ("input_ids", "labels")}

    reference = make_trainer(sources, max_steps=3)
    reference.train()
    for data, kwargs in [(hf, {}), (one, {}), (hf, {"data_collator": collate})]:
        trainer = make_trainer(data, trainer_kwargs=kwargs, max_steps=3)
        start = weights(trainer)
        trainer.train()
        assert torch.equal(weights(trainer), weights(reference)) and not torch.equal(weights(trainer), start)


def test_dataloader_workers_change_nothing(make_trainer, sources):
    plain, workers = make_trainer(sources), make_trainer(sources, dataloader_num_workers=2)
    plain.train()
    workers.train()
    assert torch.equal(weights(plain), weights(workers))


@pytest.mark.parametrize("nexus", [False, True])
def test_loaders_of_training_read_a_window_ahead(make_trainer, sources, nexus):
    config = {"dataloader_num_workers": 1, "nexus": nexus}
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": sources}, **config)
    of_training, of_evaluation = trainer.get_train_dataloader(), trainer.get_eval_dataloader("text")
    assert (of_training.prefetch_factor, of_evaluation.prefetch_factor) == (4, 2)
    assert trainer.args.dataloader_prefetch_factor is None
    given = make_trainer(sources, dataloader_prefetch_factor=3, **config)
    assert given.get_train_dataloader().prefetch_factor == 3
    plain = make_trainer(sources["text"], **config)
    assert plain.get_train_dataloader().prefetch_factor == (4 if nexus else 2)


@pytest.mark.parametrize("nexus", [False, True])
def test_operations_are_the_trainers_counted_once_per_window(make_trainer, monkeypatch, nexus):
    class Upstream(NexusTrainer):
        floating_point_ops = Trainer.floating_point_ops

    class Twice(Trainer):
        def floating_point_ops(self, inputs):
            return 2 * super().floating_point_ops(inputs)

    class NexusTwice(NexusTrainerMixin, Twice):
        pass

    def run(cls):
        walks.clear()
        trainer = make_trainer(sources, trainer_class=cls, nexus=nexus, max_steps=5)
        trainer.train()
        return trainer.state.total_flos, len(walks)

    walks, counted = [], PreTrainedModel.num_parameters
    monkeypatch.setattr(
        PreTrainedModel, "num_parameters", lambda *args, **kwargs: walks.append(1) or counted(*args, **kwargs)
    )
    sources = {"long": Rows(40, 0), "short": Rows(40, 1, length=8)}
    total, once = run(NexusTrainer)
    assert (total, 5 * 4) == run(Upstream) and total > 0
    assert 5 <= once <= 10  # one or two lengths in each window
    assert run(NexusTwice) == (2 * total, 5 * 4)


def test_one_plain_dataset_uses_the_stock_loader(make_trainer, sources):
    trainer = make_trainer(sources["text"], max_steps=3)
    trainer.train()
    logs = last_log(trainer)
    assert "path_cosine" in logs
    assert not [key for key in logs if "/" in key]


@pytest.mark.parametrize(
    "config", [{"accelerator_config": {"split_batches": True}}, {"train_sampling_strategy": "sequential"}]
)
def test_loader_settings_are_honoured_for_one_plain_dataset(make_trainer, sources, config):
    trainer = make_trainer(sources["text"], max_steps=1, **config)
    trainer.train()
    assert trainer.state.global_step == 1


def test_without_nexus_a_mixture_trains_as_the_base_class(make_trainer, sources, tmp_path):
    ours = make_trainer(sources, nexus=False, max_steps=6)
    loader = make_trainer(sources, nexus=False).get_train_dataloader()
    loader.set_epoch(0)
    batches = [{k: v for k, v in batch.items() if not k.startswith("nexus_")} for batch in loader]
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(2)]
    kept = {k: v for k, v in ours.args.to_dict().items() if k in TrainingArguments.__dataclass_fields__}
    args = TrainingArguments(**{**kept, "accelerator_config": None, "train_sampling_strategy": "sequential"})
    stock = Trainer(model=tiny_llama(), args=args, train_dataset=rows)
    ours.train()
    stock.train()
    assert torch.equal(weights(ours), weights(stock))
    assert last_log(ours)["loss"] == last_log(stock)["loss"]
    assert any(key.startswith("loss/") for key in last_log(ours))


def test_plain_training_arguments_are_enough(sources, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=2, report_to="none", use_cpu=True
    )
    trainer = NexusTrainer(tiny_llama(), args, train_dataset=sources)
    trainer.train()
    assert last_log(trainer, "train_loss")["step"] == 1
    assert trainer.args.inner_lr == 0.05


def test_a_subclass_may_change_the_micro_batches(make_trainer, sources):
    seen = []

    class Ours(NexusTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, {**inputs, "marked": True}, num_items_in_batch)

        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs.pop("marked"))
            return super().compute_loss(model, inputs, **kwargs)

    make_trainer(sources, trainer_class=Ours, max_steps=1).train()
    assert seen == [True] * 4


class OwnStep(Trainer):
    """Forward and backward pass by hand, as in many scripts."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_bypasses_the_update_is_an_error(make_trainer, sources):
    class Ours(NexusTrainer):
        training_step = OwnStep.training_step

    class Skipping(NexusTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self._window.inputs:
                return torch.zeros(())
            return super().training_step(model, inputs, num_items_in_batch)

    for kind, reached in ((Ours, 0), (Skipping, 1)):
        trainer = make_trainer(sources, trainer_class=kind)
        with pytest.raises(ValueError, match=rf"{kind.__name__} passed on {reached} of 4 .*\(NexusTrainerMixin, Your"):
            trainer.train()
        assert not trainer.state.log_history
    make_trainer(sources, trainer_class=Ours, nexus=False).train()


def test_a_step_that_the_mixin_calls_is_walked(make_trainer, sources):
    class Ours(NexusTrainerMixin, OwnStep):
        pass

    trainers = [make_trainer(sources, trainer_class=kind) for kind in (Ours, NexusTrainer)]
    for trainer in trainers:
        trainer.train()
    assert torch.equal(*map(weights, trainers)) and last_log(trainers[0])["loss"] == last_log(trainers[1])["loss"]


def test_training_step_outside_train_is_an_error(make_trainer, sources):
    trainer = make_trainer(sources)
    with pytest.raises(RuntimeError, match=r"inside train\(\) only"):
        trainer.training_step(trainer.model, {})


def test_parents_that_pass_their_arguments_on(make_trainer, sources, tmp_path):
    from hf_nexus import NexusConfig, NexusTrainerMixin

    class Parent(Trainer):
        def __init__(self, *args, extra=1, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    class Ours(NexusTrainerMixin, Parent):
        pass

    args = NexusConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for trainer in (
        Ours(tiny_llama(), args, None, sources, extra=2),
        Ours(model=tiny_llama(), args=args, train_dataset=sources, extra=2),
    ):
        assert trainer.extra == 2
        assert trainer.train_dataset.names == list(sources)
    with pytest.raises(TypeError, match="by position and by name: args"):
        NexusTrainer(tiny_llama(), args, args=args)


def test_the_training_mixture_can_be_evaluated(make_trainer, sources):
    trainer = make_trainer(sources, per_device_eval_batch_size=7)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_splits_are_not_taken_for_sources(make_trainer, sources):
    with pytest.raises(ValueError, match=r"look like splits.*dataset\['train'\]"):
        make_trainer({"train": sources["text"], "test": sources["code"]})


# ---- inner_lr ----


def test_follow_scales_the_inner_step_with_the_learning_rate(make_trainer, sources):
    trainer = make_trainer(
        sources, max_steps=4, inner_lr_schedule="follow", lr_scheduler_type="linear", warmup_steps=2, inner_lr=0.1
    )
    trainer.train()
    gammas = [entry["inner_lr"] for entry in trainer.state.log_history if "inner_lr" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "inner_lr" in entry]
    assert gammas[0] == 0.0  # warm-up starts at 0: no movement
    assert gammas == pytest.approx([0.1 * rate / 1e-2 for rate in rates])


def test_follow_never_exceeds_inner_lr_when_the_lr_climbs(make_trainer, sources):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
    trainer = make_trainer(
        sources,
        model=model,
        trainer_kwargs={"optimizers": (optimizer, schedule)},
        max_steps=8,
        inner_lr_schedule="follow",
    )
    trainer.train()
    gammas = [entry["inner_lr"] for entry in trainer.state.log_history if "inner_lr" in entry]
    assert 0.045 < max(gammas) <= 0.05
    assert min(gammas) < 0.01


def poison(trainer, calls: set[int]) -> None:
    compute_loss, count = trainer.compute_loss, [0]

    def poisoned(*args, **kwargs):
        count[0] += 1
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if count[0] in calls else loss

    trainer.compute_loss = poisoned


def test_a_window_without_a_usable_gradient_changes_nothing(make_trainer, sources, caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    trainer = make_trainer(sources, max_steps=4)
    poison(trainer, {5, 6, 7, 8, 10, 13, 14, 15, 16})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["inner_steps_skipped"] for entry in logs] == [0, 4, 5, 9]
    assert [math.isnan(entry["loss"]) for entry in logs] == [False, True, False, True]
    assert caplog.text.count("no inner step had a usable gradient") == 1
    assert weights(trainer).isfinite().all()


def test_random_direction_runs_and_differs(make_trainer, sources):
    nexus, random = make_trainer(sources), make_trainer(sources, inner_direction="random")
    nexus.train()
    random.train()
    assert not torch.equal(weights(nexus), weights(random))


@pytest.mark.parametrize(
    ("rows", "config", "warns"),
    [
        (13, {}, True),
        (16, {}, False),
        (13, {"dataloader_drop_last": True}, False),
        (13, {"nexus": False}, False),
        (13, {"per_device_train_batch_size": 1}, False),
        (16, {"train_sampling_strategy": "group_by_length"}, True),
        (13, {"auto_find_batch_size": True}, False),  # the Trainer goes on with that of the checkpoint
    ],
)
def test_other_rows_on_other_ranks_warn(make_trainer, caplog, tmp_path, rows, config, warns):
    """As if there were one rank in place of four."""
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, **config}
    make_trainer(Rows(rows, 0), **{**saving, "per_device_train_batch_size": 1}).train()
    trainer = make_trainer(Rows(rows, 0), **{"per_device_train_batch_size": 4, **saving})
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert ("with 1 rows per rank, and now there are 4: micro-batches may hold other rows" in caplog.text) == warns


@pytest.mark.parametrize(("ranks", "warns"), [(1, True), (2, False)])
def test_several_ranks_share_the_rows_as_any_others(make_trainer, caplog, tmp_path, monkeypatch, ranks, warns):
    """As if there had been two ranks in place of one, or four in place of two."""
    make_trainer(Rows(13, 0), save_strategy="steps", save_steps=1, per_device_train_batch_size=1).train()
    trainer = make_trainer(Rows(13, 0), per_device_train_batch_size=2)
    monkeypatch.setattr(type(trainer._feed), "_ranks", ranks)
    trainer._feed.resume(str(tmp_path / "out" / "checkpoint-1"))
    assert ("other rows" in caplog.text) == warns


def test_k_1_warns(make_trainer, sources, caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        make_trainer(sources, gradient_accumulation_steps=1, max_steps=1).train()
    assert "only normalizes the gradient" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"inner_lr": 1e-7}, "without moving"),
        ({"inner_lr": 1e-4, "bf16": True}, r"Raise inner_lr to 0\.000"),
        ({"inner_lr": 1e-4}, None),
        ({"inner_lr": 0.05, "bf16": True}, None),
        ({"inner_lr": 0.0, "bf16": True}, None),
    ],
)
def test_steps_too_short_for_the_precision_are_warned_of(make_trainer, sources, caplog, config, expected):
    import logging
    import re

    logging.getLogger("transformers").propagate = True
    trainer = make_trainer(sources, max_steps=1, **config)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = re.search(r"without moving|Raise inner_lr to [\d.e-]+", caplog.text)
    assert re.match(expected, found.group()) if expected else not found


def test_a_window_costs_at_most_one_host_synchronisation(make_trainer, sources):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        """Counts reads of device values by the host. On an accelerator, each read waits for the device."""

        def __init__(self):
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            self.reads += function in reads
            return function(*args, **(kwargs or {}))

    reads = []

    class Counted(NexusTrainer):
        def training_step(self, *args, **kwargs):
            with Count() as count:
                loss = super().training_step(*args, **kwargs)
            reads.append(count.reads)
            return loss

    make_trainer(sources, trainer_class=Counted, max_steps=2).train()
    with Count() as control:
        torch.ones(()).item()
    assert control.reads == 1
    # One `tolist()` of the k norms of a window reads k values on a CPU, and makes one copy from an accelerator.
    assert len(reads) == 8
    assert all(count == 0 for i, count in enumerate(reads) if i % 4 != 3)
    assert reads[3] <= 4 and reads[7] <= 4


# ---- Evaluation ----


def test_several_sets_are_one_evaluation_with_macro_and_ood(make_trainer, sources):
    seen = []

    class Listener(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics)

    held_out = {"text": Rows(8, 0), "code": Rows(8, 1), "law": Rows(8, 5), "poems": Rows(8, 6)}
    share = {"text": 0.5, "code": 0.25, "math": 0.25}
    kwargs = {"eval_dataset": held_out, "callbacks": [Listener()]}
    trainer = make_trainer(sources, trainer_kwargs=kwargs, mixture_weights=share)
    metrics = trainer.evaluate()
    assert len(seen) == 1 and seen[0].items() <= metrics.items() and {"eval_loss", "eval_ood_loss"} <= seen[0].keys()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 1
    assert len(trainer.state.log_history) == 1
    macro = (0.5 * metrics["eval_text_loss"] + 0.25 * metrics["eval_code_loss"]) / 0.75
    assert metrics["eval_loss"] == pytest.approx(macro)
    assert metrics["eval_ood_loss"] == pytest.approx((metrics["eval_law_loss"] + metrics["eval_poems_loss"]) / 2)


def test_each_machine_without_a_shared_disk_has_the_weights(make_trainer, sources, tmp_path, monkeypatch):
    """transformers writes them on the first rank of all only."""
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda model, is_main_process: False)
    for everywhere in (False, True):
        trainer = make_trainer(sources, save_on_each_node=everywhere)
        trainer.save_model(str(tmp_path / str(everywhere)))
        assert (tmp_path / str(everywhere) / "model.safetensors").exists() == everywhere
        assert "should_save_on_this_rank" not in vars(trainer.model)


def test_a_run_deletes_what_a_killed_one_was_queueing(make_trainer, sources, tmp_path):
    (unfinished := tmp_path / "hub_queue/new-7").mkdir(parents=True)
    trainer = make_trainer(sources, max_steps=1, output_dir=str(tmp_path))
    trainer._publishing.publisher = Publisher("alice/nexus", tmp_path)
    assert unfinished.exists()
    trainer.train()
    assert not unfinished.exists()


def test_buffers_of_quantized_models_are_not_copied(make_trainer, sources, monkeypatch):
    """They are integers and large. Running statistics, which a path may change, are not."""
    model, changed = tiny_llama(), []
    model.register_buffer("packed", torch.zeros(3, dtype=torch.int32))
    model.register_buffer("mean", torch.zeros(3))

    def count(*_):
        model.packed.add_(1)
        model.mean.add_(1)

    model.register_forward_hook(count)
    monkeypatch.setattr("hf_nexus.trainer.window.warn_of_buffers", changed.extend)
    make_trainer(sources, model=model, max_steps=1).train()
    assert changed == ["mean"] and model.packed[0] > 0


def test_another_number_of_paths_is_warned_of(tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    save_settings({"inner_sync": "local", "paths": 4}, str(tmp_path))
    for paths, warned in (({"paths": 4}, 0), ({}, 1), ({"paths": 2}, 2)):
        warn_of_changes({"inner_sync": "local", **paths}, str(tmp_path))
        assert caplog.text.count("the checkpoint was trained with 4: another algorithm") == warned


def test_a_save_asked_for_in_an_evaluation_is_made(make_trainer, sources, tmp_path):
    """With `save_strategy="best"`, the Trainer replaces what callbacks ask for by whether it is the best."""

    class SaveAndStop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_save = control.should_training_stop = True

    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "worst"}
    kwargs = {"eval_dataset": Rows(8, 0), "callbacks": [SaveAndStop()]}
    trainer = make_trainer(sources, trainer_kwargs=kwargs, output_dir=str(tmp_path), max_steps=4, **best)
    trainer.evaluate = lambda *args, evaluate=trainer.evaluate, **kwargs: (
        evaluate(*args, **kwargs) | {"eval_worst": -trainer.state.global_step}
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_parent_that_does_not_keep_a_line_loses_no_other(make_trainer, sources):
    class Quiet(Trainer):
        def log(self, logs, start_time=None):
            if "eval_loss" in logs:  # the log line of all sets; single sets have none
                super().log(logs, start_time)

    class Ours(NexusTrainerMixin, Quiet):
        pass

    trainer = make_trainer(sources, trainer_class=Ours)
    trainer.state.log_history = [{"step": 0, "loss": 5.0}]
    trainer.evaluate({"text": Rows(4, 0), "code": Rows(4, 1)})
    first, last = trainer.state.log_history
    assert first == {"step": 0, "loss": 5.0} and "eval_code_loss" in last


def test_without_matching_names_the_macro_covers_all(make_trainer, sources):
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": {"a": Rows(8, 5), "b": Rows(8, 6)}})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_a_loss"] + metrics["eval_b_loss"]) / 2)
    assert "eval_ood_loss" not in metrics


def test_a_source_of_weight_zero_is_neither_ood_nor_macro(make_trainer, sources):
    share = {"text": 1.0, "code": 0.0, "math": 0.0}
    kwargs = {"eval_dataset": {"text": Rows(8, 0), "code": Rows(8, 1), "law": Rows(8, 5)}}
    metrics = make_trainer(sources, trainer_kwargs=kwargs, mixture_weights=share).evaluate()
    assert metrics["eval_loss"] == metrics["eval_text_loss"]
    assert metrics["eval_ood_loss"] == metrics["eval_law_loss"]


@pytest.mark.parametrize("name", ["ood", "macro", "macro over OOD"])
def test_the_names_of_means_are_reserved(make_trainer, sources, name):
    with pytest.raises(ValueError, match=f"evaluation set name '{name}' is reserved"):
        make_trainer(sources, trainer_kwargs={"eval_dataset": {name: Rows(8, 5)}})
    with pytest.raises(ValueError, match=f"source name '{name}' is reserved"):
        make_trainer({**sources, name: Rows(16, 5)})


def test_an_evaluation_set_without_rows_is_refused(make_trainer, sources):
    """It would have no loss, and be missing in the mean without a word."""
    with pytest.raises(ValueError, match="evaluation set 'code' has no rows"):
        make_trainer(sources, trainer_kwargs={"eval_dataset": {"text": Rows(8, 0), "code": Rows(0, 1)}})


def test_early_stopping_and_best_model_work_on_the_macro_loss(make_trainer, sources):
    held_out = {"text": Rows(8, 0), "law": Rows(8, 5)}
    trainer = make_trainer(
        sources,
        trainer_kwargs={
            "eval_dataset": held_out,
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)],
        },
        max_steps=6,
        learning_rate=10.0,  # diverges in the first step
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert trainer.state.global_step < 6
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("metric", ["eval_text_perplexity", "perplexity", "eval_ood_perplexity"])
def test_the_model_of_the_lowest_perplexity_is_kept(make_trainer, sources, metric):
    trainer = make_trainer(
        sources,
        trainer_kwargs={"eval_dataset": {"text": Rows(8, 0), "law": Rows(8, 5)}},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    key = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(set(values)) == 3
    assert trainer.evaluate()[key] == pytest.approx(min(values))


def test_sources_that_replace_the_training_data_are_an_error(make_trainer, sources):
    trainer = make_trainer(sources)
    trainer.train_dataset = {"other": Rows(40, 0)}
    with pytest.raises(ValueError, match="Build a new trainer for them"):
        trainer.train()


def test_keyword_arguments_reach_the_parents_evaluate(make_trainer, sources):
    received = []

    class Parent(Trainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", max_length=None):
            received.append(max_length)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    from hf_nexus import NexusTrainerMixin

    class Ours(NexusTrainerMixin, Parent):
        pass

    trainer = make_trainer(sources, trainer_class=Ours, trainer_kwargs={"eval_dataset": {"text": Rows(4, 0)}})
    trainer.evaluate(max_length=7)
    assert received == [7]


class StopAfterTwoSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_gradient_cosines_on_request(make_trainer, sources):
    trainer = make_trainer(sources, max_steps=4, gradient_cosine_steps=2)
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "cosine/text/code" in entry]
    assert logged == [0, 2, 4]  # at the weights before the third step, and at the end
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    logs = last_log(trainer, "cosine/code/math")
    assert all(-1 <= logs[f"cosine/{pair}"] <= 1 for pair in ("text/code", "text/math", "code/math"))
    plain = make_trainer(sources, max_steps=4)
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))  # the measurement changes no weights
    control = make_trainer(sources, max_steps=1, gradient_cosine_steps=1, nexus=False)
    control.train()
    first, of_control = (
        next(entry for entry in run.state.log_history if "cosine/text/code" in entry) for run in (trainer, control)
    )
    assert of_control["cosine/text/code"] == first["cosine/text/code"]
    stopped = make_trainer(sources, max_steps=9, gradient_cosine_steps=5)
    stopped.add_callback(StopAfterTwoSteps)
    stopped.train()
    assert [entry["step"] for entry in stopped.state.log_history if "cosine/text/code" in entry] == [0, 2]


def test_cosines_are_of_the_loss_that_is_trained_on(make_trainer, sources):
    def summed(outputs, labels, num_items_in_batch):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    found = []
    for kwargs in ({}, {"compute_loss_func": summed}):
        trainer = make_trainer(sources, max_steps=1, gradient_cosine_steps=1, trainer_kwargs=kwargs)
        trainer.train()
        found.append([entry["cosine/text/code"] for entry in trainer.state.log_history if "cosine/text/code" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(found[1]) == 2


def test_a_new_start_logs_the_first_cosines_again(make_trainer, sources):
    """With a smaller batch, after the memory was exhausted: its log is empty."""
    trainer = make_trainer(sources, max_steps=2, gradient_cosine_steps=2, auto_find_batch_size=True)

    def exhaust(event):
        if trainer._train_batch_size == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer.add_callback(AtEvents(exhaust, "on_pre_optimizer_step"))
    trainer.train()
    assert trainer._train_batch_size == 1
    assert [entry["step"] for entry in trainer.state.log_history if "cosine/text/code" in entry] == [0, 2]


def test_each_pair_of_sources_logs_its_own_cosine(make_trainer, sources):
    """Names may hold a hyphen: a-b and c are another pair than a and b-c."""
    named = dict(zip(("a-b", "c", "a", "b-c"), [*sources.values(), sources["text"]], strict=True))
    trainer = make_trainer(named, max_steps=1, gradient_cosine_steps=1)
    trainer.train()
    assert len([key for key in trainer.state.log_history[0] if key.startswith("cosine/")]) == 6


def test_gradient_cosines_of_one_plain_dataset_are_refused(make_trainer, sources):
    with pytest.raises(ValueError, match="several sources"):
        make_trainer(sources["text"], gradient_cosine_steps=1)


def test_gradient_cosines_of_a_stream_need_rows_held_out(make_trainer, sources):
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": list(range(16)), "labels": list(range(16))}] * 20)
    stream = {"text": rows.to_iterable_dataset(), "code": rows}
    settings = {"gradient_cosine_steps": 1, "max_steps": 1, "mixture_weights": {"text": 0.5, "code": 0.5}}
    with pytest.raises(ValueError, match=r"'text' is a stream.*evaluation set"):
        make_trainer(stream, **settings)
    with pytest.raises(ValueError, match=r"'text' is a stream.*map-style evaluation set"):
        make_trainer(stream, trainer_kwargs={"eval_dataset": {"text": rows.to_iterable_dataset()}}, **settings)
    with pytest.raises(ValueError, match="'code' is a stream"):
        held_out = {"text": rows, "code": rows.to_iterable_dataset()}
        make_trainer(stream, trainer_kwargs={"eval_dataset": held_out}, **settings)
    trainer = make_trainer(stream, trainer_kwargs={"eval_dataset": {"text": rows}}, **settings)
    trainer.train()
    assert "cosine/text/code" in trainer.state.log_history[0]


# ---- Saving and resuming ----


def test_resuming_after_the_last_step_trains_no_more(make_trainer, sources, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    whole = make_trainer(sources, **saving)
    whole.train()
    resumed = make_trainer(sources, tiny_llama(seed=1), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert resumed.state.global_step == 2
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    longer = make_trainer(sources, tiny_llama(seed=1), **saving | {"max_steps": 3})
    longer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert longer.state.global_step == 3
    # A plain dataset without Nexus behaves as in the base class, including this step.
    plain = make_trainer(sources["text"], tiny_llama(seed=1), **saving | {"nexus": False, "max_steps": 2})
    plain.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert plain.state.global_step == 3


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"inner_direction": "random"},
        {"inner_lr_schedule": "follow", "lr_scheduler_type": "linear"},
        {"dataloader_num_workers": 2},
        {"nexus": False},
    ],
    ids=["gradient", "random", "follow", "workers", "off"],
)
def test_resume_is_bit_exact(make_trainer, sources, tmp_path, config):
    """A run that resumes in the second epoch ends with the weights, token counts and epoch of an uninterrupted run."""
    config = {"max_steps": 16, "save_strategy": "steps", "save_steps": 5, "logging_steps": 4} | config
    whole = make_trainer(sources, output_dir=str(tmp_path / "whole"), **config)
    whole.train()
    resumed = make_trainer(sources, model=tiny_llama(seed=9), output_dir=str(tmp_path / "again"), **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-15"))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.state.epoch == resumed.state.epoch
    for name in sources:
        assert last_log(whole)[f"tokens/{name}"] == last_log(resumed)[f"tokens/{name}"]


def test_resuming_with_other_sources_goes_on_from_what_is_known(make_trainer, sources, tmp_path):
    config = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    make_trainer(sources, **config, max_steps=1).train()
    changed = make_trainer({"text": sources["text"], "new": Rows(40, 4)}, **config, max_steps=3)
    with pytest.raises(ValueError, match=r"source 'code' is gone.*source 'new' is new.*allow_mixture_change"):
        changed.train(resume_from_checkpoint=True)
    changed.args.allow_mixture_change = True
    changed.train(resume_from_checkpoint=True)
    assert set(changed.meter.trained_tokens) == {"text", "new"}


def test_token_counts_are_complete_at_the_end(make_trainer, sources):
    trainer = make_trainer(sources, max_steps=3, logging_steps=100)
    trainer.train()
    assert sum(trainer.meter.trained_tokens.values()) == 3 * 4 * 2 * 15


def test_only_the_lines_of_the_trainer_have_its_numbers(make_trainer, sources, monkeypatch):
    """A script may log a loss on one rank only, which must not wait for the others."""

    class Ours(NexusTrainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"loss": 1.0})
            self.log({"train_loss": 1.0})
            return super().compute_loss(*args, **kwargs)

    updates, plots = [], []
    monkeypatch.setattr("hf_nexus.trainer.mixin.send_plots", lambda *args: plots.append(args))
    trainer = make_trainer(sources, trainer_class=Ours, max_steps=3)
    update = trainer.meter.update_totals
    trainer.meter.update_totals = lambda step: updates.append(update(step))
    trainer.train()
    trainer.evaluate(Rows(4, 0), metric_key_prefix="train")
    assert len(updates) == 4 and len(plots) == 1


def test_settings_are_saved_and_a_change_is_named(make_trainer, sources, tmp_path, caplog):
    trainer = make_trainer(sources, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (Path(trainer.args.output_dir), Path(trainer.args.output_dir, "checkpoint-1")):
        settings = yaml.safe_load((folder / "nexus.yaml").read_text())
        assert settings["inner_lr"] == 0.05
        assert settings["gradient_accumulation_steps"] == 4
        assert settings["mixture_weights"]["text"] == pytest.approx(40 / 96)
    logging.getLogger("transformers").propagate = True
    changed = make_trainer(sources, inner_lr=0.2)
    with caplog.at_level(logging.WARNING):
        changed.train(resume_from_checkpoint=str(folder))
    assert "Resuming with inner_lr=0.2; the checkpoint was trained with 0.05" in caplog.text
    assert "inner_direction" not in caplog.text
    (folder / "nexus.yaml").write_text("")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"nexus\.yaml is empty"):
        changed.train(resume_from_checkpoint=str(folder))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"inner_direction": "up"}, "inner_direction: 'up' is not allowed"),
        ({"inner_lr": -0.1}, "inner_lr: -0.1 is not allowed"),
        ({"inner_lr_schedule": "cosine"}, "inner_lr_schedule: 'cosine'"),
        ({"mixture_weights": "{text: 1"}, "not valid JSON"),
        ({"mixture_weights": {"text": -1}}, r"mixture_weights\.text: -1"),
        ({"mixture_weights": {"text": 1.0}}, "the training sources are text, code, math"),
        ({"train_sampling_strategy": "group_by_length"}, "order is set by source_schedule"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"snapshot_device": "disk"}, "snapshot_device: 'disk'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(make_trainer, sources, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(sources, **config)


def test_another_data_loader_for_a_mixture_is_an_error(make_trainer, sources):
    """Its rows would have no source, and the mixture weights no effect."""

    class Own(NexusTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(sources["text"], 2, collate_fn=self.data_collator)

    with pytest.raises(ValueError, match=r"does not say which source.*get_train_dataloader\(\)"):
        make_trainer(sources, trainer_class=Own).train()
    make_trainer(sources["text"], trainer_class=Own).train()


def test_weights_for_a_dataset_without_sources_are_refused(make_trainer, sources):
    with pytest.raises(ValueError, match="without sources"):
        make_trainer(sources["text"], mixture_weights={"text": 1.0})


# ---- Streams ----


def test_a_stream_that_ends_inside_a_window_drops_it(make_trainer, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            rows = Rows(11, 0)
            yield from (rows[i] for i in range(11))

    trainer = make_trainer(Stream(), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    start = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "its 3 micro-batches were dropped" in caplog.text
    assert not torch.equal(start, weights(trainer))


# ---- The base class ----


def visible(trainer, folder) -> dict:
    """What a run shows: its log without times, callbacks, files and weights."""
    skipped, ours = ("runtime", "per_second"), ("manifest.json",)
    log = [{k: v for k, v in e.items() if not k.endswith(skipped)} for e in trainer.state.log_history]
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    return {
        "log": log,
        "callbacks": [type(c).__name__ for c in trainer.callback_handler.callbacks],
        "stateful": list(state["stateful_callbacks"]),
        "files": sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if "runs" not in p.parts and p.name not in ours
        ),
        "weights": weights(trainer).tolist(),
    }


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_a_plain_run_without_the_update_is_the_trainers(sources, tmp_path, report_to):
    if report_to == "tensorboard":
        pytest.importorskip("tensorboard")
    seen = []
    for name, trainer_class, config in (("a", Trainer, TrainingArguments), ("b", NexusTrainer, NexusConfig)):
        options = {"nexus": False} if config is NexusConfig else {}
        args = config(
            str(tmp_path / name), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1,
            gradient_accumulation_steps=2, per_device_train_batch_size=2, report_to=report_to, use_cpu=True,
            disable_tqdm=True, **options,
        )  # fmt: skip
        held_out = {"text": Rows(6, 0, pad=True), "law": Rows(6, 5)}
        trainer = trainer_class(tiny_llama(), args, train_dataset=sources["text"], eval_dataset=held_out)
        trainer.train()
        metrics = trainer.evaluate()
        assert trainer.args is args
        seen.append({**visible(trainer, tmp_path / name), "metrics": set(metrics)})
    assert seen[0] == seen[1]


def test_a_step_can_be_called_directly_without_the_update(make_trainer, sources):
    losses = []
    for trainer_class in (Trainer, NexusTrainer):
        args = make_trainer(sources["text"], nexus=False).args
        trainer = trainer_class(tiny_llama(), args, train_dataset=sources["text"])
        trainer.create_optimizer_and_scheduler(1)
        trainer.current_gradient_accumulation_steps = 1
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.training_step(trainer.model, batch))
    assert torch.equal(*losses)


@pytest.mark.parametrize("config", [NexusConfig, TrainingArguments])
def test_the_users_arguments_stay_untouched(sources, tmp_path, config):
    args = config(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, hub_token="secret")
    before = dict(vars(args))
    trainer = NexusTrainer(tiny_llama(), args, train_dataset=sources)
    trainer.train()
    trainer.save_model()
    assert vars(args) == before and args.logging_nan_inf_filter
    assert trainer.args.nexus and not trainer.args.logging_nan_inf_filter


def test_a_base_class_may_take_few_arguments(sources, tmp_path):
    class Few(Trainer):
        def __init__(self, model, args, train_dataset):
            super().__init__(model, args, train_dataset=train_dataset)

    class Own(NexusTrainerMixin, Few):
        pass

    args = NexusConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    assert Own(tiny_llama(), args, sources).train().global_step == 1


def test_the_arguments_that_a_base_class_makes_are_kept(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @dataclasses.dataclass
    class OwnArguments(TrainingArguments):
        temperature: float = 0.5

    class Own(Trainer):
        def __init__(self, model=None, args=None, **kwargs):
            super().__init__(model, args or OwnArguments("own", use_cpu=True, seed=7), **kwargs)

    class NexusOwn(NexusTrainerMixin, Own):
        pass

    trainer = NexusOwn(tiny_llama(), train_dataset=sources)
    assert type(trainer.args) is OwnArguments and (trainer.args.output_dir, trainer.args.seed) == ("own", 7)
    assert trainer.args.nexus and trainer.args.inner_lr == NexusConfig("out").inner_lr
    assert trainer._walker._args is trainer.args


def test_a_base_class_that_takes_a_dict_samples_it(make_trainer, sources):
    seen = []

    class Own(Trainer):
        def __init__(self, *, train_dataset: dict[str, torch.utils.data.Dataset] | None = None, **kwargs):
            super().__init__(train_dataset=train_dataset, **kwargs)

        def get_train_dataloader(self):
            seen.append(self.train_dataset)
            return [self.data_collator([row]) for rows in self.train_dataset.values() for row in rows]

    class NexusOwn(NexusTrainerMixin, Own):
        pass

    for nexus in (True, False):
        make_trainer(sources, trainer_class=NexusOwn, nexus=nexus).train()
    assert seen == [sources, sources]
    with pytest.raises(ValueError, match="this trainer samples a dict of datasets itself"):
        make_trainer(sources, trainer_class=NexusOwn, mixture_weights={"text": 1.0})


def test_a_layer_is_unfrozen_as_the_error_says(make_trainer, sources):
    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 1:
                weight.requires_grad_(True)
                optimizer.param_groups[0]["params"].append(weight)

    model = tiny_llama()
    weight = model.lm_head.weight.requires_grad_(False)
    before = weight.clone()
    trainer = make_trainer(sources, model, max_steps=3, lr_scheduler_type="linear")
    trainer.add_callback(Unfreeze())
    trainer.train()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("options", [{}, {"matrix_optimizer": "muon"}])
def test_parameters_of_a_loss_take_part_in_the_path(make_trainer, sources, options):
    """sentence-transformers has losses with a classifier, which the optimizer trains as well."""
    scale = torch.nn.Parameter(torch.ones(()))

    class Own(NexusTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) * scale**2

        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            optimizer.add_param_group({"params": [scale]})
            return optimizer

    trainer = make_trainer(sources, trainer_class=Own, **options)
    trainer.train()
    assert any(p is scale for p in trainer._walker.nexus.params) and scale != 1
