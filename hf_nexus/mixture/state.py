"""The data in a checkpoint: a description of what is read, and the positions of streams."""

import json
import os
import re
from collections.abc import Mapping, Sequence, Sized
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import ConcatDataset

from ..files import read_json
from .config import SourceConfig
from .data_files import is_remote, means_files
from .digest import are_numbers, digest, sample
from .loading import Mixture
from .packing import tokenizer_fingerprint
from .stream.dataset import MixtureStream
from .stream.documents import StreamedDocuments
from .stream.sources import is_streaming, layers, open_source
from .training_data import TrainingData

__all__ = ["compare_data", "describe_data", "describe_sources", "load_data_state", "save_data_state"]

# Settings of a source that do not change what is read of it. Its rows or files are compared, and may be elsewhere.
_NOT_READ = {"weight", "license", "tokens", "role", "max_epochs", "on_error", "path"}
# Settings of the layers of a stream that decide its rows.
_DECIDING = (
    *("n", "num_times", "step", "offset", "buffer_size", "stopping_strategy", "probabilities", "with_indices"),
    *("drop_last_batch", "is_batch_accumulate_arrow_table_function", "batched", "batch_size", "fn_kwargs"),
    *("input_columns", "remove_columns", "column_names", "kwargs"),
)
# Layers that only change how rows are given.
_FORMATTING = {"FormattedExamplesIterable", "RebatchedArrowExamplesIterable"}
# What a commit adds to the address of a file on the Hub.
_COMMIT = re.compile("@[0-9a-f]{40}(?=/)")


def save_data_state(folder: str, rank: int, description: Mapping[str, Any], stream: Mapping[str, Any] | None) -> None:
    """Write this rank's state into a checkpoint, `data_state_<rank>.json`."""
    state = {"description": dict(description), "stream": stream}
    _path(folder, rank).write_text(json.dumps(state), encoding="utf-8")


def load_data_state(folder: str, rank: int, layout: Sequence[int]) -> tuple[dict[str, Any], str | None]:
    """
    This rank's state in a checkpoint, `{}` if there is none. If it was saved in another layout (number of ranks, and
    of those that read different rows), it has the positions of all ranks. Also the name of a file of positions that is
    missing, as if it was saved on another disk; there are no positions then.
    """
    own = _read(folder, rank) or _read(folder, 0)
    if own is None:
        return {}, _path(folder, rank).name
    saved = (own["stream"] or {}).get("layout", list(layout))
    needed = [rank] if saved == list(layout) else range(saved[0])
    states = {of: _read(folder, of) for of in needed}
    if missing := [of for of, state in states.items() if state is None or state["stream"] is None]:
        return own | {"stream": None}, _path(folder, missing[0]).name
    own["stream"]["positions"] = _merged([state["stream"]["positions"] for state in states.values() if state])
    return own, None


def _merged(positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The positions of all ranks. Of a lane that several ranks share, the furthest: they are after the same step."""
    found: dict[str, Any] = {}
    for of_rank in positions:
        for source, lanes in of_rank.items():
            for lane, state in lanes.items():
                known = found.setdefault(source, {}).setdefault(lane, state)
                if (state.get("taken", 0), state["at"]["first"]) > (known.get("taken", 0), known["at"]["first"]):
                    found[source][lane] = state
    return found


def _read(folder: str, rank: int) -> dict[str, Any] | None:
    path = _path(folder, rank)
    return read_json(path, "Resume from another checkpoint.") if path.is_file() else None


def _path(folder: str, rank: int) -> Path:
    return Path(folder, f"data_state_{rank}.json")


def describe_sources(data: TrainingData) -> dict[str, Any]:
    """What is read of each source, as plain data by name. Some rows are read for it."""
    sources, hash_of = data.dataset.sources, cache(tokenizer_fingerprint)  # which is slow for a large vocabulary
    return {f"source {name!r}": _describe(name, of, data.mixture, hash_of) for name, of in sources.items()}


def describe_data(
    data: TrainingData, args: Any, seed: int, batch_size: int | None, weights: Any, sources: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Everything that the order of the data depends on, as plain data by name. `sources` is from [`describe_sources`].

    `batch_size` is the number of rows of a micro-batch on each device, `None` if it is found by trying.
    `weights` are the mixture weights and what they depend on.
    """
    facts: dict[str, Any] = {}
    if batch_size is None:
        facts |= {"ranks": args.world_size, "per_device_train_batch_size": batch_size}
    else:  # rows are dealt to the ranks by micro-batch, so their number matters only in total
        facts |= {"rows of a micro-batch over all ranks": batch_size * args.world_size}
    facts |= {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": seed,
        "source_schedule": args.source_schedule,
        "sources": data.names,  # in the order in which draws are divided among them
        "weights": weights,
    }
    if isinstance(data.dataset, MixtureStream):
        facts["buffer_size"] = data.dataset.buffer_size
    if data.mixture is not None:
        facts["sequence_length"] = data.mixture.config.sequence_length
        facts["isolate_documents"] = data.mixture.config.isolate_documents
        facts["add_bos_token"] = data.mixture.config.add_bos_token
    return json.loads(json.dumps(facts | dict(sources)))


def _settings(source: SourceConfig) -> dict[str, Any]:
    given = {key: value for key, value in vars(source).items() if key not in _NOT_READ and value is not None}
    return given | source.columns


def _address(path: str) -> str:
    """A URL or the name of a dataset on the Hub, without a password: checkpoints may be published."""
    path = _unsigned(path)
    return f"{Path(path).name} in a folder with the hash {digest(path)}" if "@" in path else path


def _unsigned(path: str) -> str:
    """A path without the signature of a URL, which changes."""
    return path.partition("?")[0] if is_remote(path) else path


def _describe(name: str, source: Any, mixture: Mixture | None, hash_of: Any = tokenizer_fingerprint) -> dict[str, Any]:
    facts, documents = {}, source
    if isinstance(source, StreamedDocuments):
        documents, path = source.documents, source.encoder.source.path
        facts = _settings(source.encoder.source)
        if is_remote(path) or not means_files(path):
            facts["path"] = _address(path)
        facts["held_out"] = [len(source.held_out), sum(source.held_out)]
        facts["sequence_length"] = source.sequence_length
        facts["tokenizer"] = hash_of(source.encoder.tokenizer)
    elif mixture is not None:
        facts = _settings(mixture.config.sources[name])
    if isinstance(documents, Sized):
        return facts | {"rows": len(documents), "sample": sample(documents)}
    if is_streaming(documents):
        facts |= {"shards": documents.num_shards, "layers": _describe_layers(documents)}
        opened: Any = open_source(name, documents, 1)
        if opened.sizes is not None:
            facts["cut by shard sizes"] = digest(opened.sizes)
        if opened.block_rows > 1:
            facts["rows of a block"] = opened.block_rows
    return facts


def _describe_layers(dataset: Any) -> list[str]:
    """
    The layers of a `datasets.IterableDataset` with the settings that decide its rows, as far as they are plain data.
    """
    found = []
    for layer in layers(dataset):
        # Probabilities may be an array.
        arrays = {key: value.tolist() for key, value in vars(layer).items() if isinstance(value, np.ndarray)}
        settings = vars(layer) | arrays
        decided = {key: settings[key] for key in _DECIDING if settings.get(key)}
        if not settings.get("batched"):
            decided.pop("batch_size", None)
        if (generator := settings.get("generator")) is not None:
            decided["generator"] = generator.bit_generator.state
        if isinstance(settings.get("function"), partial):
            decided["function"] = settings["function"]
        if type(layer).__name__ not in _FORMATTING:
            shown = [f"{key}={_shown(value)}" for key, value in decided.items()]
            found.append(" ".join([type(layer).__name__, *shown]))
    return found


def _shown(value: Any) -> str:
    decided = _decided(value)
    return repr(decided) if isinstance(decided, str | int | float) else digest(decided)


def _decided(value: Any, paths: list[list[str]] | None = None) -> Any:
    """
    A setting of a layer as plain data: of tables some rows, of a function the bound arguments, of local files the
    size. Each argument's paths are relative to their common folder, which may have been moved. They are in lists of
    one, noted in `paths`.
    """
    if paths is None:
        decided = _decided(value, paths := [])
        folder = os.path.commonprefix([path for (path,) in paths]).rpartition("/")[0]  # noqa: RUF071 - of URLs, too
        for path in paths:
            path[0] = path[0].removeprefix(f"{folder}/") if folder else os.path.basename(path[0])
        return decided
    if isinstance(value, dict):
        return {key: _decided(item) for key, item in value.items()}
    if isinstance(value, partial):
        return [_decided([*value.args], paths), _decided(value.keywords)]
    if isinstance(value, Dataset):
        return [len(value), sample(value)]
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Dataset) for item in value):
            return [[len(item) for item in value], sample(ConcatDataset(value))]
        return value if are_numbers(value) else [_decided(item, paths) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or is_remote(value)):
        paths.append(path := [_COMMIT.sub("", _unsigned(value))])
        return [path, os.path.getsize(value)] if os.path.isfile(value) else path
    return value


def compare_data(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The differences between two descriptions of data, as phrases. Sources that differ alike share one."""
    found: list[str] = []
    alike: dict[str, list[str]] = {}
    for name in _differing(saved, current):
        before, now = saved.get(name), current.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changes = [f"{key} {_change(before.get(key), now.get(key))}" for key in _differing(before, now)]
            alike.setdefault(", ".join(changes), []).append(name)
        else:
            found.append(f"{name} {_change(before, now)}")
    return found + [f"{', '.join(names)}: {changes}" for changes, names in alike.items() if changes]


def _change(saved: Any, current: Any) -> str:
    if saved is None or current is None:
        return "is new" if saved is None else "is gone"
    return f"was {saved!r} and is {current!r}"


def _differing(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The names of what differs. Rows are compared if both sides have read some."""
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    return [name for name in names if name != "sample" or None not in (saved.get(name), current.get(name))]
