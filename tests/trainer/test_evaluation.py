"""Evaluation losses are means over tokens at any batch size. `distributed/` tests them on several ranks."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hf_nexus.evaluation.losses import TokenMean, mean_losses, perplexities, perplexity
from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.trainer.evaluation import Evaluation
from tests.support.tiny import Rows, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.trainer.distributed.losses_worker import METRICS, Classes, Isolated, Pixels, own_loss, segmenter

EOS = 50


@torch.no_grad()
def token_losses(model: Any, rows: Rows) -> list[torch.Tensor]:
    """The loss of each target token, by row."""
    found = []
    for i in range(len(rows)):
        logits, labels = model(input_ids=rows.ids[i : i + 1]).logits[0, :-1], rows.labels[i, 1:]
        found.append(
            torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
        )
    return found


def token_loss(model: Any, rows: Rows) -> float:
    return float(torch.cat(token_losses(model, rows)).double().mean())


@pytest.fixture
def rows() -> Rows:
    return Rows(7, 0, pad=True)


@pytest.fixture
def sets(rows) -> dict[str, Rows]:
    return {"text": rows, "code": Rows(5, 1, pad=True), "law": Rows(6, 5, pad=True)}


# ---- Losses of evaluation sets ----


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("nexus", [True, False])
def test_the_loss_of_a_set_is_the_mean_over_its_tokens(make_trainer, sources, sets, batch, nexus):
    trainer = make_trainer(
        sources, trainer_kwargs={"eval_dataset": sets}, per_device_eval_batch_size=batch, nexus=nexus
    )
    metrics = trainer.evaluate()
    model = tiny_llama()
    for name, rows in sets.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(token_loss(model, rows), rel=1e-6)
    assert trainer.evaluate(sets["text"])["eval_loss"] == pytest.approx(token_loss(model, sets["text"]), rel=1e-6)
    assert trainer.predict(sets["text"]).metrics["test_loss"] == metrics["eval_text_loss"]
    # A mean in which each row has the same weight differs.
    by_row = torch.stack([losses.mean() for losses in token_losses(model, sets["text"])]).mean()
    assert abs(float(by_row) - metrics["eval_text_loss"]) > 1e-4


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize(
    ("kwargs", "config"),
    [
        ({}, {"prediction_loss_only": True}),
        (METRICS, {}),
        (METRICS, {"eval_accumulation_steps": 1}),
        ({"compute_metrics": lambda p, compute_result: {}}, {"batch_eval_metrics": True}),
        ({}, {"average_tokens_across_devices": False}),
        ({}, {"bf16_full_eval": True}),
    ],
    ids=["loss_only", "metrics", "accumulation", "batch_metrics", "average", "bf16"],
)
def test_other_settings_of_evaluation_change_nothing(make_trainer, sources, rows, kwargs, config, batch):
    trainer = make_trainer(sources, trainer_kwargs=kwargs, per_device_eval_batch_size=batch, **config)
    metrics = trainer.evaluate(rows)
    rough = 1e-2 if "bf16_full_eval" in config else 1e-6
    assert metrics["eval_loss"] == pytest.approx(token_loss(tiny_llama(), rows), rel=rough)
    if kwargs is METRICS:
        assert (metrics["eval_rows"], metrics["eval_tokens"]) == (7, int((rows.labels[:, 1:] != -100).sum()))
    assert trainer.args.average_tokens_across_devices == config.get("average_tokens_across_devices", True)


class Subclass(LlamaForCausalLM):
    """A causal model that the Trainer does not know by the name of its class."""


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_subclass_has_the_loss_of_its_model(make_trainer, sources, rows, batch):
    own = Subclass(tiny_llama().config)
    own.load_state_dict(tiny_llama().state_dict())
    found = make_trainer(sources, own, per_device_eval_batch_size=batch).evaluate(rows)["eval_loss"]
    assert found == pytest.approx(token_loss(tiny_llama(), rows), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_losses_of_other_kinds_are_means_over_tokens_too(make_trainer, sources, rows, batch):
    config = {"per_device_eval_batch_size": batch}
    model = tiny_llama()
    with torch.no_grad():
        outputs = model(input_ids=rows.ids)
        smoothed = float(LabelSmoother(0.1)(outputs, rows.labels, shift_labels=True))
    for own in (tiny_llama(), Subclass(tiny_llama().config)):
        own.load_state_dict(model.state_dict())
        found = make_trainer(sources, own, label_smoothing_factor=0.1, **config).evaluate(rows)["eval_loss"]
        assert found == pytest.approx(smoothed, rel=1e-6)
    assert abs(smoothed - token_loss(model, rows)) > 1e-5
    found = make_trainer(sources, trainer_kwargs={"compute_loss_func": own_loss}, **config).evaluate(rows)
    assert found["eval_loss"] == pytest.approx(token_loss(model, rows) / 2, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("flatten", [False, True])
def test_masked_first_tokens_and_flat_rows(make_trainer, sources, batch, flatten):
    rows = Rows(7, 0)
    rows.ids[1:, 2] = EOS
    rows.ids[4:, 9] = EOS
    rows.labels = rows.ids.clone()
    collate = Isolated(EOS, flatten)
    kwargs = {"data_collator": collate}
    trainer = make_trainer(
        sources, tiny_llama(attn_implementation="sdpa"), trainer_kwargs=kwargs, per_device_eval_batch_size=batch
    )
    batches = [collate([rows[i]]) for i in range(7)]
    with torch.no_grad():
        logits = torch.cat([tiny_llama(attn_implementation="sdpa", use_cache=False)(**b).logits for b in batches])
    labels = torch.cat([b["labels"] for b in batches])
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert int((labels[:, 1:] == -100).sum()) == 9
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(float(by_hand), rel=1e-6)


def test_a_batch_without_loss_tokens_adds_nothing(make_trainer, sources, rows):
    expected = token_loss(tiny_llama(), rows)
    rows.ids = torch.cat([rows.ids[:1], rows.ids])
    rows.labels = torch.cat([torch.full_like(rows.labels[:1], -100), rows.labels])
    trainer = make_trainer(sources, per_device_eval_batch_size=1)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    # A loss that is not finite differs from a loss without tokens.
    trainer.model.lm_head.weight.data[:] = float("nan")
    assert math.isnan(trainer.evaluate(rows)["eval_loss"])


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("nexus", [True, False])
def test_ignored_pixels_are_not_counted(make_trainer, batch, nexus):
    """A model of segmentation ignores the label 255, and the Trainer counts what is not -100."""
    pixels = Pixels(5, 0)
    config = {"per_device_eval_batch_size": batch, "remove_unused_columns": False, "nexus": nexus}
    trainer = make_trainer({"text": Pixels(8, 1)}, segmenter(), max_steps=1, **config)
    model: Any = segmenter().eval()
    with torch.no_grad():
        by_hand = float(model(pixel_values=pixels.images, labels=pixels.labels).loss)
    assert trainer.evaluate(pixels)["eval_loss"] == pytest.approx(by_hand, rel=1e-5)
    trainer.train()
    assert trainer.meter.trained_tokens == {"text": int((Pixels(8, 1).labels != 255).sum())}


def test_an_evaluation_between_steps_changes_no_window(make_trainer, sources, sets):
    def train(**config: Any) -> Any:
        trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": sets}, max_steps=4, **config)
        trainer.train()
        return trainer

    looked, plain = train(eval_strategy="steps", eval_steps=1), train()
    assert sum("eval_loss" in entry for entry in looked.state.log_history) == 4
    for a, b in zip(looked.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert looked.meter.trained_tokens == plain.meter.trained_tokens


# ---- Where upstream's value stays ----


def stock(trainer: Any, model: Any, **kwargs: Any) -> Trainer:
    kept = {k: v for k, v in trainer.args.to_dict().items() if k in TrainingArguments.__dataclass_fields__}
    return Trainer(model, TrainingArguments(**{**kept, "accelerator_config": None}), **kwargs)


def test_workers_that_persist_read_the_set_that_is_given(make_trainer, sources, sets):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "nexus": False}
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": sets["law"]}, **settings)
    expected = {name: pytest.approx(token_loss(trainer.model, rows), rel=1e-6) for name, rows in sets.items()}
    assert trainer.evaluate(sets["text"])["eval_loss"] == expected["text"]
    assert trainer.evaluate()["eval_loss"] == expected["law"]
    metrics = trainer.evaluate(sets)
    assert {name: metrics[f"eval_{name}_loss"] for name in sets} == expected
    loader = trainer._eval_dataloaders["eval"]
    assert trainer.evaluate()["eval_loss"] == expected["law"] and trainer._eval_dataloaders == {"eval": loader}


def test_the_tokens_of_a_run_are_of_no_set(make_trainer, sources, sets):
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": sets}, include_num_input_tokens_seen="all")
    trainer.train()
    metrics = trainer.evaluate()
    assert [key for key in metrics if "tokens_seen" in key] == ["num_input_tokens_seen"]
    assert metrics["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen > 0


def test_without_nexus_a_plain_dataset_has_the_base_evaluation(make_trainer, rows):
    ours = make_trainer(Rows(8, 1), nexus=False, per_device_eval_batch_size=3)
    found = ours.evaluate(rows)
    assert found["eval_loss"] == stock(ours, tiny_llama()).evaluate(rows)["eval_loss"]
    assert abs(found["eval_loss"] - token_loss(tiny_llama(), rows)) > 1e-4
    assert set(found) == set(stock(ours, tiny_llama()).evaluate(rows))


def test_classes_are_weighted_by_rows(make_trainer):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_llama(pad_token_id=63).config)
    ours = make_trainer({"text": Classes(8, 0)}, model, per_device_eval_batch_size=3)
    assert ours.evaluate(Classes(7, 1))["eval_loss"] == stock(ours, model).evaluate(Classes(7, 1))["eval_loss"]


class WithoutCount(torch.nn.Module):
    """A model that takes no number of loss tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()
        self.config = self.llama.config

    def forward(self, input_ids: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.llama(input_ids=input_ids, labels=labels).loss}


def test_a_model_that_takes_no_count_keeps_upstreams_value(make_trainer, sources, rows):
    ours = make_trainer(sources, WithoutCount(), per_device_eval_batch_size=3)
    assert ours.evaluate(rows)["eval_loss"] == stock(ours, WithoutCount()).evaluate(rows)["eval_loss"]


@pytest.mark.parametrize("filters", [True, False])
def test_losses_that_are_no_numbers_are_filtered_as_upstream(make_trainer, sources, rows, filters):
    rows.labels[2] = -100  # a batch without a label has no mean
    ours = make_trainer(sources, WithoutCount(), per_device_eval_batch_size=1, logging_nan_inf_filter=filters)
    plain = stock(ours, ours.model)
    ours.train()
    found, expected = (trainer.evaluate(rows)["eval_loss"] for trainer in (ours, plain))
    assert found == expected if filters else math.isnan(found) and math.isnan(expected)


def test_without_labels_there_is_no_loss(make_trainer, sources, rows):
    ours = make_trainer(sources, trainer_kwargs={"compute_metrics": len}, per_device_eval_batch_size=3)
    metrics = ours.evaluate({"text": [{"input_ids": row} for row in rows.ids]})
    assert not [key for key in metrics if key.endswith(("_loss", "_perplexity"))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_predictions_on_a_mixture_need_no_labels(make_trainer, tmp_path, attention):
    mixture, tokenizer = of_foxes(tmp_path)
    model = tiny_llama(vocab_size=len(tokenizer), attn_implementation=attention)
    rows = mixture.eval["text"]
    found = make_trainer(mixture, model).predict(rows.remove_columns("labels"))
    assert found.predictions.shape == (len(rows), 16, len(tokenizer))
    assert "test_loss" not in found.metrics
    assert (found.predictions == make_trainer(mixture, model).predict(rows).predictions).all()
    with pytest.raises(ValueError, match=r"The mixture holds the token \d+, but the model has embeddings for 8"):
        make_trainer(mixture, tiny_llama(vocab_size=8))


def test_rows_of_a_prediction_are_padded_as_by_the_trainer(make_trainer, tmp_path):
    mixture, tokenizer = of_foxes(tmp_path)
    model, rows = tiny_llama(vocab_size=len(tokenizer)), [{"input_ids": [5] * n} for n in (3, 5, 4, 9)]
    trainer = make_trainer(mixture, model, {"processing_class": tokenizer})
    found = trainer.predict(Dataset.from_list(rows)).predictions
    stock = Trainer(model, TrainingArguments(str(tmp_path), report_to="none"), processing_class=tokenizer)
    assert (found == stock.predict(Dataset.from_list(rows)).predictions).all()
    assert trainer.evaluate()["eval_text_loss"] > 0


def test_a_prediction_is_of_one_set(make_trainer, sources, sets):
    with pytest.raises(ValueError, match=r"predict\(\) takes one dataset, but got a dict of text, code, law\."):
        make_trainer(sources).predict(sets)


def of_foxes(tmp_path):
    file, tokenizer = tmp_path / "a.jsonl", tiny_tokenizer()
    file.write_text("".join(json.dumps({"text": f"the fox number {i}"}) + "\n" for i in range(60)))
    config = {"sequence_length": 16, "sources": {"text": {"path": str(file), "eval_rows": 8}}}
    return load_mixture(MixtureConfig.from_dict(config), tokenizer, cache_dir=tmp_path / "cache"), tokenizer


# ---- Perplexities ----


def test_perplexities_stand_beside_the_losses(make_trainer, sources, sets):
    metrics = make_trainer(sources, trainer_kwargs={"eval_dataset": sets}).evaluate()
    for key in ("eval_text", "eval_code", "eval_law", "eval", "eval_ood"):
        assert metrics[f"{key}_perplexity"] == math.exp(metrics[f"{key}_loss"])
    assert metrics["eval_ood_perplexity"] == metrics["eval_law_perplexity"]
    assert metrics["eval_perplexity"] != pytest.approx(metrics["eval_ood_perplexity"])


def test_what_no_float_holds_is_infinite_and_left_out():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
    losses = {"eval_a_loss": 1e4, "eval_b_loss": math.nan, "eval_c_loss": math.inf, "eval_d_loss": 1.0}
    losses |= mean_losses(losses, list("abcd"), {})
    found = perplexities(losses, list("abcde"))
    assert found == {"eval_d_perplexity": math.e}
    json.dumps(found, allow_nan=False)


# ---- The arithmetic ----


def test_sums_of_parts_add_up_whatever_the_split():
    losses = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 5
    expected = float(losses.double().mean())
    for size in (1, 7, 100):
        parts = [TokenMean(), TokenMean()]
        for i, part in enumerate(losses.split(size)):
            parts[i % 2].add(part.mean(), torch.tensor(len(part)))
        total, tokens = (parts[0].sums + parts[1].sums).tolist()
        assert tokens == 100
        assert total / tokens == pytest.approx(expected, rel=1e-6)


def test_millions_of_tokens_are_counted_one_by_one():
    mean = TokenMean()
    for tokens in (2**24, 1, 1):  # float32 would lose the last two digits
        mean.add(torch.tensor(1.0), torch.tensor(tokens))
    assert mean.sums.tolist() == [2**24 + 2, 2**24 + 2]


def test_a_single_process_keeps_sums_off_its_device():
    """They are in float64, which Apple GPUs do not have."""
    mean = TokenMean()
    mean.add(torch.tensor(2.0), 3)
    args = SimpleNamespace(world_size=1, device=torch.device("meta"), logging_nan_inf_filter=True)
    assert Evaluation(args).token_loss(mean) == 2
