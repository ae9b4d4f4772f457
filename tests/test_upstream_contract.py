"""What we rely on upstream beyond documented interfaces: a failure here says what moved."""

import inspect

import pytest
import torch
from torch.optim.sgd import sgd
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from tests.conftest import Rows, tiny_llama


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_get_train_sampler", ["self", "train_dataset"]),
        ("_get_collator_with_removed_columns", ["self", "data_collator", "description"]),
        ("get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        ("_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("_prepare_for_training", ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("evaluate", ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("log", ["self", "logs", "start_time"]),
    ],
)
def test_the_hooks_that_we_override_exist_with_these_parameters(method, parameters):
    assert list(inspect.signature(getattr(Trainer, method)).parameters) == parameters


def test_a_window_is_prefetched_whole_and_only_its_last_step_syncs(make_trainer):
    seen = []

    class Spy(Trainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            seen.append(len(batches))
            return batches, items

        def training_step(self, *args, **kwargs):
            seen.append(bool(self.accelerator.gradient_state.sync_gradients))
            return super().training_step(*args, **kwargs)

    Spy(tiny_llama(), make_trainer(Rows(20, 0), max_steps=2).args, train_dataset=Rows(20, 0)).train()
    assert seen == [4, False, False, False, True] * 2


def test_the_training_loaders_collator_is_asked_for_by_this_description(make_trainer):
    asked = []

    class Spy(Trainer):
        def _get_collator_with_removed_columns(self, data_collator, description=None):
            asked.append(description)
            return super()._get_collator_with_removed_columns(data_collator, description)

    args = make_trainer(Rows(20, 0)).args
    Spy(tiny_llama(), args, train_dataset=Rows(8, 0), eval_dataset=Rows(8, 0)).get_train_dataloader()
    assert asked == ["Training"]


def test_loss_is_divided_by_the_current_number_of_accumulation_steps_without_a_count(make_trainer):
    """Inside a window we set it to 1, and the loss must then be the micro-batch's mean."""
    args = make_trainer(Rows(8, 0)).args
    model = tiny_llama()
    trainer = Trainer(model, args, train_dataset=Rows(8, 0))
    trainer.create_optimizer()
    trainer.model_accepts_loss_kwargs = False
    batch = {k: v[None] for k, v in Rows(8, 0)[0].items()}
    losses = []
    for steps in (1, 4):
        trainer.current_gradient_accumulation_steps = steps
        losses.append(float(trainer.training_step(model, dict(batch), None)))
    assert losses[0] == pytest.approx(4 * losses[1])


def test_stateful_callbacks_travel_in_the_trainer_state(tmp_path):
    class Meter(ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"count": 3}}

    state = TrainerState(stateful_callbacks=[Meter()])
    state.save_to_json(tmp_path / "s.json")
    loaded = TrainerState.load_from_json(tmp_path / "s.json")
    assert loaded.stateful_callbacks["Meter"]["attributes"]["count"] == 3


def test_fused_sgd_skips_on_a_device_flag_and_matches_by_memory(tmp_path):
    def step(p, g, lr, skip):
        options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
        sgd([p], [g], [None], fused=True, found_inf=torch.tensor(float(skip)), lr=lr, **options)
        return p

    p, g = torch.ones(3), torch.arange(3.0)
    assert torch.equal(step(p.clone(), g, torch.tensor(0.5), False), p - 0.5 * g)
    assert torch.equal(step(p.clone(), g * float("nan"), torch.tensor(float("nan")), True), p)


def test_accelerate_reaches_the_dataset_with_set_epoch_where_it_skips_batches(make_trainer):
    """On resume with several ranks the sampler lies two wrappers deep; the dataset is told instead."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
    from torch.utils.data import BatchSampler, SequentialSampler

    class Dataset(Rows):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

    dataset = Dataset(8, 0)
    sampler = BatchSampler(SequentialSampler(dataset), 2, False)
    loader = DataLoaderShard(dataset, batch_sampler=SkipBatchSampler(BatchSamplerShard(sampler, 2, 0), 1))
    loader.set_epoch(3)
    assert dataset.epoch == 3
