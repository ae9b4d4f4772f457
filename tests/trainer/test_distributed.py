"""What `trainer/distributed.py` does without a collective. Its collectives are tested in `distributed/`."""

import threading
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from hf_nexus.trainer import distributed
from hf_nexus.trainer.distributed import one_process_first


@pytest.mark.parametrize("fails", [False, True])
def test_one_process_goes_first_then_one_of_each_machine(monkeypatch, fails):
    """Six processes on two machines."""
    store, events = HashStore(), []
    monkeypatch.setattr(distributed, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "gather", lambda own: ["turn"])  # the threads stand for processes

    def process(rank: int) -> None:
        try:
            with one_process_first(SimpleNamespace(world_size=6, process_index=rank, local_process_index=rank % 3)):
                events.append(rank)
                if fails:
                    raise ValueError("no such file")
        except ValueError:
            return
        events.append("left")

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (5, 4, 3, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ranks, left = events[:6], events[6:]
    assert sorted(ranks) == list(range(6)) and ranks[0] == 0
    assert all(ranks.index(rank) > ranks.index(3) for rank in (4, 5))
    assert left == ([] if fails else ["left"] * 6)


def test_a_single_process_waits_for_nobody():
    with one_process_first(SimpleNamespace(world_size=1)):
        pass
