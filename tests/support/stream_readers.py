"""The processes of a run that read a stream, without the run: ranks with data loader workers."""

import json
from typing import Any

from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.lanes import Lanes


class Readers:
    """
    Reads global micro-batches of one source on a number of ranks and workers, as a run does.

    `states` are the positions of a checkpoint, merged over its ranks, at micro-batch `first`.
    """

    def __init__(
        self,
        dataset: Any,
        ranks: int,
        workers: int,
        lanes: Lanes,
        states: Any = None,
        first: int = 0,
        **options: Any,
    ):
        self.states = json.loads(json.dumps(states or {}))
        self.ordinal = first
        self.ranks = ranks
        self.processes = []
        for rank in range(ranks):
            slots = lanes.slots_of(rank, ranks)
            own = {
                name: {lane: state for lane, state in of.items() if int(lane) // lanes.turns in slots}
                for name, of in self.states.items()
            }
            for _ in range(workers):
                stream = MixtureStream({"a": dataset}, **options)
                stream.place(rank, ranks, workers, lanes)
                stream.begin(own)
                self.processes.append(stream)
        self.workers = workers

    def read(self, count: int, rows: int) -> list[list[Any]]:
        """The next global micro-batches of `rows` rows, each as the rows of all ranks."""
        found = []
        for _ in range(count):
            batch: list[Any] = []
            for stream in self.processes[self.ordinal % self.workers :: self.workers]:
                each = rows // self.ranks
                first = self.ordinal * rows + stream.rank * each
                got = stream.__getitems__([(first + row, 0) for row in range(each)])
                got.tag.states[0].store(self.states)
                batch += [row["x"] if "x" in row else tuple(row["input_ids"].tolist()) for row in got]
            found.append(batch)
            self.ordinal += 1
        return found
