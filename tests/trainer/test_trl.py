"""Trainers of TRL with the mixin: each source is prepared separately, and the update uses the loss of the trainer."""

import json
import runpy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

pytest.importorskip("trl")

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.bema_for_ref_model import DPOTrainer as ReferenceDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from hf_nexus import NexusConfig, NexusConfigMixin, NexusTrainerMixin
from hf_nexus.mixture.builtin.tokenizer import CHAT_TEMPLATE
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny import tiny_llama
from tests.support.tiny_config import documents
from tests.support.tiny_tokenizer import EOS, tiny_tokenizer
from tests.trainer.test_interplay import Recorded, adamw, by_hand, distance, plain_loss

RECIPE = Path(__file__).parents[2] / "recipes/sft_with_trl.py"


class NexusSFTTrainer(Recorded, SFTTrainer):
    """`Recorded` is a NexusTrainer that keeps its micro-batches."""


class NexusDPOTrainer(Recorded, DPOTrainer):
    pass


@dataclass
class NexusSFTConfig(NexusConfigMixin, SFTConfig):
    pass


@dataclass
class NexusDPOConfig(NexusConfigMixin, DPOConfig):
    pass


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`make(sources, trainer_class, config_class, model=..., **config)` builds a quiet trainer on the CPU."""

    def make(sources: Any, trainer: type = NexusSFTTrainer, config: type = NexusSFTConfig, **options: Any) -> Any:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
            "max_length": 48,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        model = options.pop("model", None) or llama(tokenizer)
        kwargs = {name: options.pop(name) for name in ("eval_dataset", "ref_model") if name in options}
        return trainer(
            model=model, args=config(**{**defaults, **options}), train_dataset=sources, processing_class=tokenizer,
            **kwargs,
        )  # fmt: skip

    return make


def llama(tokenizer: Any, **shape: Any) -> torch.nn.Module:
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256, **shape)


def texts() -> dict[str, Dataset]:
    """Documents of about 40 tokens, which packing splits over rows."""
    alphabets = {"letters": ("abcd", 24), "digits": ("1234", 12)}
    return {
        name: Dataset.from_dict({"text": [d[:40] for d in documents(alphabet, count, 0)]})
        for name, (alphabet, count) in alphabets.items()
    }


def conversations() -> dict[str, Dataset]:
    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = {name: list(data["text"]) for name, data in texts().items()}
    return {
        name: Dataset.from_dict({"messages": [talk(d[:9], d[10:24]) for d in docs]}) for name, docs in rows.items()
    }


def preferences() -> dict[str, Dataset]:
    rows = {name: list(data["text"]) for name, data in texts().items()}
    return {
        name: Dataset.from_dict(
            {"prompt": [d[:9] for d in docs], "chosen": [d[9:20] for d in docs], "rejected": [d[20:34] for d in docs]}
        )
        for name, docs in rows.items()
    }


def learned(trainer: Any) -> int:
    """Target tokens of the training rows."""
    batches = [batch["labels"][:, 1:] for window, _ in trainer.windows for batch in window]
    return sum(int((labels != -100).sum()) for labels in batches)


# ---- Sources ----


def test_each_source_is_packed_as_the_parent_packs_it_alone(make, tokenizer):
    trainer = make(texts(), packing=True, packing_strategy="wrapped")
    sizes = {}
    for name, prepared in trainer.train_dataset.sources.items():
        alone = make(texts()[name], SFTTrainer, SFTConfig, packing=True, packing_strategy="wrapped").train_dataset
        assert prepared["input_ids"][:] == alone["input_ids"][:]
        assert any(EOS in tokenizer.decode(row[:-1]) for row in prepared["input_ids"])  # several documents per row
        sizes[name] = len(prepared)
    letters = tokenizer.decode([i for row in trainer.train_dataset.sources["letters"]["input_ids"] for i in row])
    assert not set("1234") & set(letters)
    total = sum(sizes.values())
    assert trainer.mixture_weights == pytest.approx({name: size / total for name, size in sizes.items()})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "tokens/letters" in entry][-1]
    assert logs["tokens/letters"] + logs["tokens/digits"] == learned(trainer)
    assert "mean_token_accuracy" in logs  # metrics of the parent class


def test_a_source_column_is_split_before_packing(make):
    from datasets import concatenate_datasets

    parts = texts()
    one = concatenate_datasets([part.add_column("source", [name] * len(part)) for name, part in parts.items()])
    settings = {"packing": True, "packing_strategy": "wrapped"}
    expected, found = make(parts, **settings).train_dataset, make(one, **settings).train_dataset
    for name, rows in expected.sources.items():
        assert found.sources[name]["input_ids"][:] == rows["input_ids"][:]


def test_only_what_the_assistant_says_is_learned(make, tokenizer):
    trainer = make(conversations(), assistant_only_loss=True)
    for name, source in conversations().items():
        for row, messages in zip(trainer.train_dataset.sources[name], source["messages"], strict=True):
            said = tokenizer.decode([label for label in row["labels"] if label != -100])
            assert said == " " + messages[1]["content"] + EOS
            assert tokenizer.decode(row["input_ids"]).startswith(f"Q: {messages[0]['content']}")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert sum(trainer.meter.trained_tokens.values()) == learned(trainer)
    assert logs["loss"] > 0


# ---- The update ----


def test_fine_tuning_is_what_a_loop_by_hand_does(make, tokenizer):
    trainer = make(conversations(), assistant_only_loss=True, max_steps=3)
    trainer.train()
    model = llama(tokenizer)
    assert distance(model, trainer.model) > 1e-2
    assert distance(by_hand(model, trainer.windows, plain_loss, adamw(model)), trainer.model) < 1e-5


@pytest.mark.parametrize("precomputed", [False, True])
def test_preference_optimization_is_what_a_loop_by_hand_does(make, tokenizer, precomputed, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    reference = llama(tokenizer)
    settings: dict[str, Any] = {"precompute_ref_log_probs": True} if precomputed else {"ref_model": llama(tokenizer)}
    trainer = make(preferences(), NexusDPOTrainer, NexusDPOConfig, max_steps=3, beta=0.5, **settings)
    trainer.train()

    def log_probabilities(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (chosen * batch["completion_mask"][:, 1:]).sum(-1)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            start = log_probabilities(reference, batch)
        better, worse = (log_probabilities(model, batch) - start).chunk(2)
        return -F.logsigmoid(0.5 * (better - worse)).mean()

    model = llama(tokenizer)
    assert distance(model, trainer.model) > 1e-2
    assert distance(by_hand(model, trainer.windows, loss, adamw(model)), trainer.model) < 1e-5
    # the collator stacks pairs to twice as many rows
    assert (sum(trainer.meter.trained_tokens.values()), trainer.meter.unit) == (3 * 4 * 2, "rows")


def test_figures_of_the_parent_are_those_of_each_evaluation_set(make, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    sets = {"letters": preferences()["letters"], "law": preferences()["digits"]}
    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.1, "ref_model": llama(tokenizer)}
    trainer = make(preferences(), NexusDPOTrainer, NexusDPOConfig, eval_dataset=sets, **settings)
    trainer.train()
    found = trainer.evaluate()
    assert trainer.state.log_history[-1].items() >= found.items()
    assert sum("eval_law_loss" in entry for entry in trainer.state.log_history) == 1
    margins = {name: found[f"eval_{name}_rewards/margins"] for name in sets}
    assert "eval_rewards/margins" not in found
    for name, data in sets.items():
        alone = make(preferences(), NexusDPOTrainer, NexusDPOConfig, model=trainer.model, ref_model=llama(tokenizer))
        assert alone.evaluate(alone._prepare_dataset(data, tokenizer, alone.args, name))[
            "eval_rewards/margins"
        ] == pytest.approx(margins[name], abs=1e-4)
    assert not any("perplexity" in key for key in found)  # its loss is not per token


@pytest.mark.parametrize("several", [True, False])
def test_a_card_of_preferences_shows_rewards_and_no_perplexity(make, tokenizer, monkeypatch, tmp_path, several):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    sets = preferences()
    options: dict[str, Any] = {"eval_dataset": sets if several else sets["letters"], "ref_model": llama(tokenizer)}
    trainer = make(preferences(), NexusDPOTrainer, NexusDPOConfig, **options)
    trainer.evaluate()
    assert not trainer.run_facts().per_token  # an evaluation without training
    trainer.train()
    trainer.evaluate()
    run = trainer.write_card()
    text = Path(trainer.args.output_dir, "README.md").read_text()
    assert run.evaluations and "erplexity" not in text and "nats" not in text
    key = f"eval_{'letters_' * several}rewards/accuracies"
    assert f"| `{key}` |" in text and key in run.numbers
    assert not replace(trainer.run_facts(), labels_are_tokens=None).per_token  # as after a resume


def test_gradient_cosines_leave_the_log_of_the_parent_as_it_is(make):
    """The measurement calls `compute_loss`, and has a log line."""

    def logged(every: int) -> list[dict[str, float]]:
        sets = {name: rows.select(range(4)) for name, rows in texts().items()}
        settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "max_steps": 3}
        trainer = make(texts(), eval_dataset=sets, gradient_cosine_steps=every, **settings)
        trainer.train()
        trainer.source_cosines()
        trainer.evaluate()
        return trainer.state.log_history

    def of_parent(entry: dict[str, float]) -> dict[str, float]:
        return {k: v for k, v in entry.items() if k.endswith(("entropy", "mean_token_accuracy", "num_tokens"))}

    with_cosines = logged(1)
    cosines = [entry for entry in with_cosines if any(key.startswith("cosine/") for key in entry)]
    assert len(cosines) == 4 and not any(map(of_parent, cosines))
    expected = [of_parent(entry) for entry in logged(0)]
    assert [of_parent(entry) for entry in with_cosines if entry not in cosines] == expected
    assert sum(map(bool, expected)) == 3


def test_it_resumes_to_the_bit_and_evaluates_each_source(make, tmp_path):
    settings: dict[str, Any] = {"packing": True, "packing_strategy": "wrapped", "max_steps": 4, "save_steps": 2}
    held_out = {name: rows.select(range(8)) for name, rows in texts().items()}
    whole = make(texts(), eval_dataset=held_out, save_strategy="steps", **settings)
    whole.train()
    metrics = whole.evaluate()
    assert {"eval_letters_loss", "eval_digits_loss", "eval_loss"} <= metrics.keys()
    assert (tmp_path / "out/README.md").exists()
    resumed = make(texts(), output_dir=str(tmp_path / "again"), save_strategy="no", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    whole.save_model(), resumed.save_model()
    assert same(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "again"))


def test_adapters_on_a_quantized_base_stay_float32(make, tokenizer):
    """TRL makes them bfloat16 on a base of 4 or 8 bits."""
    peft = pytest.importorskip("peft")
    base = llama(tokenizer, dtype=torch.bfloat16)
    base.is_loaded_in_4bit = True
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make(texts(), model=peft.get_peft_model(base, lora))
    base.is_loaded_in_4bit = False  # otherwise the Trainer asks bitsandbytes for its size
    frozen = [p.clone() for p in trainer.model.parameters() if not p.requires_grad]
    trainer.train()
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(map(torch.equal, frozen, [p for p in trainer.model.parameters() if not p.requires_grad]))
    assert trainer.meter.inner_steps_skipped == 0
    assert sum(p.numel() for p in trainer._walker.nexus.params) == trainer.model.num_parameters(only_trainable=True)


def test_a_checkpoint_by_its_path_is_made_float32(make, tokenizer, tmp_path, caplog):
    """TRL loads it without a `device_map`, and its own default computes in bfloat16."""
    llama(tokenizer, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    trainer = make(texts(), model=str(tmp_path / "base"), model_init_kwargs={"dtype": "auto"}, bf16=None)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "computes in bfloat16 (autocast)" in caplog.text and trainer.meter.inner_steps_skipped == 0


def test_the_recipe_trains_adapters_on_own_conversations(tokenizer, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("letters", "digits")}
    for name, rows in conversations().items():
        rows.to_json(files[name])
    quiet = ["--use_cpu", "--report_to=none", "--disable_tqdm=true", "--max_length=48", "--eval_rows=4", "--lora_r=2"]
    shares = {"letters": 0.75, "digits": 0.25}
    given = ["--files", json.dumps(files), "--mixture_weights", json.dumps(shares), "--max_steps", "4"]

    def run(out: str, *flags: str) -> Path:
        where = ["--model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["sft_with_trl.py", *where, *given, *quiet, "--save_steps", "2", *flags])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return tmp_path / out

    whole = load_file(run("whole") / "adapter_model.safetensors")
    printed = capsys.readouterr().out
    assert all(f"{name}: loss " in printed for name in files)
    assert yaml.safe_load((tmp_path / "whole/nexus.yaml").read_text())["mixture_weights"] == shares
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)  # 0 before training
    resumed = run("resumed", "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-2"))
    assert same(whole, load_file(resumed / "adapter_model.safetensors"))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("parent", "config"),
    [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig), (OnlineDPOTrainer, OnlineDPOConfig)],
)
def test_trainers_that_generate_are_refused(parent, config, tmp_path, tokenizer):
    trainer = type("Ours", (NexusTrainerMixin, parent), {})
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=f"does not support {parent.__name__}: it generates text"):
        trainer(model=llama(tokenizer), args=args, train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}))


def test_without_nexus_a_trainer_that_generates_is_itself(tmp_path, tokenizer):
    """An arm without Nexus uses it unchanged. Several sources are an error."""

    class Ours(NexusTrainerMixin, GRPOTrainer):
        pass

    @dataclass
    class OurConfig(NexusConfigMixin, GRPOConfig):
        pass

    def variety(completions, **_):
        return [float(len(set(completion))) for completion in completions]

    def run(trainer, config, sources, **own):
        args = config(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2,
            num_generations=2, max_completion_length=4, max_steps=2, gradient_checkpointing=False, disable_tqdm=True,
            learning_rate=1e-2, save_strategy="no", **own,
        )  # fmt: skip
        made = trainer(llama(tokenizer), variety, args, sources, processing_class=tokenizer)
        made.train()
        return made.model.state_dict()

    prompts = Dataset.from_dict({"prompt": ["abc", "dcb"] * 8})
    ours, stock = run(Ours, OurConfig, prompts, nexus=False), run(GRPOTrainer, GRPOConfig, prompts)
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    assert not torch.equal(stock["lm_head.weight"], llama(tokenizer).lm_head.weight)
    with pytest.raises(ValueError, match=r"does not support GRPOTrainer.*one plain dataset"):
        run(Ours, OurConfig, {"a": prompts, "b": prompts}, nexus=False)


def test_arguments_of_another_trainer_are_refused(make):
    with pytest.raises(ValueError, match=r"DPOTrainer must be a DPOConfig, but got NexusConfig.*NexusDPOConfig"):
        NexusDPOTrainer(llama(tiny_tokenizer()), args=NexusConfig(report_to="none", use_cpu=True))


@pytest.mark.parametrize("config", [NexusConfig, TrainingArguments])
def test_a_parent_converts_arguments_of_transformers(tokenizer, tmp_path, config):
    options = {"inner_lr": 0.02} if config is NexusConfig else {}
    args = config(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **options)
    before = dict(vars(args))
    trainer = NexusSFTTrainer(llama(tokenizer), args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    assert isinstance(trainer.args, SFTConfig) and trainer.args.inner_lr == options.get("inner_lr", 0.05)
    assert vars(args) == before


def test_a_parent_makes_arguments_if_none_are_given(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl.trainer.sft_trainer.SFTConfig", partial(SFTConfig, use_cpu=True))
    model = llama(tokenizer)
    model.config._name_or_path = "some/tiny"
    trainer = NexusSFTTrainer(model, train_dataset=texts(), processing_class=tokenizer)
    assert trainer.args.output_dir == "tiny-SFT" and trainer.args.nexus


@pytest.mark.parametrize("preferred", [False, True], ids=["sft", "dpo"])
def test_examples_that_are_too_long_are_counted(make, tokenizer, caplog, preferred):
    rows, build = conversations, partial(make, config=partial(NexusSFTConfig, assistant_only_loss=True))
    if preferred:
        rows, build = preferences, partial(make, trainer=NexusDPOTrainer, config=NexusDPOConfig)
        build = partial(build, ref_model=llama(tokenizer))

    def with_long(first: int) -> dict[str, Dataset]:
        """The sources, one with prompts that are too long from some row on."""

        def lengthen(row: dict[str, Any], number: int) -> dict[str, Any]:
            prompt = row["prompt"] if preferred else row["messages"][0]["content"]
            prompt += 99 * " a" * (number >= first)
            return (
                {"prompt": prompt}
                if preferred
                else {"messages": [{**row["messages"][0], "content": prompt}, row["messages"][1]]}
            )

        return {**rows(), "digits": rows()["digits"].map(lengthen, with_indices=True)}

    build(with_long(12))
    assert "left out" not in caplog.text
    build(with_long(9))
    assert "Source 'digits': 3 of 12 examples are left out, for example because their prompts fill" in caplog.text
    build(rows(), eval_dataset=with_long(8))
    assert "Dataset 'digits': 4 of 12 examples are left out" in caplog.text
    with pytest.raises(ValueError, match="Source 'digits': 12 of 12 examples are left out"):
        build(with_long(0))


def test_examples_are_counted_with_arguments_of_any_class(tokenizer, caplog, tmp_path):
    """They are converted, and the limit is that of TRL's own."""
    plain = NexusConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    prompts = Dataset.from_dict({"prompt": ["a", "a", " a" * 5000], "completion": ["b"] * 3})
    build = partial(NexusSFTTrainer, llama(tokenizer), plain, processing_class=tokenizer)
    build(train_dataset={"one": prompts, "two": prompts})
    build(train_dataset=prompts)
    for what in ("Source 'one'", "Source 'two'", "Dataset 'train'"):
        assert f"{what}: 1 of 3 examples are left out, for example because their prompts fill max_length=1024" in (
            caplog.text
        )


def test_rows_that_packing_joins_are_not_counted(make, caplog):
    sources = {name: rows.select_columns("text") for name, rows in texts().items()}
    make(sources, packing=True, eval_packing=False, eval_dataset=sources, max_length=512)
    assert "left out" not in caplog.text


def test_columns_that_trl_does_not_read_may_differ(make):
    letters, digits = texts()["letters"], texts()["digits"]
    make({"letters": letters.add_column("label", [1] * len(letters)), "digits": digits}, max_steps=1).train()


def test_sources_of_several_formats_are_refused(make):
    with pytest.raises(ValueError, match=r"Source 'talk' has the columns \['messages'\], but 'letters' has \[\]"):
        make({"letters": texts()["letters"], "talk": conversations()["digits"]})


@pytest.mark.parametrize("nexus", [True, False])
@pytest.mark.parametrize(("parent", "config"), [(CPOTrainer, CPOConfig), (ORPOTrainer, ORPOConfig)])
def test_trainers_that_prepare_one_dataset_take_one(make, parent, config, nexus):
    ours = type("Ours", (NexusTrainerMixin, parent), {})
    settings = dataclass(type("Settings", (NexusConfigMixin, config), {}))
    sources = preferences()
    with pytest.raises(ValueError, match=f"{parent.__name__} prepares one dataset, but got letters, digits"):
        make(sources, ours, settings, nexus=nexus)
    trainer = make(concatenate_datasets(list(sources.values())), ours, settings, nexus=nexus)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_constructor_that_only_passes_on_is_passed_over(make, tokenizer):
    """That of the parent says which arguments it takes."""
    ours = type("Ours", (NexusTrainerMixin, ReferenceDPOTrainer), {})
    trainer = make(preferences(), ours, NexusDPOConfig, ref_model=llama(tokenizer, seed=1))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.mixture_weights is not None


def test_the_order_that_kto_needs_is_not_that_of_sources(make):
    ours = type("Ours", (NexusTrainerMixin, KTOTrainer), {})
    sources = {
        name: Dataset.from_dict({"prompt": of["prompt"], "completion": of["chosen"], "label": [True] * len(of)})
        for name, of in preferences().items()
    }
    with pytest.raises(ValueError, match=r"'sequential' is not possible .* For KTO, .* pass one plain dataset"):
        make(sources, ours, KTOConfig)


@pytest.mark.parametrize("mixes", [True, False])
def test_conversations_without_a_chat_template_are_an_error(make, tokenizer, mixes):
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    chats = Dataset.from_list([{"messages": turns}] * 8)
    with pytest.raises(ValueError, match="The examples are conversations, and the tokenizer has no chat template"):
        make({"a": chats, "b": chats} if mixes else chats)
