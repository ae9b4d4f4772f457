"""Private behaviour of the upstream packages that this package uses. A failure shows what changed."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim.sgd import sgd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import _is_peft_model

from hf_nexus import NexusTrainerMixin
from hf_nexus.trainer.arguments import changed
from tests.support.tiny import Rows, tiny_llama

# Hooks of the Trainer that the mixin overrides, with the parameters that it names. `None`: they are passed on unseen.
HOOKS = {
    "create_accelerator_and_postprocess": [],
    "call_model_init": ["trial"],
    "init_hf_repo": ["token", "private"],
    "train": None,
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_get_train_sampler": ["train_dataset"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "create_optimizer": ["model"],
    "_init_training_state": [
        *("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial")
    ],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "floating_point_ops": ["inputs"],
    "log": ["logs", "start_time"],
    "_get_dataloader": [
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "predict": None,
    "_maybe_log_save_evaluate": None,
    "_determine_best_metric": ["metrics", "trial"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_finalize_training": None,
    "_load_best_model": [],
    "save_model": ["output_dir", "_internal_call"],
    "_save": ["output_dir", "state_dict"],
    "save_state": [],
    "create_model_card": None,
    "_push_from_checkpoint": ["checkpoint_folder"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_finish_current_push": [],
}
# Methods of the Trainer that the mixin calls.
CALLED = {"_prepare_inputs": ["inputs"], "compute_loss_context_manager": [], "get_decay_parameter_names": ["model"]}


def test_every_overridden_hook_is_listed_here():
    overridden = {
        name for name, value in vars(NexusTrainerMixin).items() if callable(value) and hasattr(Trainer, name)
    }
    assert {name for name in overridden if not name.startswith("__")} == set(HOOKS)


@pytest.mark.parametrize("method", [*HOOKS, *CALLED])
def test_a_hook_exists_with_these_parameters(method):
    parameters = list(inspect.signature(getattr(Trainer, method)).parameters)[1:]
    expected = {**HOOKS, **CALLED}[method]
    assert expected is None or parameters == expected


def test_a_card_has_these_arguments_by_position():
    parameters = list(inspect.signature(Trainer.create_model_card).parameters)
    assert parameters[1:7] == ["language", "license", "tags", "model_name", "finetuned_from", "tasks"]


def test_a_loader_without_a_length_has_no_limit_of_epochs():
    trainer = SimpleNamespace(get_total_train_batch_size=lambda args: 2, get_sp_size=lambda: 1, num_examples=len)
    args = SimpleNamespace(max_steps=3, num_train_epochs=1, gradient_accumulation_steps=1)
    for loader, epochs in ((iter([]), sys.maxsize), ([1], 3)):
        assert Trainer.set_initial_training_values(trainer, args, loader)[0] == epochs


def test_the_arguments_are_set_before_the_device_is(tmp_path):
    """The mixin replaces the arguments there by a copy with the Nexus fields."""
    source = inspect.getsource(Trainer.__init__)
    assert source.count("self.args = ") == 1
    assert source.index("self.args = args") < source.index("self.create_accelerator_and_postprocess()")


def test_a_model_with_adapters_is_recognized():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    assert not _is_peft_model(model)
    assert _is_peft_model(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_causal_model_is_known_by_the_name_of_its_class(tmp_path):
    """The mixin corrects both attributes for a class of another name."""
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    model = tiny_llama()
    assert Trainer(model, args).label_smoother is not None and Trainer(model, args)._loss_shifts_labels
    assert model.loss_type == "ForCausalLM"
    other = type("Other", (type(model),), {})(model.config)
    assert not Trainer(other, args)._loss_shifts_labels and other.loss_type is None


def test_a_run_that_is_resumed_at_its_end_trains_one_step(tmp_path):
    """The mixin skips `_run_epoch` in this case."""
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, max_steps=2, **options)
    trainer = Trainer(tiny_llama(), args, train_dataset=Rows(16, 0))
    trainer.train()
    assert callable(trainer._run_epoch)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_a_window_is_prefetched_and_its_last_step_syncs(make_trainer):
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


def test_the_training_collator_has_this_description(make_trainer):
    asked = []

    class Spy(Trainer):
        def _get_collator_with_removed_columns(self, data_collator, description=None):
            asked.append(description)
            return super()._get_collator_with_removed_columns(data_collator, description)

    args = make_trainer(Rows(20, 0)).args
    Spy(tiny_llama(), args, train_dataset=Rows(8, 0), eval_dataset=Rows(8, 0)).get_train_dataloader()
    assert asked == ["Training"]


def test_the_loss_is_divided_by_the_accumulation_steps(make_trainer):
    """Inside a window their number is 1, and the loss is the mean of the micro-batch."""
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


def test_the_trainer_state_saves_stateful_callbacks(tmp_path):
    class Meter(ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"count": 3}}

    state = TrainerState(stateful_callbacks=[Meter()])
    state.save_to_json(tmp_path / "s.json")
    loaded = TrainerState.load_from_json(tmp_path / "s.json")
    assert loaded.stateful_callbacks["Meter"]["attributes"]["count"] == 3


def test_fused_sgd_skips_its_step_by_a_flag(tmp_path):
    def step(p, g, lr, skip):
        options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
        sgd([p], [g], [None], fused=True, found_inf=torch.tensor(float(skip)), lr=lr, **options)
        return p

    p, g = torch.ones(3), torch.arange(3.0)
    assert torch.equal(step(p.clone(), g, torch.tensor(0.5), False), p - 0.5 * g)
    assert torch.equal(step(p.clone(), g * float("nan"), torch.tensor(float("nan")), True), p)


def test_the_running_loss_and_batch_size_have_these_names(make_trainer):
    seen = []

    class Spy(Trainer):
        def training_step(self, *args, **kwargs):
            seen.append((float(self._tr_loss), self._globalstep_last_logged, self._train_batch_size))
            return super().training_step(*args, **kwargs)

    args = make_trainer(Rows(20, 0), max_steps=2, logging_steps=2).args
    Spy(tiny_llama(), args, train_dataset=Rows(20, 0)).train()
    assert seen[0] == (0.0, 0, 2) and seen[-1][0] > seen[1][0] > 0


def test_a_loader_counts_the_real_rows_of_its_last_batch():
    """With several ranks, Accelerate completes the last batch with rows of the first."""
    from accelerate.data_loader import DataLoaderShard

    dataset = Rows(5, 0)
    sampler = BatchSamplerShard(BatchSampler(SequentialSampler(dataset), 2, False), 2, 0)
    loader = DataLoaderShard(dataset, batch_sampler=sampler)
    loader.remainder = -1
    ends = [(loader.end_of_dataloader, loader.remainder, len(batch["labels"])) for batch in loader]
    assert ends == [(False, 1, 2), (True, 1, 2)]
    assert loader.total_batch_size == 4


@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_several_ranks_have_the_same_rows_in_a_micro_batch(size):
    """Of 8 rows. One rank alone has no `BatchSamplerShard`, so its last micro-batch has fewer."""

    def rows(ranks: int) -> list[list[int]]:
        sampler = BatchSampler(range(size), 8 // ranks, False)
        of_ranks = zip(*(BatchSamplerShard(sampler, ranks, rank) for rank in range(ranks)), strict=True)
        return [sorted(row for of_rank in batch for row in of_rank) for batch in of_ranks]

    assert rows(2) == rows(4) == rows(8)
    assert ([*BatchSampler(range(size), 8, False)] == rows(2)) == (size == 8)


def test_an_iterable_dataset_shows_its_layers():
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    assert stream._formatting is None and stream._distributed is None
    assert stream._ex_iterable.iter_arrow is not None
    mapped = stream.map(lambda row: row)
    assert hasattr(mapped._ex_iterable, "ex_iterable")
    joined = datasets.concatenate_datasets([stream, mapped])._ex_iterable
    assert [type(layer) for layer in joined.ex_iterables] == [type(s._ex_iterable) for s in (stream, mapped)]
    assert type(stream._ex_iterable.shard_data_sources(1, 0)) is type(stream._ex_iterable)
    split = import_module("datasets.distributed").split_dataset_by_node(stream, rank=0, world_size=2)
    assert split._distributed is not None
    assert stream.with_format("arrow")._formatting.is_table


def test_a_stream_of_files_shows_their_names_and_sizes(tmp_path):
    datasets = pytest.importorskip("datasets")
    Path(tmp_path, "a.jsonl").write_text('{"x": 1}\n')
    stream = datasets.load_dataset("json", data_files=f"{tmp_path}/*.jsonl", split="train", streaming=True)
    (file,) = stream._ex_iterable.kwargs["base_files"]
    assert import_module("datasets.utils.file_utils").xgetsize(file) == 9


FINGERPRINTS = """
from datasets import Dataset, load_dataset
a, b = (Dataset.from_list([{"x": text}] * 3) for text in "ab")
files = load_dataset("json", data_files="a.jsonl", split="train", cache_dir="cache")
mapped = a.map(lambda row: row, new_fingerprint="m")
sets = [a, b, mapped, a.select([0, 2]), a.select([2, 0]), files, files.select([1])]
found = [derived._fingerprint for d in sets for derived in (d, d.with_format("arrow"), d.select(range(1)))]
print(*found)
"""


def test_fingerprints_are_shared_and_follow_files(tmp_path, monkeypatch):
    """The names of cached rows depend on them."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)

    def own(rows):
        Path("a.jsonl").write_text(rows)
        exec(FINGERPRINTS, names := {})
        return names["found"]

    found = own('{"x": 1}\n' * 2)
    run = subprocess.run([sys.executable, "-c", FINGERPRINTS], capture_output=True, text=True, check=True)
    assert run.stdout.split() == found and len(set(found)) == len(found)
    changed = own('{"x": 2}\n' * 2)
    assert changed[:15] == found[:15] and not set(changed[15:]) & set(found[15:])


def test_the_worker_of_a_loader_has_this_place():
    worker = torch.utils.data._utils.worker
    assert worker._worker_info is None is torch.utils.data.get_worker_info()


def test_fsdp2_on_a_cpu_can_be_set_up_by_this_state():
    """For the tests of FSDP2 on CPU processes. With bf16, gradients are also reduced in bf16."""
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    assert isinstance(PartialState._shared_state, dict)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == policy.reduce_dtype == torch.bfloat16


def test_the_foreach_kernels_exist():
    a, b = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.full((3,), 2.0)]
    torch._foreach_copy_(a, b, non_blocking=True)
    assert all(map(torch.equal, a, b))
    torch._foreach_add_(a, b, alpha=0.5)
    torch._foreach_div_(a, 3)
    norms = torch._foreach_norm(a, 2, dtype=torch.float32)
    torch._foreach_sqrt_(a)
    torch._foreach_zero_(a)
    assert [float(n) for n in norms] == pytest.approx([0, 3**0.5]) and not any(t.any() for t in a)


def stock_trainer(folder):
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, hub_token="secret")
    return Trainer(tiny_llama(), args, train_dataset=Rows(8, 0), eval_dataset=Rows(4, 1))


def test_an_evaluation_is_logged_through_the_handler(tmp_path):
    """`held_back` replaces these two methods, because no argument of `evaluate` leaves them out."""
    trainer, seen = stock_trainer(tmp_path), []
    handler = trainer.callback_handler

    def note(name):
        def event(args, state, control, *values):
            seen.append(name)
            return control

        return event

    vars(handler).update(on_log=note("log"), on_evaluate=note("evaluate"))
    trainer.evaluate()
    assert seen == ["log", "evaluate"] and len(trainer.state.log_history) == 1


def test_a_prediction_closes_the_bar_of_an_evaluation():
    from transformers import ProgressCallback

    state = TrainerState()
    bars = ProgressCallback()
    bars.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    assert bars.prediction_bar is not None
    bars.on_predict(None, state, None, metrics={})
    assert bars.prediction_bar is None


def test_saved_arguments_contain_the_token(tmp_path):
    """Saved arguments are uploaded, so ours are saved without it."""
    trainer = stock_trainer(tmp_path)
    trainer.save_model()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token == "secret"


def test_the_new_name_of_checkpointing_has_the_value_of_the_old(tmp_path):
    """The plan reads the new name."""
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=True)
    assert args.activation_checkpointing and not TrainingArguments(str(tmp_path)).activation_checkpointing


def test_averaging_over_devices_is_read_from_the_arguments():
    """Neither method takes it as an argument, so `changed` sets it temporarily."""
    for method in (Trainer._get_num_items_in_batch, Trainer.compute_loss):
        assert "self.args.average_tokens_across_devices" in inspect.getsource(method)


def test_tokens_are_divided_by_the_ranks_with_the_same_rows(make_trainer, monkeypatch):
    """The mixin multiplies them again, because the Trainer counts on one rank only."""
    trainer = Trainer(tiny_llama(), make_trainer(Rows(4, 0)).args, train_dataset=Rows(4, 0))
    batch = {"labels": torch.ones(2, 5, dtype=torch.long)}
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with changed(trainer.args, average_tokens_across_devices=False):
        assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == 2 * 4 / 2


def test_fsdp2_shards_over_the_configured_dimensions():
    """`parallelism_of` leaves out that of the replicas."""
    assert "accelerator.parallelism_config.fsdp_dim_names" in inspect.getsource(fsdp2_prepare_model)
    config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    assert config.fsdp_dim_names == ["dp_replicate", "dp_shard_cp"]


def test_states_without_a_callback_are_saved_and_loaded(tmp_path):
    """The status of publishing is saved in `stateful_callbacks`."""
    trainer = stock_trainer(tmp_path)
    trainer.state.stateful_callbacks["Publisher"] = {"args": {}, "attributes": {"status": {"waiting": 1}}}
    trainer.save_state()
    loaded = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert loaded.stateful_callbacks["Publisher"]["attributes"] == {"status": {"waiting": 1}}


def test_pipelines_name_the_auto_class_of_each_task():
    """`find_pipeline_tag` reads the names of the classes that an Auto class loads, without importing them."""
    from transformers import AutoModelForCausalLM
    from transformers.pipelines import SUPPORTED_TASKS

    assert AutoModelForCausalLM in SUPPORTED_TASKS["text-generation"]["pt"]
    assert AutoModelForCausalLM._model_mapping._model_mapping["llama"] == "LlamaForCausalLM"


def test_the_precision_of_accelerate_can_be_chosen_again():
    """Another trainer with the same arguments may need it. The processes stay."""
    TrainingArguments("out", use_cpu=True)
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(mixed_precision="no", cpu=True)
    processes = dict(PartialState._shared_state)
    AcceleratorState._reset_state()
    assert not AcceleratorState._shared_state and PartialState._shared_state == processes
    assert Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_sends_everything_over_another_group(one_rank):
    """Gradients, which parameters are unused, and buffers. `share_buffers` sends the latter in the same way."""
    seen: list[tuple[str, str]] = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "c10d":
                group = next(a for a in args if isinstance(a, torch.ScriptObject))
                seen.append((op._schema.name, torch.distributed.ProcessGroup.unbox(group).group_name))
            return op(*args, **(kwargs or {}))

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, affine=False))
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    group = torch.distributed.new_group([0])
    for chosen in (group, torch.distributed.group.WORLD):
        ddp._update_process_group(chosen)
        assert ddp.process_group is chosen
        with Collectives():
            ddp(torch.randn(4, 2)).square().sum().backward()
        assert [name for name, _ in seen] == ["c10d::broadcast_"] * 2 + ["c10d::allreduce_"] * 2  # two dtypes
        assert {where for _, where in seen} == {chosen.group_name}
        seen.clear()
    assert ddp._comm_hooks == []
    ddp.register_comm_hook("state", allreduce_hook)
    assert ddp._comm_hooks == [(allreduce_hook, "state")]
    model[1].running_mean = torch.ones(3)
    ddp._assign_modules_buffers()
    assert ddp.broadcast_buffers and len(ddp.modules_buffers) == 3
    assert any(buffer is model[1].running_mean for buffer in ddp.modules_buffers)
    with Collectives():
        torch.distributed._broadcast_coalesced(group, ddp.modules_buffers, 2**20, 0)
    assert [name for name, _ in seen] == ["c10d::broadcast_"] * 2


def test_the_store_of_all_processes_is_found(one_rank):
    store = _get_default_store()
    assert not store.check(["step"])
    store.compare_set("step", "", "3")
    store.compare_set("step", "", "4")
    assert store.check(["step"]) and int(store.get("step")) == 3


def test_trl_prepares_a_dataset_with_these_arguments():
    trl = pytest.importorskip("trl")
    for trainer in (trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer, trl.RewardTrainer):
        names = list(inspect.signature(trainer._prepare_dataset).parameters)[1:]
        packing = ["packing", "formatting_func"] if trainer is trl.SFTTrainer else []
        assert names == ["dataset", "processing_class", "args", *packing, "dataset_name"]
    for trainer in (trl.DPOTrainer, trl.KTOTrainer):
        names = list(inspect.signature(trainer._precompute_ref_logps).parameters)
        assert names == ["self", "dataset", "name", "batch_size"]
