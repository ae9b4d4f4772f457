"""
Tokens per second that the data loaders deliver, without a model.

    python benchmarks/data_throughput.py                                     # 2 minutes on one CPU core
    python benchmarks/data_throughput.py --rows 1 --length 4096 --workers 2

All arms read the same documents: shuffled pieces of the built-in corpus, in files that are in the page cache after the
first pass.

- bare loader: a torch `DataLoader` over the packed rows of all sources, shuffled. The baseline of the ratios.
- plain Trainer: the loader of the stock `Trainer` for the same rows.
- map-style mixture: the loader of `NexusTrainer`, with one source per micro-batch.
- ... documents apart: the same with `isolate_documents`.
- streamed rows: the same rows as `IterableDataset`s through `MixtureStream`, with its shuffle buffer.
- streamed text: the documents, tokenized and packed while they are read.

A round runs each arm for `--seconds`, in random order. Ratios are taken within a round, which cancels a drift of the
machine. The table has medians and quartiles over the rounds. `--clock cpu` measures the CPU time of this process
instead of wall time, for a machine with other work. It does not include data loader workers.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import concatenate_datasets
from quartiles import quartiles
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, default_data_collator

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.mixture.builtin.corpus import builtin_documents
from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
from hf_nexus.mixture.isolation import PackedRowCollator
from hf_nexus.mixture.loading import Mixture
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.lanes import Lanes
from hf_nexus.mixture.stream.progress import MicroBatchSampler, StreamProgress
from hf_nexus.mixture.tags import TaggingCollator

BARE = "bare loader"
SOURCES = ("code", "documentation", "mathematics", "records")
STEPS = 10**7  # more micro-batches than any run takes


def write_documents(folder: Path, name: str, characters: int, shards: int) -> None:
    """Write files of documents made of shuffled pieces of a built-in source."""
    order = random.Random(name)
    pieces = [text[i : i + 200] for text in builtin_documents(name) for i in range(0, len(text), 200)]
    for shard in range(shards):
        written = 0
        with open(folder / f"{name}-{shard}.jsonl", "w", encoding="utf-8") as file:
            while written < characters // shards:
                text = "".join(order.choices(pieces, k=order.randint(1, 40)))
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)


def load(folder: Path, tokenizer: PreTrainedTokenizerBase, length: int, streaming: bool) -> Mixture:
    """Load the documents as a mixture with equal weights."""
    sources = {n: {"path": str(folder / f"{n}-*.jsonl"), "weight": 1, "streaming": streaming} for n in SOURCES}
    config = MixtureConfig.from_dict({"sequence_length": length, "sources": sources})
    return load_mixture(config, tokenizer, cache_dir=folder / "cache")


def trainer_arm(kind: type[Trainer], train: Any, collate: Callable, options: argparse.Namespace) -> Any:
    """The train loader of a Trainer, on the CPU."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    args = NexusConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.rows,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=False,
        gradient_accumulation_steps=4,
        max_steps=1000,
        use_cpu=True,
        report_to="none",
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))
    return kind(model=model, args=args, train_dataset=train, data_collator=collate).get_train_dataloader()


def stream_arm(sources: dict[str, Any], options: argparse.Namespace) -> DataLoader:
    """A loader over streams, as in a run with one process."""
    stream = MixtureStream(sources)
    workers = max(1, options.workers)
    stream.place(0, 1, workers, Lanes.of_run(options.rows, 1, workers))
    stream.begin(None)
    progress = StreamProgress(stream, lambda step: dict.fromkeys(sources, 1.0), inner_steps=4)
    sampler = MicroBatchSampler(progress.index_of, STEPS, options.rows, stream.owners, progress.ahead)
    collate = TaggingCollator(default_data_collator)
    return DataLoader(
        stream, batch_size=options.rows, sampler=sampler, collate_fn=collate, num_workers=options.workers
    )


def make_arms(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loaders by name."""
    for name in SOURCES:
        write_documents(folder, name, options.megabytes * 10**6 // len(SOURCES), shards=4)
    tokenizer = train_tokenizer((text for name in SOURCES for text in builtin_documents(name)), 2048)
    packed = load(folder, tokenizer, options.length, streaming=False)
    rows = concatenate_datasets(list(packed.train.values()))
    apart = PackedRowCollator(default_data_collator, tokenizer.eos_token_id, isolate=True)
    joined = PackedRowCollator(default_data_collator, tokenizer.eos_token_id, isolate=False)
    shuffled = {"batch_size": options.rows, "shuffle": True, "drop_last": True, "num_workers": options.workers}
    tokens = {n: rows.to_iterable_dataset(num_shards=4).with_format("torch") for n, rows in packed.train.items()}
    return {
        BARE: DataLoader(rows, collate_fn=default_data_collator, **shuffled),
        "plain Trainer": trainer_arm(Trainer, rows, default_data_collator, options),
        "map-style mixture": trainer_arm(NexusTrainer, packed.train, joined, options),
        "... documents apart": trainer_arm(NexusTrainer, packed.train, apart, options),
        "streamed rows": stream_arm(tokens, options),
        "streamed text": stream_arm(load(folder, tokenizer, options.length, streaming=True).train, options),
    }


def endless(loader: Any) -> Iterator[Any]:
    """Batches of all epochs."""
    while True:
        yield from loader


def measure(batches: Iterator[Any], seconds: float, clock: Callable[[], float]) -> float:
    """Tokens per second over about the given time."""
    tokens, started = 0, clock()
    while (now := clock()) - started < seconds:
        tokens += next(batches)["input_ids"].numel()
    return tokens / (now - started)


def show(rounds: list[dict[str, float]]) -> Table:
    """Table of the tokens per second of each arm and their ratio to the bare loader."""
    table = Table(box=box.MARKDOWN)
    for column in ("", "million tokens/s", "ratio to the bare loader"):
        table.add_column(column, justify="right" if column else "left")
    for arm in rounds[0]:
        rates = [rates[arm] / 1e6 for rates in rounds]
        table.add_row(arm, quartiles(rates, 2), quartiles([rates[arm] / rates[BARE] for rates in rounds]))
    return table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows per micro-batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="data loader workers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per arm and round (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=40, help="megabytes of text (default: %(default)s)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="the time (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch and of the tokenizer (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    datasets.disable_progress_bars()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: endless(loader) for name, loader in make_arms(Path(folder), options).items()}
        for batches in arms.values():
            measure(batches, options.seconds, clock)  # start workers, fill buffers and the page cache
        rounds = []
        for _ in range(options.rounds):
            order = random.sample(list(arms), len(arms))
            rates = {arm: measure(arms[arm], options.seconds, clock) for arm in order}
            rounds.append({arm: rates[arm] for arm in arms})
        print(f"{options.rows} rows x {options.length} tokens, {options.workers} workers, {options.clock} time")
        Console(width=120).print(show(rounds))


if __name__ == "__main__":
    main()
