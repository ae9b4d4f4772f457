"""The constructor rejects unsupported settings and suggests an alternative."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_nexus.trainer import checks
from tests.support.tiny import Rows, tiny_llama

INSTEAD = "torchrun --nproc_per_node"


@pytest.fixture
def build(make_trainer):
    return lambda **config: make_trainer(Rows(16, 0), **config)


@pytest.mark.parametrize(
    "kind", [kind for kind in DistributedType if kind.name in ("DEEPSPEED", "MEGATRON_LM", "XLA", "MULTI_HPU")]
)
def test_other_launches_are_refused(build, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=f"does not support {kind.value}.*{INSTEAD}.*fsdp_version"):
        build()


def launch(**facts) -> checks.Launch:
    return checks.Launch(**{"kind": DistributedType.FSDP, **facts})


def test_fsdp1_is_refused(build):
    with pytest.raises(ValueError, match=r"FSDP1.*set fsdp_version to 2"):
        checks.check_launch(build().args, launch(fsdp_version=1))


@pytest.mark.parametrize("facts", [{"fsdp_version": 2}, {"kind": DistributedType.MULTI_GPU, "sharded_at_load": True}])
def test_local_mode_is_refused_for_a_sharded_model(build, facts):
    checks.check_launch(build(inner_sync="node").args, launch(**facts))
    with pytest.raises(ValueError, match="inner_sync='node' or 'global', or DDP"):
        checks.check_launch(build(inner_sync="local").args, launch(**facts))


@pytest.mark.parametrize("facts", [{"fsdp_version": 2}, {"sharded_at_load": True}])
def test_a_reduction_dtype_without_effect_is_refused(build, facts):
    checks.check_launch(build(reduce_dtype="bfloat16").args, launch(kind=DistributedType.MULTI_CPU))
    with pytest.raises(ValueError, match=r"reduce_dtype='bfloat16' has no effect on a sharded model.*bf16=True"):
        checks.check_launch(build(reduce_dtype="bfloat16").args, launch(**facts))
    checks.check_launch(build(reduce_dtype="bfloat16", nexus=False).args, launch(**facts))
    with pytest.raises(ValueError, match=r"'bfloat16' is for inner gradients, .* to 'node' or 'global'"):
        build(reduce_dtype="bfloat16", inner_sync="local")


def test_parameters_that_fsdp_leaves_out_are_refused():
    with pytest.raises(ValueError, match="'weight' is trainable, but FSDP2 does not shard it"):
        checks.check_sharded(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("size", "why"),
    [("get_tp_size", "when it loads them"), ("get_cp_size", "run on a CPU"), ("get_sp_size", "run on a CPU")],
)
def test_parallelism_inside_the_model_is_refused(build, monkeypatch, size, why):
    """Tensor parallelism is supported for models that transformers has sharded."""
    trainer = build()
    monkeypatch.setattr(trainer, size, lambda: 2)
    with pytest.raises(ValueError, match=why):
        trainer._check()


def test_pipeline_parallelism_is_refused(build):
    checks.check_launch(build().args, launch(kind=DistributedType.MULTI_CPU, sharded_at_load=True, tensor_size=2))
    with pytest.raises(ValueError, match="each rank has other layers"):
        checks.check_launch(
            build().args, launch(kind=DistributedType.MULTI_GPU, sharded_at_load=True, pipeline_size=2)
        )


@pytest.mark.parametrize(
    "optim", [name for name in OptimizerNames if name.value.endswith("_layerwise") or "lomo" in name.value]
)
def test_optimizers_that_step_inside_backward_are_refused(build, optim):
    with pytest.raises(ValueError, match=f"optim='{optim.value}' updates weights inside the backward pass.*adamw"):
        build(optim=optim)


def test_fp16_is_refused(build):
    """Gradient scaling does not work with normalized steps. The alternative is bf16 autocast over float32 weights."""
    with pytest.raises(ValueError, match=r"fp16.*bf16=True over float32"):
        build(fp16=True)


def test_fp16_of_a_launcher_is_refused(build, monkeypatch):
    """`accelerate launch` names the type in the environment. `bf16=True` has precedence over it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"fp16.*--mixed_precision bf16"):
        build()
    assert build(bf16=True).accelerator.mixed_precision == "bf16"


@pytest.mark.parametrize("config", [{"gradient_accumulation_steps": 0}, {"max_steps": 10**20}, {"seed": -1}])
def test_numbers_that_cannot_be_counted_with_are_refused(build, config):
    with pytest.raises(ValueError, match=rf"^{next(iter(config))}: .* is not allowed; it must be a number of"):
        build(**config)


def test_processes_that_would_each_train_alone_are_refused(build, monkeypatch):
    """The Trainer does this without a GPU unless use_cpu is set."""
    trainer = build()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched.*use_cpu=True"):
        trainer._check()


def test_data_parallel_is_refused_with_the_torchrun_line(build, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match=f"{INSTEAD} 4"):
        build()
    for has_sources in (False, True):  # without Nexus, only their losses are counted in another way
        off = SimpleNamespace(nexus=False, n_gpu=4, checkpoint_async=False)
        with pytest.raises(ValueError, match=f"{INSTEAD} 4") if has_sources else nullcontext():
            checks.check_launch(off, launch(kind=DistributedType.NO, has_sources=has_sources))


def test_models_spread_at_load_time_are_refused(build):
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="device_map"):
        build(model=model)


def test_what_is_refused_for_training_may_evaluate(make_trainer, monkeypatch):
    """A trainer without training data, until it has them. The losses of DataParallel are those of replicas."""
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    trainer = make_trainer(None, model=model)
    trainer.train_dataset = Rows(16, 0)
    with pytest.raises(ValueError, match="device_map"):
        trainer.train()
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match=f"{INSTEAD} 4"):
        make_trainer(None)


def test_fp16_is_refused_once_there_is_training_data(make_trainer):
    trainer = make_trainer(None)
    trainer.args.mixed_precision = "fp16"  # an accelerator on a CPU cannot have it
    trainer._feed.check(None, trains=trainer.data.dataset is not None)
    with pytest.raises(ValueError, match="does not support fp16"):
        trainer._check_start(1)


def test_what_is_refused_with_nexus_is_not_without(make_trainer):
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert isinstance(make_trainer(Rows(16, 0), model=model, nexus=False), Trainer)


@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("nexus", [True, False])
def test_a_bad_output_folder_is_named(make_trainer, sources, tmp_path, nexus, mixture):
    """With `nexus=False` and one training set, the error is the Trainer's."""
    (tmp_path / "file").touch()
    error = ValueError if nexus or mixture else OSError
    for folder in ("file", "file/out"):
        with pytest.raises(error, match=r"File exists|Not a directory"):
            make_trainer(sources if mixture else Rows(8, 0), nexus=nexus, output_dir=str(tmp_path / folder))


def test_a_folder_that_is_only_read_allows_evaluation(make_trainer, sources, tmp_path, monkeypatch):
    """As in the Trainer, which writes into the folder while it trains."""
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: pytest.fail("The folder is written to."))
    assert "eval_loss" in make_trainer(sources, output_dir=str(tmp_path)).evaluate(Rows(2, 0))


def test_a_snapshot_on_the_host_of_an_apple_gpu_is_refused():
    args = SimpleNamespace(
        checkpoint_async=False, n_gpu=1, nexus=True, snapshot_device="cpu", device=torch.device("mps")
    )
    with pytest.raises(ValueError, match="snapshot_device='cpu' is not possible on an Apple GPU"):
        checks.check_launch(args, launch(kind=DistributedType.NO))


def test_a_trainer_may_name_classes_that_are_missing():
    class Parent(Trainer):
        def __init__(self, model: "MissingModel", args: TrainingArguments | None = None):  # noqa: F821
            super().__init__(model, args)

    checks.check_trl_arguments(Parent, None, on=True)


@pytest.mark.parametrize(("sharded", "strategy"), [(True, "every_save"), (True, "checkpoint"), (False, "every_save")])
def test_pushes_without_weights_are_announced(build, monkeypatch, caplog, sharded, strategy):
    trainer = build(hub_strategy=strategy)
    trainer.args.push_to_hub = True  # without a Hub
    monkeypatch.setattr(type(trainer), "_saves_shards", sharded)
    trainer._check_start(1)
    announced = "Set hub_strategy to 'checkpoint' or 'all_checkpoints'" in caplog.text
    assert announced == (sharded and strategy == "every_save")
