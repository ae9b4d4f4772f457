"""`RUN.md`: which file of a finished run is what, and text that its model generates."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomic
from ..hub.publisher import RUN_NAME
from .sections import CONFIG_NAME

__all__ = ["continuation", "write_run_file"]

_FILES = {
    "README.md": "model card: mixture, held-out losses and settings",
    "training.png": "held-out losses, training loss and path cosine over the steps",
    "gradient_cosines.png": "gradient cosines between the sources",
    "*.safetensors*": "weights",
    "config.json": "shape of the model",
    "generation_config.json": "settings of generation",
    "tokenizer*.json": "tokenizer",
    "chat_template.jinja": "format of conversations",
    "checkpoint-*": "checkpoints; `--resume_from_checkpoint last` continues the newest",
    CONFIG_NAME: "configuration; with its path and another `--output_dir`, the command that trained repeats the run",
    "nexus.yaml": "settings of the Nexus update",
    "trainer_state.json": "all log entries",
    "run_summary.json": "content of the card; `hf-nexus card` renders it again",
    "training_args.bin": "arguments of the Trainer",
    "hub_queue": "uploads; `hf-nexus push` sends those that wait",
    RUN_NAME: "this file, which is not uploaded, because it quotes held-out rows",
}
_SOURCES, _PROMPT, _NEW = 8, 32, 40  # sources with a sample, and tokens of each


def write_run_file(folder: Path, model: Any, tokenizer: Any, held_out: Mapping[str, Any]) -> Path:
    """
    Write `RUN.md` with the files of a folder and, for each of the first sources with `held_out` rows, what the model
    makes of their beginning.
    """
    samples = {name: continuation(model, tokenizer, rows[0]) for name, rows in islice(held_out.items(), _SOURCES)}
    return write_atomic(folder / RUN_NAME, "\n".join(_lines(folder, samples)) + "\n")


def _lines(folder: Path, samples: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    yield from (f"# {folder.resolve().name}", "", "| File | Content |", "|---|---|")
    for pattern, content in _FILES.items():
        names = {path.name for path in folder.glob(pattern)} | {RUN_NAME} & {pattern}  # it is not written yet
        if names:
            yield f"| {', '.join(f'`{name}`' for name in sorted(names))} | {content} |"
    if samples:
        yield from ("", "## Generated text", "", "The most likely tokens after the start of a held-out document.")
    for name, texts in samples.items():
        for title, text in zip((f"### {name}", "continues:"), texts, strict=True):
            lines = text.rstrip().splitlines() or ["(white space only)"]
            yield from ("", title, "", *(f"    {line}" for line in lines))


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, row: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """The start of the first document of a packed row, and the tokens that the model finds most likely after it."""
    ids, starts = row["input_ids"], (row["position_ids"][1:] == 0).nonzero()
    length = int(starts[0]) + 1 if len(starts) else len(ids)
    prompt = ids[: max(1, min(_PROMPT, length // 2))][None].to(model.device)
    new = min(_NEW, len(ids) - prompt.shape[1])  # a model may have no positions beyond its rows
    found = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(1, new),
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0]
    size = prompt.shape[1]
    before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (found[:size], found[size:]))
    return before, after
