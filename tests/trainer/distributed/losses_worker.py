"""Run on 2 CPU processes: evaluate uneven rows. Each rank writes its metrics to `<out>/rank<r>.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.mixture.isolation import PackedRowCollator
from hf_nexus.mixture.packing import document_positions
from tests.support.tiny import Rows, tiny_llama
from tests.trainer.distributed.fsdp_worker import make as make_fsdp

# Not a multiple of ranks x batch; a complete last batch; a rank with repeated rows only; fewer rows than ranks.
SHAPES = [(11, 3), (13, 1), (12, 3), (7, 3), (1, 3), (5, 4)]
FEW = [(7, 3), (11, 4)]


class Stream(torch.utils.data.IterableDataset):
    """Rows of unknown number."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self):
        yield from (self.rows[i] for i in range(len(self.rows)))


class Classes(Rows):
    """Rows of one class each."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": torch.tensor(i % 2)}


class Ragged(Rows):
    """Rows of different lengths, without what `Rows` pads."""

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        row = self.ids[i][self.labels[i] != -100].tolist()
        return {"input_ids": row, "labels": row}


class Pixels(torch.utils.data.Dataset):
    """Images with a class of each pixel, or 255, which the model ignores."""

    def __init__(self, n: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(n, 3, 16, 16, generator=generator)
        classes = torch.randint(0, 5, (n, 16, 16), generator=generator)
        shares = torch.linspace(0.1, 0.9, n).view(n, 1, 1)  # of each image, another one
        self.labels = torch.where(torch.rand(n, 16, 16, generator=generator) < shares, classes, 255)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def segmenter() -> SegformerForSemanticSegmentation:
    set_seed(0)
    stages = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2]}
    heads: Any = {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, **stages}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, num_encoder_blocks=2, **heads))


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass
class Isolated:
    """Collates rows as packing returns them: with positions that restart after each EOS."""

    eos: int
    flatten: bool

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = stack(rows)
        starts = torch.cat([torch.ones(len(rows), 1), batch["input_ids"][:, :-1] == self.eos], 1).bool()
        positions = torch.from_numpy(document_positions(starts.numpy()))
        packed = [{**row, "position_ids": of_row} for row, of_row in zip(rows, positions, strict=True)]
        return PackedRowCollator(stack, self.eos, isolate=True, flatten=self.flatten)(packed)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """A loss that needs the count: half of the sum of token losses, divided by it."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch / 2


def right(prediction: Any) -> dict[str, Any]:
    """The numbers of rows and of correctly predicted tokens that `compute_metrics` gets."""
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"rows": len(labels), "right": int((predicted == labels).sum()), "tokens": int((labels != -100).sum())}


METRICS = {"compute_metrics": right, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}

# Arguments and configuration of the trainer.
SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "metrics": (METRICS, {"eval_accumulation_steps": 1}),
    "smoothed": ({}, {"label_smoothing_factor": 0.1}),
    "own_loss": ({"compute_loss_func": own_loss}, {}),
    "own_average": ({"compute_loss_func": own_loss}, {"average_tokens_across_devices": False}),
    "without_nexus": ({}, {"nexus": False}),
    "flat": ({"data_collator": Isolated(eos=3, flatten=True)}, {}),
    "flattened": ({"data_collator": DataCollatorWithFlattening()}, {}),
    "padding_free": ({"data_collator": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)}, {}),
}
# Rows of different lengths are concatenated.
RAGGED = ("flattened", "padding_free")

MEASURED = [
    *((name, n, batch) for name in ("plain", "flat", "flattened", "stream") for n, batch in SHAPES),
    *((name, n, batch) for name in SCENARIOS if name not in ("plain", "flat", "flattened") for n, batch in FEW),
]


def rows_of(n: int) -> Rows:
    """Rows of different lengths. The first has no loss token."""
    rows = Rows(n, 0, pad=True)
    if n > 1:
        rows.labels[0] = -100
    return rows


def make(out: Path, scenario: str, batch: int) -> NexusTrainer:
    kwargs, config = SCENARIOS.get(scenario, ({}, {}))
    defaults = {"output_dir": str(out), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = NexusConfig(**defaults, per_device_eval_batch_size=batch, **config)
    return NexusTrainer(tiny_llama(), args, train_dataset={"text": Rows(8, 0), "code": Rows(8, 1)}, **kwargs)


def measure(out: Path) -> dict[str, dict[str, float]]:
    """The metrics of each scenario and shape."""
    found = {}
    for name, n, batch in MEASURED:
        text: Any = Stream(rows_of(n)) if name == "stream" else rows_of(n)
        if name in RAGGED:
            text = Ragged(n, 0, pad=True)
        found[f"{name}/{n}/{batch}"] = make(out, name, batch).evaluate({"text": text, "law": Rows(n + 3, 5, pad=True)})
    trainer = make(out, "plain", 3)
    found["predict"] = trainer.predict(rows_of(7)).metrics
    found["no_labels"] = trainer.evaluate([{"input_ids": row} for row in Rows(7, 0).ids])
    found["average_kept"] = {"eval_loss": float(trainer.args.average_tokens_across_devices)}
    args = make(out, "metrics", 2).args
    args.remove_unused_columns = False
    pixels = {"compute_metrics": lambda found: {"rows": len(found.label_ids)}}
    trainer = NexusTrainer(segmenter(), args, train_dataset={"text": Pixels(4, 1)}, **pixels)
    found["pixels"] = trainer.evaluate(Pixels(5, 0))
    classifier = LlamaForSequenceClassification(tiny_llama(pad_token_id=63).config).eval()
    torch.manual_seed(0)
    classifier.score.weight.data.normal_()
    trainer = NexusTrainer(classifier, make(out, "plain", 2).args, train_dataset={"text": Classes(8, 0)})
    found["classes"] = trainer.evaluate(Classes(8, 1))  # no rows are repeated
    return found


def main(out: Path) -> dict[str, Any]:
    found = measure(out)
    trainer = make_fsdp(out, per_device_eval_batch_size=3, max_steps=1, learning_rate=0.0)
    trainer.train()  # upstream shards the model with the optimizer only
    found["fsdp"] = trainer.evaluate({"text": rows_of(7)})
    return found
