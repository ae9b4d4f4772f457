"""Checkpoints that are written while training goes on, by two ranks."""

import pytest

from tests.support.tiny import distance
from tests.trainer.distributed.conftest import results_of, shared
from tests.trainer.distributed.fsdp_worker import llama, trained
from tests.trainer.distributed.worker import make, sources

pytestmark = pytest.mark.slow


@pytest.fixture
def two(request: pytest.FixtureRequest) -> list[dict]:
    return results_of("two_ranks", "async", request)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_is_complete_and_resumed_to_the_bit(two, kind):
    for rank in two:
        assert rank[kind]["complete"]
        assert rank[kind]["again"] == rank[kind]["whole"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_sharded_in_another_way_or_on_one_rank(two, kind, tmp_path_factory, tmp_path):
    assert distance(two[0][kind]["other"], two[0][kind]["whole"]) < 1e-6
    saved = shared(tmp_path_factory) / "two_ranks_slow/async"
    one = make(tmp_path, sources(), llama(seed=5), per_device_train_batch_size=4)
    one = trained(one, resume_from_checkpoint=str(saved / kind / "checkpoint-3"))
    assert distance(one, two[0][kind]["whole"]) < 1e-5


def test_a_failed_write_of_one_rank_is_an_error_on_all(two):
    assert all("checkpoint-3 was not written: [Errno 28] No space left" in rank["failed"] for rank in two)
