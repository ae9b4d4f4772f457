"""The planner's estimate of memory against the bytes that two ranks hold under FSDP2."""

import pytest

from hf_nexus.pretrain.layout import layout_of
from hf_nexus.pretrain.memory import estimate_memory
from hf_nexus.pretrain.model import build_model, count_parameters, model_config
from hf_nexus.pretrain.parsing import parse_arguments
from tests.support.tiny_config import write_config
from tests.trainer.distributed.memory_worker import FLAGS


def test_shards_and_gathered_layers_are_estimated(two_ranks, tmp_path):
    """Unlike GPUs, CPU processes do not gather the next layer ahead. The estimate counts it."""
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    config = ["--config", str(write_config(tmp_path)), "--dry_run", "--sharding", "fsdp2"]
    arguments = parse_arguments([*config, *flags])
    shape = model_config(arguments.model, 32)
    estimate = estimate_memory(arguments, count_parameters(shape), layout_of(arguments, 2))
    layer = sum(p.numel() for p in build_model(shape).model.layers[0].parameters())
    for rank in two_ranks:
        assert estimate.gathered - 4 * layer == rank["memory"]["gathered"]
        assert estimate.held == pytest.approx(rank["memory"]["held"], rel=0.03)
