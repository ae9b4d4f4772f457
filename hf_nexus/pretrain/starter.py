"""A first configuration for the files of a user, with a model that this machine trains in minutes."""

import itertools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from string import Template
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..mixture.config import RESERVED_NAMES, MixtureConfig, SourceConfig
from ..mixture.documents import check_tokenizer, load_documents, vocabulary_size
from ..mixture.loading import load_mixture
from ..mixture.texts import guess_source, tokenizer_of_sources
from ..nexus import Nexus
from ..strict import dump_yaml, parse_data
from ..tensors import accelerator_or_cpu
from ..trainer.precision import has_bfloat16
from .fields import ModelArguments
from .model import build_model, count_parameters, model_config
from .sections import STARTER

__all__ = ["starter_yaml"]

_MINUTES, _EPOCHS, _TOKENS_PER_PARAMETER, _LEAST_STEPS, _K = 5, 4, 20, 100, 4
_MOST = 20_000_000  # tokens of a source
_HELD_OUT, _HELD_OUT_BYTES = 200, 400_000  # documents of a source at most, and their bytes if they are more than four
_OOD, _OOD_BYTES = 20_000, 16_000  # tokens of an OOD source, and bytes that fill a few of the longest rows
_SHAPES = ((128, 4), (192, 6), (256, 8), (384, 8), (512, 12), (768, 12))  # width and layers


def starter_yaml(files: Sequence[str], ood: Sequence[str] = (), tokenizer: str | None = None) -> str:
    """
    A commented configuration that trains on `files`, each a source, and also evaluates on those in `ood`. `tokenizer`
    is a Hub id or path. By default, one is trained on the sources. Progress is printed to stderr.

    Raises:
        ValueError: a file cannot be read, has no column to train on, or has too few tokens.
    """
    loaded: PreTrainedTokenizerBase | None = None
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    ood_files = {os.path.realpath(path) for path in ood}
    if repeated := [path for path in files if os.path.realpath(path) in ood_files]:  # by a glob of the shell
        _say(f"{', '.join(repeated)}: only evaluated, because --ood names it")
        files = [path for path in files if path not in repeated]
        if not files:
            raise ValueError("--ood names all files. Name one to train on.")
    files, ood = _each_once(files), _each_once(ood)
    sources, characters = {}, 0
    for name, path in _names([*files, *ood]):
        sources[name], bytes_read = _source(name, path, "ood" if path in ood else "train", loaded)
        characters += bytes_read
    config = MixtureConfig(sources, sequence_length=32)
    if loaded is None:
        size = next((size for size, least in ((8192, 20e6), (4096, 5e6), (2048, 1e6)) if characters >= least), 1024)
        _say(f"Training a tokenizer of {size} entries")
        loaded = tokenizer_of_sources(config, size)
    mixture = load_mixture(config, loaded)
    tokens: dict[str, Any] = mixture.tokens
    least = min([*tokens.values(), *(8 * size for size in mixture.eval_tokens.values())])
    accelerator = torch.accelerator.is_available()
    longest, rows = (512, 16) if accelerator else (256, 4)
    length = next((size for size in (512, 256, 128, 64) if size <= longest and 32 * size <= least), 32)
    rows = max(1, min(rows, least // (4 * length)))
    total, threads = sum(tokens.values()), None if accelerator else _fastest_threads()
    model, steps, speed = _fit(vocabulary_size(loaded), total, length, rows)
    assert model.hidden_size is not None
    options = [word for path in ood for word in ("--ood", path)] + (["--tokenizer", tokenizer] if tokenizer else [])
    seen = steps * _K * rows * length
    fields = {
        **asdict(model),
        "command": shlex.join(["hf-nexus", "init", *files, *options]),
        "tokenizer": _plain(tokenizer or "train"),
        "sequence_length": length,
        "sources": "".join(_entry(name, source, tokens.get(name), total) for name, source in sources.items()),
        "max_steps": steps,
        "about": f"{seen:,} tokens ({seen / total:.1f} passes), about {max(1, round(seen / speed / 60))} minutes here",
        "rows": rows,
        "learning_rate": float(f"{0.64 / model.hidden_size:.2g}"),  # 0.005 at the width of the demo
        "accelerator": str(accelerator).lower(),
        "bf16": str(accelerator and has_bfloat16()).lower(),
        "threads": threads or "null",
    }
    text = Template(STARTER).substitute(fields).replace("sources: \n", "sources:\n")
    return text if mixture.eval_tokens else re.sub(r"^  eval_.*\n", "", text, flags=re.MULTILINE)


def _source(
    name: str, path: str, role: Literal["train", "ood"], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[SourceConfig, int]:
    """The source of a path with its limits, and the bytes of its text."""
    source = guess_source(name, path, role)
    if tokenizer is not None:
        check_tokenizer(name, source, tokenizer)
    documents: Any = load_documents(name, source, source.split)[0]
    documents = documents.select_columns(list(source.columns.values()))
    unit = "documents" if source.sample_by == "document" else f"documents (each {source.sample_by})"
    _say(f"{path}: {len(documents):,} {unit}, read from {' and '.join(source.columns.values())}")
    if role == "ood":
        # The first document that exceeds max_tokens is not read, so long ones must fit. A token has a byte or more.
        sizes = itertools.accumulate(len(repr(row).encode()) for row in documents)
        limits: dict[str, Any] = {"max_tokens": max(_OOD, next((size for size in sizes if size >= _OOD_BYTES), 0))}
    else:
        # Copies of a held-out document are not trained on.
        distinct = len({hash(repr(row)) for row in itertools.islice(documents, 20 * _HELD_OUT)})
        most = min(_HELD_OUT, len(documents) // 20, _HELD_OUT_BYTES * len(documents) // documents.data.nbytes)
        held_out = min(max(4, most), distinct // 4)
        limits = {"max_tokens": _MOST, "eval_rows": held_out or None}
    return replace(source, **limits), documents.data.nbytes


def _entry(name: str, source: SourceConfig, tokens: int | None, total: int) -> str:
    fields: dict[str, Any] = {"path": source.path, **source.columns, "sample_by": source.sample_by}
    if tokens is None:
        fields |= {"role": "ood", "max_tokens": source.max_tokens}
    else:
        fields |= {"weight": max(0.01, round(tokens / total, 2)), "tokens": tokens, "eval_rows": source.eval_rows}
        fields |= {"max_tokens": _MOST} if tokens > 0.99 * _MOST else {}
    given = {key: value for key, value in fields.items() if value not in (None, "document")}
    return f"\n    {_plain(name)}: {_plain(given)}"


def _plain(value: Any) -> str:
    """A value as YAML on one line, in quotes where it needs them."""
    text = dump_yaml([value], one_line=True).strip()[1:-1]
    return text if parse_data(text, "") == value else json.dumps(value, ensure_ascii=False)  # 1e3 is a number


def _fit(vocabulary: int, tokens: int, length: int, rows: int) -> tuple[ModelArguments, int, float]:
    """
    The largest model that this machine trains on 20 tokens per parameter in a few minutes and few passes over the
    data, its steps, and its tokens per second. The smallest model may get fewer tokens.
    """
    found: tuple[ModelArguments, int, float] | None = None
    for width, layers in _SHAPES:
        model = ModelArguments(vocabulary, width, 3 * width, layers, width // 32, width // 64)
        parameters = count_parameters(model_config(model, length))
        wanted = _TOKENS_PER_PARAMETER * parameters
        if found is not None and wanted > _EPOCHS * tokens:
            break
        try:
            speed = _tokens_per_second(model, length, rows)
        except torch.OutOfMemoryError:
            if found is None:
                raise
            break
        _say(f"A model of {parameters:,} parameters: {speed:,.0f} tokens/s on this machine")
        possible = int(_MINUTES * 60 * speed)
        if found is not None and wanted > possible:
            break
        steps = max(_LEAST_STEPS, min(wanted, _EPOCHS * tokens, possible) // (_K * rows * length))
        found = model, steps, speed
    assert found is not None
    return found


def _fastest_threads() -> int:
    """Choose the threads of torch: on a CPU that other programs use, several threads wait for each other."""
    speeds = {}
    for count in {1, torch.get_num_threads()}:
        torch.set_num_threads(count)
        speeds[count] = _tokens_per_second(ModelArguments(vocab_size=1024), 256, 4)
    torch.set_num_threads(best := max(speeds, key=lambda count: speeds[count]))
    return best


def _tokens_per_second(model: ModelArguments, length: int, rows: int) -> float:
    """Tokens of a micro-batch over the time of a whole step with it alone."""
    device = accelerator_or_cpu()
    assert model.vocab_size is not None
    network: torch.nn.Module = build_model(model_config(model, length))
    network.to(device)
    nexus, optimizer = Nexus(network.parameters(), inner_lr=0.05), torch.optim.AdamW(network.parameters())
    tokens, seconds = torch.randint(model.vocab_size, (rows, length), device=device), []
    for _ in range(3):  # the first step also allocates
        start = time.perf_counter()
        with nexus.window():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" and has_bfloat16()):
                loss = network(input_ids=tokens, labels=tokens).loss
            loss.backward()
            nexus.inner_step()
        optimizer.step()
        optimizer.zero_grad()
        next(network.parameters()).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return rows * length / min(seconds)


def _each_once(paths: Sequence[str]) -> list[str]:
    """The paths of different files."""
    real = [os.path.realpath(path) for path in paths]
    return [path for i, path in enumerate(paths) if real[i] not in real[:i]]


def _names(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Names of sources, from the names of their files."""
    found: dict[str, str] = {}
    for path in paths:
        plain = next((part for part in reversed(Path(path).parts) if not set(part) & set("*?[")), "")
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", plain.split(".")[0]).lstrip("_-") or "data"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(len(found) + 1)))
        found[next(name for name in names if name not in found and name not in RESERVED_NAMES)] = path
    return list(found.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
