"""Packed rows of a mixture in training and evaluation: their documents are isolated if the model can do it."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import CLIPVisionConfig, DataCollatorForLanguageModeling, LlavaConfig, LlavaForConditionalGeneration

from hf_nexus import MixtureConfig, NexusTrainer, load_mixture
from hf_nexus.mixture.isolation import isolation_problem
from hf_nexus.trainer.card import summarize
from tests.support.stream_documents import documents_of
from tests.support.streams import texts
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import EOS, MARKING, tiny_tokenizer

VOCAB, LENGTH = 320, 48


def chats(folder: Path, streaming: bool = False, **settings: Any) -> Any:
    """A mixture of conversations whose template ends every turn with the EOS, as ChatML does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '" + EOS + "' }}{% endfor %}"
    rows = [[{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")] for i in range(80)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = {"path": str(folder / "chats.jsonl"), "messages_column": "messages", "eval_rows": 9, "weight": 1}
    config = {"sources": {"chats": source | {"streaming": streaming}}, "sequence_length": LENGTH, **settings}
    return load_mixture(MixtureConfig.from_dict(config), tokenizer, cache_dir=folder / "cache")


class Plain(nn.Module):
    """A module that is not of transformers: it takes its positions by `**kwargs`, or not at all."""

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.model, self.table = model, nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if self.model is not None:
            return {**self.model(input_ids=input_ids, labels=labels, **kwargs)}
        if "position_ids" in kwargs:
            raise TypeError("unexpected position_ids")
        logits = self.table(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def batches(trainer: Any) -> list[Any]:
    return [*trainer.get_train_dataloader(), *(b for n in ("chats",) for b in trainer.get_eval_dataloader(n))]


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_of_a_conversation_stay_together(make_trainer, tmp_path, streaming):
    for _ in range(2):  # packed, and from the cache
        mixture = chats(tmp_path, streaming)
        trainer = make_trainer(mixture, tiny_llama(vocab_size=VOCAB), {"processing_class": tiny_tokenizer()})
        found = batches(trainer)
        for batch in found:
            for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
                starts = (positions == 0).nonzero().flatten().tolist()
                documents = [tiny_tokenizer().decode(part) for part in ids.tensor_split(starts[1:])]
                assert len(documents) > 1
                assert all(text.startswith("user ") and "assistant" in text for text in documents[1:-1])
                assert (labels[starts] == -100).all() and (labels == -100).sum() == len(starts)


@pytest.mark.parametrize("streaming", [False, True])
def test_joined_documents_are_one_row_to_the_model(make_trainer, tmp_path, streaming):
    mixture = chats(tmp_path, streaming, isolate_documents=False)
    trainer = make_trainer(mixture, tiny_llama(vocab_size=VOCAB), {"processing_class": tiny_tokenizer()})
    for batch in batches(trainer):
        assert {"input_ids", "labels"} <= batch.keys() and "position_ids" not in batch
        assert batch["labels"].equal(batch["input_ids"])


def test_a_model_that_cannot_isolate_is_told_or_refused(make_trainer, tmp_path, caplog):
    model = tiny_llama(vocab_size=VOCAB)
    model.config._attn_implementation = "paged|sdpa"  # no mask between documents
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        trainer = make_trainer(chats(tmp_path), model, {"processing_class": tiny_tokenizer()})
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "LlamaForCausalLM lets one document change the next (paged|sdpa)" in caplog.text
    assert all("position_ids" not in batch for batch in batches(trainer))
    with pytest.raises(ValueError, match=r"isolate_documents: .*paged\|sdpa"):
        make_trainer(chats(tmp_path, isolate_documents=True), model)


def test_a_cache_is_refused_unless_documents_are_joined(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"use_cache=True would let .* isolate_documents to false"):
        make_trainer(chats(tmp_path), tiny_llama(vocab_size=VOCAB), use_cache=True)
    make_trainer(chats(tmp_path, isolate_documents=False), tiny_llama(vocab_size=VOCAB), use_cache=True)


@pytest.mark.parametrize("able", [True, False])
def test_a_new_model_of_a_training_is_probed(make_trainer, tmp_path, able):
    models = [tiny_llama(vocab_size=VOCAB), tiny_llama(1, vocab_size=VOCAB)]
    if not able:
        models[1].config._attn_implementation = "paged|sdpa"
    args, made = make_trainer(chats(tmp_path), models[0]).args, iter(models)
    trainer = NexusTrainer(None, args, train_dataset=chats(tmp_path), model_init=lambda: next(made))
    assert all("position_ids" in batch for batch in batches(trainer))
    trainer.train()
    assert trainer.model is models[1] and (isolation_problem(trainer.model) is None) == able
    assert all(("position_ids" in batch) == able for batch in batches(trainer))


def test_a_new_model_with_too_few_embeddings_is_refused(make_trainer, tmp_path):
    sizes = iter((VOCAB, 8))
    args = make_trainer(chats(tmp_path), tiny_llama(vocab_size=VOCAB)).args
    trainer = NexusTrainer(
        None, args, train_dataset=chats(tmp_path), model_init=lambda: tiny_llama(vocab_size=next(sizes))
    )
    with pytest.raises(ValueError, match="embeddings for 8 tokens only"):
        trainer.train()


@pytest.mark.parametrize("llama", [False, True])
def test_a_plain_module_gets_positions_if_it_takes_them(make_trainer, tmp_path, llama):
    model = Plain(tiny_llama(vocab_size=VOCAB, use_cache=False) if llama else None)
    trainer = make_trainer(chats(tmp_path), model, {"processing_class": tiny_tokenizer()}, max_steps=1)
    trainer.train()
    assert all(("position_ids" in batch) == llama for batch in batches(trainer))
    assert trainer.evaluate()["eval_chats_loss"] > 0


def test_the_text_model_of_a_composite_has_no_cache(make_trainer, tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tiny_llama(vocab_size=VOCAB, use_cache=True).config
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1)
    model = LlavaForConditionalGeneration(config)
    trainer = make_trainer(chats(tmp_path), model, {"processing_class": tiny_tokenizer()}, max_steps=1)
    assert all("position_ids" in batch for batch in batches(trainer))
    trainer.train()


@pytest.mark.parametrize("isolate", [True, False])
def test_an_eos_that_pads_is_a_target_of_every_micro_batch(make_trainer, tmp_path, isolate):
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    kwargs = {"processing_class": tokenizer, "data_collator": collate}
    trainer = make_trainer(chats(tmp_path, isolate_documents=isolate), tiny_llama(vocab_size=VOCAB), kwargs)
    for batch in batches(trainer):
        ends = batch["input_ids"] == tokenizer.eos_token_id
        ends[:, 0] = False  # a row may begin with the EOS of a cut document
        assert ends.any() and (batch["labels"][ends] == tokenizer.eos_token_id).all()


def test_streamed_documents_need_no_padding_token(make_trainer):
    source = documents_of(texts(40).to_iterable_dataset(2), 16)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = make_trainer(
        {"text": source},
        tiny_llama(vocab_size=VOCAB),
        {"processing_class": tokenizer},
        mixture_weights={"text": 1.0},
        max_steps=1,
    )
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"input_ids", "labels"} <= batch.keys() and not {"position_ids", "attention_mask"} & batch.keys()


def instructions(folder: Path, streaming: bool) -> Any:
    """A mixture of text, prompts with completions, and conversations."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKING
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    rows = [{"text": f"{i} fox", "answer": f"{i} dog", "messages": chat} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_each = {
        "text": {"text_column": "text"},
        "pairs": {"prompt_column": "text", "completion_column": "answer", "loss_on": "completion", "eval_rows": 20},
        "chats": {"messages_column": "messages", "loss_on": "assistant"},
    }
    common = {"path": str(folder / "rows.jsonl"), "streaming": streaming, "weight": 1}
    sources = {name: common | keys for name, keys in of_each.items()}
    config = MixtureConfig.from_dict({"sources": sources, "sequence_length": LENGTH, "isolate_documents": False})
    return load_mixture(config, tokenizer, cache_dir=folder / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_instructions_train_on_what_they_should(make_trainer, tmp_path, streaming):
    mixture = instructions(tmp_path, streaming)
    tokenizer = {"processing_class": tiny_tokenizer()}
    trainer = make_trainer(mixture, tiny_llama(vocab_size=VOCAB), tokenizer, max_steps=3, source_schedule="stratified")
    trained, step = Counter(), trainer.training_step

    def noting(model, inputs, *args):
        source = trainer._window.sources[len(trainer._window.inputs)]
        targets = inputs["labels"][:, 1:]
        trained[source] += int((targets != -100).sum())
        shown = tokenizer["processing_class"].decode(targets[targets != -100])
        assert ("fox" in shown) == (source == "text")
        return step(model, inputs, *args)

    trainer.training_step = noting
    trainer.train()
    (*_, log) = (entry for entry in trainer.state.log_history if "tokens/text" in entry)
    for name, rows in trainer.meter.rows.items():
        assert log[f"tokens/{name}"] == trained[name] > 0
        assert log.get(f"tokens_read/{name}", trained[name]) == rows * (LENGTH - (name == "text"))
    assert trained["pairs"] < log["tokens_read/pairs"] and trainer.evaluate()["eval_pairs_loss"] > 0
    epochs = {row.source: row.epochs for row in summarize(trainer.run_facts()).mixture}
    for name, size in mixture.tokens.items():
        assert epochs[name] == (size and trainer.meter.rows[name] * LENGTH / size)


def test_packed_and_other_rows_have_their_own_collators(make_trainer):
    others = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 9)
    sources = {"packed": documents_of(texts(40).to_iterable_dataset(2), 16), "others": others}
    weights = {"packed": 0.5, "others": 0.5}
    trainer = make_trainer(
        sources,
        tiny_llama(vocab_size=VOCAB),
        {"processing_class": tiny_tokenizer()},
        mixture_weights=weights,
        max_steps=2,
        source_schedule="stratified",
    )
    found = list(trainer.get_train_dataloader())
    assert {batch["input_ids"].shape[1] for batch in found} == {16, 3}
    assert all(("attention_mask" in batch) == (batch["input_ids"].shape[1] == 3) for batch in found)  # the Trainer's
    assert all("position_ids" not in batch for batch in found)
    trainer.train()


def test_packed_rows_fit_a_plain_loop(tmp_path):
    rows = torch.utils.data.DataLoader(chats(tmp_path).train["chats"], batch_size=3)
    batch = next(iter(rows))
    assert all(batch[name].shape == (3, LENGTH) for name in ("input_ids", "labels", "position_ids"))
    assert tiny_llama(vocab_size=VOCAB)(**batch, use_cache=False).loss > 0
