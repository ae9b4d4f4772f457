"""The card of a run has the numbers of the trainer, and its folder has the plots that the card shows."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from transformers.integrations import TensorBoardCallback

from hf_nexus.hub.card import END, run_card
from hf_nexus.hub.check import check_card
from hf_nexus.hub.results import BenchmarkScore
from hf_nexus.hub.run_summary import RunSummary
from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.trainer.card import CARD_FILES, evaluations, summarize
from hf_nexus.trainer.publishing import card_fields
from tests.support.tiny import VOCAB, Rows, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def trained(make_trainer, sources):
    """Three steps on three sources in two stages, one OOD source."""
    weights = {"text": 0.5, "code": 0.25, "math": 0.25}
    stages = [{"until": 0.5, "weights": weights}, {"until": 1.0, "weights": weights | {"text": 0.25, "code": 0.5}}]
    trainer = make_trainer(
        sources,
        trainer_kwargs={"eval_dataset": {"text": Rows(4, 0), "law": Rows(4, 3)}},
        mixture_weights=stages,
        eval_strategy="steps",
        eval_steps=1,
        gradient_cosine_steps=1,
        max_steps=4,
    )
    trainer.train()
    return trainer


def test_the_summary_holds_what_the_trainer_logged(trained):
    run = summarize(trained.run_facts())
    log = trained.state.log_history
    losses = [entry["eval_law_loss"] for entry in log if "eval_law_loss" in entry]
    rows = {row.name: row for row in run.evaluations}
    assert (rows["law"].role, rows["law"].first_loss, rows["law"].last_loss) == ("ood", losses[0], losses[-1])
    assert rows["text"].role == "train" and "code" not in rows
    mixture = {row.source: row for row in run.mixture}
    assert {name: row.tokens for name, row in mixture.items()} == trained.meter.trained_tokens
    assert sum(row.share for row in run.mixture) == pytest.approx(1.0)
    assert {name: row.weight for name, row in mixture.items()} == pytest.approx(
        {"text": 0.375, "code": 0.375, "math": 0.25}
    )
    assert [stage.until for stage in run.stages] == [0.5, 1.0]
    assert run.base_model is None and run.adapter is None and run.trainable_parameters is None
    assert run.parameters == trained.model.num_parameters()
    assert run.changed_hyperparameters["learning_rate"] == 1e-2 and "weight_decay" not in run.changed_hyperparameters
    assert run.hyperparameters["weight_decay"] == 0.0 and "output_dir" not in run.hyperparameters
    assert run.unit == "tokens" and "accelerator_config" not in run.changed_hyperparameters
    assert "logging_nan_inf_filter" not in run.changed_hyperparameters  # set by Nexus, not by the user
    assert run.seconds > 0 and run.tokens_per_second > 0 and run.versions["torch"] in torch.__version__


def test_weights_of_4_bits_count_as_what_they_stand_for(make_trainer, sources):
    model = tiny_llama()
    layer, Params4bit = model.model.layers[0].mlp.up_proj, type("Params4bit", (torch.nn.Parameter,), {})
    expected, rows = model.num_parameters(), layer.weight.numel()
    trainer = make_trainer(sources, model=model)
    layer.weight = Params4bit(torch.zeros(rows // 4, 1, dtype=torch.int16), requires_grad=False)  # 4 in a number
    run = summarize(trainer.run_facts())
    assert (run.parameters, run.trainable_parameters) == (expected, expected - rows)


def test_the_training_time_is_that_of_all_sessions(make_trainer, sources, tmp_path):
    make_trainer(sources, max_steps=2, save_steps=2, save_strategy="steps").train()
    totals = tmp_path / "out/checkpoint-2/totals.json"
    saved = json.loads(totals.read_text())
    assert saved["seconds"] > 0
    totals.write_text(json.dumps(saved | {"seconds": 1000.0}))
    (totals.parent / "manifest.json").unlink()
    again = make_trainer(sources, max_steps=4, save_steps=2, save_strategy="steps")
    assert summarize(again.run_facts()).seconds is None
    during: list[float] = []

    class AtEachStep(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            during.append(summarize(again.run_facts()).seconds)

    again.add_callback(AtEachStep())
    again.train(resume_from_checkpoint=str(totals.parent))
    seconds = summarize(again.run_facts()).seconds
    assert 1000.0 < during[0] < during[1] < seconds < 1000.0 + again.state.log_history[-1]["train_runtime"] + 1
    assert again.meter.state()["seconds"] == seconds == summarize(again.run_facts()).seconds


def test_a_card_has_the_losses_of_the_best_weights(make_trainer, sources):
    """Of those that were loaded at the end, and not of the last evaluation."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the worst
    steps = {"save_steps": 1, "save_strategy": "steps", "eval_steps": 1, "eval_strategy": "steps", "max_steps": 3}
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": Rows(8, 0)}, **best, **steps)
    trainer.train()
    run = summarize(trainer.run_facts())
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert run.best_step == 1 and losses[3] < losses[1]
    (row,) = run.evaluations
    assert row.last_loss == losses[1] and "outer step 1, the best" in str(run_card(run))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1])
    later = trainer.evaluate(Rows(8, 1))["eval_loss"]  # of the same weights
    assert later != losses[1] and summarize(trainer.run_facts()).evaluations[0].last_loss == later


def test_the_card_has_its_files_and_keeps_the_users_text(trained, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    score = BenchmarkScore("GSM8K", "openai/gsm8k", "exact_match", 1.5, task_id="gsm8k")
    run = trained.write_card(tmp_path, languages=["en"], benchmarks=[score])
    assert {name for name in CARD_FILES if (tmp_path / name).exists()} == set(CARD_FILES)
    text = (tmp_path / "README.md").read_text()
    check_card(text)
    assert "license: mit" in text and "My words." in text and "- en" in text
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / picture).exists()
    assert text.count("![") == 2 and RunSummary.load(tmp_path).evaluations == run.evaluations
    with pytest.raises(ValueError, match="license"):
        trained.write_card(tmp_path, license="no licence")
    assert (tmp_path / "README.md").read_text() == text


def test_the_card_before_the_first_step_has_no_plots(make_trainer, sources, tmp_path):
    make_trainer(sources).write_card(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["README.md", "run_summary.json"]
    assert "![" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("column", "chat"), [("text", False), ("messages", True)])
def test_the_card_knows_what_the_model_was_trained_on(make_trainer, tmp_path, column, chat):
    tokenizer, text = tiny_tokenizer(), "the fox jumps " * 40
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    value = text if column == "text" else [{"role": "user", "content": text}]
    (tmp_path / "a.jsonl").write_text(json.dumps({column: value}) + "\n")
    config = {"sequence_length": 8, "sources": {"a": {"path": str(tmp_path / "a.jsonl"), f"{column}_column": column}}}
    mixture = load_mixture(MixtureConfig.from_dict(config), tokenizer, cache_dir=tmp_path / "cache")
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = make_trainer(mixture, model, {"processing_class": tokenizer}, per_device_train_batch_size=3)
    run = summarize(trainer.run_facts())
    assert (run.chat, trainer.run_facts().cosine_rows) == (chat, 3)
    assert run.prompt == ("What can you do?" if chat else "The")


def test_memory_is_pinned_without_a_choice_of_the_user(make_trainer, tmp_path):
    """A CPU that the user has chosen needs none."""
    trainer = make_trainer(Rows(8, 0), use_cpu=False)
    assert "dataloader_pin_memory" not in summarize(trainer.run_facts()).changed_hyperparameters


def test_one_plain_dataset_has_no_mixture(make_trainer, tmp_path):
    trainer = make_trainer(
        Rows(16, 0), trainer_kwargs={"eval_dataset": Rows(4, 1)}, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    run = trainer.write_card(tmp_path)
    assert run.mixture == [] and [row.role for row in run.evaluations] == ["held_out"]
    assert "## Mixture" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("train", [Rows(16, 0), {"web": Rows(16, 0), "code": Rows(16, 1)}], ids=["plain", "sources"])
def test_sets_without_one_of_a_source_are_not_called_ood(make_trainer, tmp_path, train):
    sets = {"validation": Rows(4, 1), "test": Rows(4, 2)}
    trainer = make_trainer(train, trainer_kwargs={"eval_dataset": sets}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    run = trainer.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    check_card(text)
    assert [(row.name, row.role) for row in run.evaluations] == [
        ("validation", "held_out"),
        ("test", "held_out"),
        ("macro", "macro"),
    ]
    validation, test, macro = (row.last_loss for row in run.evaluations)
    assert macro == pytest.approx((validation + test) / 2)
    assert "No out-of-distribution source was evaluated" in text and "OOD" not in text and "role: ood" not in text
    assert "| test | evaluation set |" in text and "| macro | mean over sets |" in text


def test_a_source_that_is_declared_ood_needs_no_other_set():
    log = [{"eval_law_loss": 3.0, "eval_test_loss": 2.0, "eval_loss": 2.5, "step": 1}]
    found = evaluations(log, ["web"], {"law": None, "test": None}, {"web": "org/web", "law": "org/law"})
    assert [(row.name, row.role) for row in found] == [("test", "held_out"), ("macro", "macro"), ("law", "ood")]


def test_a_model_from_a_folder_is_no_model_of_the_hub(make_trainer, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    model = type(tiny_llama()).from_pretrained("base")
    run = make_trainer(sources, model=model).write_card(tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert run.base_model == "./base" and "trained further from `base`" in text
    assert "base_model:" not in text and str(tmp_path) not in text


def test_the_code_of_an_adapters_card_runs(make_trainer, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(type(tiny_llama()).from_pretrained("base"), lora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kwargs = {"processing_class": tokenizer}
    trainer = make_trainer({"a": Rows(16, 0), "b": Rows(16, 1)}, model=model, trainer_kwargs=kwargs, max_steps=1)
    trainer.train()
    trainer.save_model()
    run = trainer.write_card()
    assert (run.adapter, run.base_model, run.trainable_parameters) == ("LoRA", "./base", trainable)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in text and f"LoRA adapter with {trainable:,} trainable parameters" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capsys.readouterr()
    exec(code.replace('path = "."', 'path = "out"'), {})  # the folder of the base model has the same parent
    assert capsys.readouterr().out.startswith("The")


def test_the_card_of_an_adapter_has_only_the_text_of_the_user(make_trainer, tmp_path):
    """Peft has a template of a card, and replaces the tags of an existing one."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make_trainer({"a": Rows(16, 0)}, model=peft.get_peft_model(tiny_llama(), lora), max_steps=1)
    trainer.train()
    trainer.save_model()
    path = tmp_path / "out/README.md"
    assert not list(path.parent.rglob(path.name))
    trainer.write_card()
    assert path.read_text().endswith(f"{END}\n")
    path.write_text(path.read_text().replace("tags:\n", "tags:\n- by-hand\n") + "\nMy words.\n")
    trainer.save_model()
    trainer.write_card()
    assert "- by-hand\n" in path.read_text() and path.read_text().endswith(f"{END}\n\nMy words.\n")
    assert "create_or_update_model_card" not in vars(trainer.model)


def test_the_adapter_of_a_model_without_a_name_has_a_card(make_trainer):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make_trainer({"a": Rows(16, 0)}, model=peft.get_peft_model(tiny_llama(), lora))
    run = trainer.write_card()
    assert (run.adapter, run.base_model, run.pipeline_tag) == ("LoRA", None, "text-generation")
    text = Path(trainer.args.output_dir, "README.md").read_text()
    check_card(text)
    assert "a base model without a name" in text and "base_model:" not in text and "from_pretrained" not in text


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def bert(kind: str, **options):
    config = transformers.BertConfig(vocab_size=VOCAB, **SIZES, **options)
    return getattr(transformers, f"BertFor{kind}")(config)


class OwnClassifier(transformers.BertForSequenceClassification):
    """A class of a user. The mappings of transformers have its parent only."""


class OwnModel(transformers.BertModel):
    """A base class. No Auto class loads it with a head."""


@pytest.mark.parametrize(
    ("make", "task", "auto_class"),
    [
        (tiny_llama, "text-generation", "AutoModelForCausalLM"),
        (partial(bert, "SequenceClassification"), "text-classification", "AutoModelForSequenceClassification"),
        (partial(bert, "MaskedLM"), "fill-mask", "AutoModelForMaskedLM"),
        (
            lambda: OwnClassifier(transformers.BertConfig(vocab_size=VOCAB, **SIZES)),
            "text-classification",
            "AutoModelForSequenceClassification",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "text2text-generation",
            "AutoModelForSeq2SeqLM",
        ),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
            ),
            "image-classification",
            "AutoModelForImageClassification",
        ),
        (lambda: OwnModel(transformers.BertConfig(vocab_size=VOCAB, **SIZES)), None, None),
    ],
)
def test_task_and_auto_class_follow_from_the_model(make_trainer, make, task, auto_class):
    trainer = make_trainer(Rows(8, 0), model=make())
    run = summarize(trainer.run_facts())
    assert (run.pipeline_tag, run.auto_class) == (task, auto_class)
    assert (
        auto_class is None
        or type(getattr(transformers, auto_class).from_config(trainer.model.config)) in type(trainer.model).__mro__
    )
    trainer.create_model_card(tasks="my-task")  # the user's value has priority
    text = Path(trainer.args.output_dir, "README.md").read_text()
    assert "pipeline_tag: my-task\n" in text and ("```python" in text) == (auto_class is not None)


@pytest.mark.parametrize("given", [{"tasks": "summarization"}, {"tasks": ["summarization", "translation"]}])
def test_tasks_may_be_given_as_the_trainer_takes_them(given):
    assert card_fields((), given)["pipeline_tag"] == "summarization"
    assert card_fields((None, None, None, None, None, *given.values()), {})["pipeline_tag"] == "summarization"
    assert "pipeline_tag" not in card_fields((), {"tasks": None})


def test_a_local_base_model_is_no_id_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs/first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given, known in (("runs/first", "./first"), ("org/model", "org/model")):
        assert card_fields((), {"finetuned_from": given}) == {"base_model": known}


class Labelled(Rows):
    """Rows of two classes."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": torch.tensor(i % 2)}


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_the_perplexity_of_token_losses_stays_on_the_card(make_trainer, sources, several, counts):
    """After a resume, after a prediction without labels, and with a model that takes no number of tokens."""
    model = tiny_llama()
    model.accepts_loss_kwargs = counts
    sets = {"text": Rows(4, 0), "law": Rows(4, 3)} if several else Rows(4, 0)
    trainer = make_trainer(sources, model=model, trainer_kwargs={"eval_dataset": sets})
    trainer.train()
    assert trainer.run_facts().unit == ("tokens" if counts else "rows")
    trainer.evaluate()
    trainer.predict([{"input_ids": row["input_ids"]} for row in Rows(4, 0)])
    facts = trainer.run_facts()
    assert facts.per_token and summarize(facts).has_perplexity and "eval_runtime" not in summarize(facts).numbers
    resumed = replace(facts, labels_are_tokens=None)
    assert resumed.per_token == (several or counts)


@pytest.mark.parametrize("several", [True, False])
def test_smoothed_losses_have_no_perplexity(make_trainer, sources, several):
    sets = {"text": Rows(4, 0), "law": Rows(4, 3)} if several else Rows(4, 0)
    trainer = make_trainer(sources, trainer_kwargs={"eval_dataset": sets}, label_smoothing_factor=0.1)
    assert not any("perplexity" in key for key in trainer.evaluate())
    summary = summarize(trainer.run_facts())
    assert summary.evaluations and not summary.has_perplexity and not summary.numbers


def test_the_card_of_a_classifier_has_metrics_and_code(make_trainer, tmp_path, monkeypatch):
    kwargs = {"eval_dataset": Labelled(4, 1), "compute_metrics": lambda predictions: {"accuracy": 0.75}}
    sources = {"one": Labelled(16, 0), "two": Labelled(8, 2)}
    trainer = make_trainer(sources, model=bert("SequenceClassification", num_labels=2), trainer_kwargs=kwargs)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    check_card(text)
    assert "on a mixture of 2 sources (16 rows)" in text
    assert "| Trained rows |" in text and "Rows per second" in text
    assert "| `eval_accuracy` | 0.75 |" in text and "erplexity" not in text and "`eval_runtime`" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    exec(code, found := {})
    assert type(found["model"]) is transformers.BertForSequenceClassification


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plots_of_smoothed_losses_name_no_nats(make_trainer, sources, monkeypatch, smoothing):
    drawn = []

    def plot_run(log, names, folder, per_token):
        drawn.append(per_token)
        return []

    monkeypatch.setattr("hf_nexus.plots.run.plot_run", plot_run)
    monkeypatch.setattr("hf_nexus.trainer.card.plot_run", plot_run)
    trainer = make_trainer(sources, max_steps=1, label_smoothing_factor=smoothing)
    trainer.add_callback(TensorBoardCallback(MagicMock()))
    trainer.train()
    trainer.write_card()
    assert drawn == [not smoothing] * 2
