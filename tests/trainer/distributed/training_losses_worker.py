"""Run on 2 CPU processes: losses that are divided in different ways, trained and evaluated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_nexus import NexusConfig, NexusTrainer
from tests.support.tiny import VOCAB, Rows, tiny_llama


class Numbers(Rows):
    """Rows of one number each."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i, :1].float() / 9}


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **shape, **dropout))


def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **shape))


def regression() -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama(pad_token_id=63, num_labels=1).config)
    model.score.weight.data.normal_()
    return model


class OwnMean(NexusTrainer):
    """A loss that ignores the count."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{**inputs, "labels": None})
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class OwnSum(NexusTrainer):
    """A loss that is divided by the count, and not multiplied by the number of ranks."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{**inputs, "labels": None})
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def mean_function(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# Model, class of the trainer, class of the rows, and further arguments of the trainer.
KINDS: dict[str, tuple[Callable[[], torch.nn.Module], type[NexusTrainer], type[Rows], dict[str, Any]]] = {
    "causal": (tiny_llama, NexusTrainer, Rows, {}),
    "bert": (bert, NexusTrainer, Rows, {}),
    "t5": (t5, NexusTrainer, Rows, {}),
    "regression": (regression, NexusTrainer, Numbers, {}),
    "own_mean": (tiny_llama, OwnMean, Rows, {}),
    "own_sum": (tiny_llama, OwnSum, Rows, {}),
    "function": (tiny_llama, NexusTrainer, Rows, {"compute_loss_func": mean_function}),
}


def sets(kind: str, n: int) -> dict[str, Rows]:
    """Sources whose rows have different numbers of loss tokens."""
    rows = KINDS[kind][2]
    return {"text": rows(n, 0, pad=True), "code": rows(n, 3)}


@torch.no_grad()
def right(kind: str, n: int) -> dict[str, float]:
    """The mean loss of each source, and of all."""
    model = KINDS[kind][0]().eval()
    losses: dict[str, torch.Tensor] = {}
    for name, rows in sets(kind, n).items():
        batch = {key: torch.stack([row[key] for row in map(rows.__getitem__, range(n))]) for key in rows[0]}
        logits, labels = model(**batch).logits, batch["labels"]
        if kind == "regression":
            losses[name] = F.mse_loss(logits, labels, reduction="none").flatten()
            continue
        if kind not in ("bert", "t5"):
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses[name] = each[labels.flatten() != -100]
    return {name: float(x.double().mean()) for name, x in {**losses, "": torch.cat(list(losses.values()))}.items()}


def measure(out: Path, kind: str, nexus: bool, ranks: int) -> dict[str, float]:
    """The losses of one epoch, which is one window whose weights do not move, and those of uneven sets."""
    make, trainer_class, _, kwargs = KINDS[kind]
    args = NexusConfig(
        output_dir=str(out),
        nexus=nexus,
        inner_lr=0.0,
        learning_rate=0.0,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        source_schedule="stratified",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trainer_class(make(), args, train_dataset=sets(kind, 8), **kwargs)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    metrics = trainer.evaluate(sets(kind, 7))
    found = {key: value for key, value in logs.items() if key.partition("/")[0] == "loss"}
    return found | {key: value for key, value in metrics.items() if key in ("eval_text_loss", "eval_code_loss")}


def main(out: Path) -> dict[str, Any]:
    return {f"{kind}/{nexus}": measure(out, kind, nexus, 2) for kind in KINDS for nexus in (True, False)}
