"""Runs over streams to compare: their micro-batches and their ends."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.mixture import Mixture, MixtureConfig, SourceConfig

from .faults import AtEvents, K, weights
from .stream_documents import documents_of
from .tiny import tiny_llama
from .tiny_tokenizer import tiny_tokenizer

LENGTH = 8  # tokens of a row
STEPS = 6
VOCAB = 320  # size of the tiny tokenizer, with a margin
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


# ---- Sources ----


def ids(first: int, x: int) -> list[int]:
    """A row that can be identified: number `x` of the source whose tokens start at `first`."""
    return [first + x // 16, first + x % 16, *((first + x * j) % VOCAB for j in range(2, LENGTH))]


def table(rows: int, first: int = 0) -> Dataset:
    """Different tokenized rows."""
    tokens = [ids(first, x) for x in range(rows)]
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens, "x": list(range(rows))})


def texts(rows: int) -> Dataset:
    """Documents of many lengths, some longer than a row and some empty."""
    return Dataset.from_dict({"text": [f"{x} fox jumps" * (x * x % 5) for x in range(rows)], "x": list(range(rows))})


def pairs(rows: int) -> Dataset:
    """Prompts with completions, some of them empty. Some rows have no token to train on."""
    completions = [f"{x} jumps" * (x % 3) for x in range(rows)]
    return texts(rows).add_column("completion", completions)


def generated(shards: list[list[int]], first: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for x in shard:
            yield {"input_ids": ids(first, x), "labels": ids(first, x), "x": x}


def sharded(sizes: list[int], first: int) -> IterableDataset:
    """Rows of a generator, in shards of different sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    shards = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return IterableDataset.from_generator(generated, gen_kwargs={"shards": shards, "first": first})


class Replayed(torch.utils.data.IterableDataset):
    """A dataset that cannot return to a position."""

    def __init__(self, rows: int, first: int):
        self.rows, self.first = rows, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return generated([list(range(self.rows))], self.first)


def kinds() -> dict[str, Callable[[], dict[str, Any]]]:
    """Three sources of each kind. A run passes over each source more than once."""
    return {
        "map-style": lambda: {"a": table(14), "b": table(9, 100), "c": table(9, 200)},
        "rows": lambda: {"a": table(11).to_iterable_dataset(3), "b": sharded([3, 5], 100), "c": sharded([9], 200)},
        "documents": lambda: {
            name: documents_of(texts(n).to_iterable_dataset(2), LENGTH) for name, n in SIZES.items()
        },
        "completions": lambda: {  # next to tokens, to be packed or packed
            "a": documents_of(pairs(12).to_iterable_dataset(2), LENGTH, **COMPLETIONS),
            "b": documents_of(table(9).to_iterable_dataset(2), LENGTH, tokens_column="input_ids"),
            "c": documents_of(table(5).to_iterable_dataset(2), LENGTH, tokens_column="input_ids", packed=True),
        },
        "mix": lambda: {
            "a": table(11),
            "b": sharded([3, 5], 100).with_format("torch"),
            "c": documents_of(texts(20).to_iterable_dataset(3), LENGTH),
        },
        "replay": lambda: {
            "a": Replayed(11, 0),
            "b": sharded([5, 6], 100).shuffle(seed=1, buffer_size=4).take(11),
            "c": table(9, 200),
        },
    }


COMPLETIONS = {"prompt_column": "text", "completion_column": "completion", "loss_on": "completion"}
SIZES = {"a": 12, "b": 9, "c": 10}


def mixture(sources: Mapping[str, Any], shares: Any = None, buffer_size: int = 6, **limits: float) -> Mixture:
    """A loaded mixture of sources, shuffled in small blocks. `limits` are their `max_epochs`."""
    shares = {name: WEIGHTS[name] for name in sources} if shares is None else shares
    configs = {
        name: SourceConfig(path=f"{name}.jsonl", streaming=True, max_epochs=limits.get(name)) for name in sources
    }
    stages = [{"until": 1.0, "weights": shares}] if isinstance(shares, Mapping) else shares
    config = MixtureConfig(configs, LENGTH, buffer_size=buffer_size, stages=stages, isolate_documents=False)
    return Mixture(config, dict(sources), {}, dict.fromkeys(sources), 0)


# ---- Runs ----


class Recorder(NexusTrainer):
    """Records for each outer step the micro-batches, the epoch, and the number of rows read before them."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.micro_batches: dict[int, list[tuple[str, list]]] = defaultdict(list)
        self.epochs: dict[int, float] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(AtEvents(self._note_epoch, "on_step_end"))

    def _note_epoch(self, event: str) -> None:
        self.epochs[self.state.global_step] = self.state.epoch

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        source = self._window.sources[len(self._window.inputs)]
        self.micro_batches[self.state.global_step].append((source, inputs["input_ids"].tolist()))
        return super().training_step(model, inputs, num_items_in_batch)

    def sources(self) -> list[str]:
        """The sources of all micro-batches, in order."""
        return [source for step in sorted(self.micro_batches) for source, _ in self.micro_batches[step]]


def make(out: Path, data: Any, seed: int = 0, trainer_kwargs: dict[str, Any] | None = None, **config: Any) -> Recorder:
    """A trainer with dropout: a resumed run differs unless its random states are right."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": K,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model = tiny_llama(seed, vocab_size=VOCAB, attention_dropout=0.2)
    kwargs = {"processing_class": tiny_tokenizer()} | (trainer_kwargs or {})
    return Recorder(model, NexusConfig(**{**defaults, **config}), train_dataset=data, **kwargs)


def run(out: Path, data: Any, resume: Any = None, stop_after: int | None = None, **config: Any) -> Recorder:
    """Train: from a checkpoint with another initial model, and up to a step if the run ends early."""
    trainer = make(out, data, seed=5 if resume else 0, **config)

    def stop(event: str) -> None:
        trainer.control.should_training_stop = trainer.state.global_step == stop_after

    if stop_after is not None:
        trainer.add_callback(AtEvents(stop, "on_step_end"))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def differences(resumed: Recorder, whole: Recorder, first: int) -> list[str]:
    """Differences between the complete run and one that started at step `first`."""
    steps = sorted(whole.micro_batches)[first:]
    found = [f"step {step}" for step in steps if resumed.micro_batches.get(step) != whole.micro_batches[step]]
    if sorted(resumed.micro_batches) != steps:
        found.append(f"steps {sorted(resumed.micro_batches)}, not {steps}")
    if resumed.epochs != {step: epoch for step, epoch in whole.epochs.items() if step > first}:
        found.append(f"epochs {resumed.epochs}, not {whole.epochs}")
    if not torch.equal(weights(resumed), weights(whole)):
        found.append("the weights")
    return found
