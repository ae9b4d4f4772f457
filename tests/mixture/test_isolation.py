"""Documents of a packed row are computed as if alone, with every attention that runs here."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from hf_nexus.mixture.isolation import PackedRowCollator, choose_isolation, isolation_problem, needs_flat_rows

from ..support.tiny import VOCAB, tiny_llama
from ..support.tiny_tokenizer import tiny_tokenizer

EOS, BOS = 0, 3
LENGTHS = [[5, 9, 2, 16], [1, 20, 11], [32]]  # of the documents of each row, the EOS included


@pytest.fixture
def rows() -> torch.Tensor:
    """Packed rows, (3, 32); the last row is a piece of a longer document, without an EOS."""
    ids = torch.randint(1, VOCAB, (3, 32), generator=torch.Generator().manual_seed(0))
    for row, lengths in enumerate(LENGTHS[:2]):
        ids[row, torch.tensor(lengths).cumsum(0) - 1] = EOS
    return ids


def packed_rows(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The rows as packing returns them."""
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS]
    return [{"input_ids": r, "labels": r, "position_ids": p} for r, p in zip(rows, positions, strict=True)]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def isolated(collate: Any = stack, flatten: bool = False) -> PackedRowCollator:
    return PackedRowCollator(collate, EOS, isolate=True, flatten=flatten)


def documents(row: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return list(row.split(lengths))


def model_with(attention: str) -> torch.nn.Module:
    return tiny_llama(attn_implementation=attention, use_cache=False).eval()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_document_in_a_packed_row_has_the_logits_it_has_alone(rows, attention, flatten):
    model = model_with(attention)
    batch = isolated(flatten=flatten)(packed_rows(rows))
    packed = model(**batch).logits.reshape(3, 32, -1)
    for row, logits, lengths in zip(rows, packed, LENGTHS, strict=True):
        alone = [model(input_ids=document[None]).logits[0] for document in documents(row, lengths)]
        torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_without_isolation_the_second_document_sees_the_first(rows, attention):
    model = model_with(attention)
    first, second = LENGTHS[0][:2]
    alone = model(input_ids=rows[:1, first : first + second]).logits[0]
    packed = model(input_ids=rows[:1]).logits[0, first : first + second]
    assert (packed - alone).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_and_gradient_are_those_of_single_documents(rows, attention):
    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        return [p.grad.clone() for p in model.parameters()]

    losses, grads = [], []
    for flatten in (False, True):
        model = model_with(attention)
        loss = model(**isolated(flatten=flatten)(packed_rows(rows))).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(model))
    model, total, count = model_with(attention), torch.zeros(()), 0
    for row, lengths in zip(rows, LENGTHS, strict=True):
        for document in documents(row, lengths):
            if len(document) > 1:
                total = total + model(input_ids=document[None], labels=document[None]).loss * (len(document) - 1)
                count += len(document) - 1
    (total / count).backward()
    for loss, grad in zip(losses, grads, strict=True):
        assert loss == pytest.approx((total / count).item(), rel=1e-5)
        for a, b in zip(grad, gradients(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flatten", [False, True])
def test_first_tokens_of_documents_are_not_counted(rows, flatten):
    labels = isolated(flatten=flatten)(packed_rows(rows))["labels"]
    expected = sum(length - 1 for lengths in LENGTHS for length in lengths)
    assert int((labels[..., 1:] != -100).sum()) == expected  # as transformers counts: what is left after the shift
    assert int((labels != -100).sum()) == expected


def test_positions_count_from_the_start_of_each_document(rows):
    positions = isolated()(packed_rows(rows))["position_ids"]
    for row, lengths in zip(positions, LENGTHS, strict=True):
        assert row.tolist() == [i for length in lengths for i in range(length)]


def test_labels_that_were_no_targets_before_stay_none(rows):
    def collate(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = stack(given)
        batch["labels"][:, 20:] = -100
        return batch

    labels = isolated(collate)(packed_rows(rows))["labels"]
    assert (labels[:, 20:] == -100).all() and (labels[2, 1:20] == rows[2, 1:20]).all()


def test_padding_is_refused(rows):
    def collate(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = stack(given)
        batch["attention_mask"][0, -1] = 0
        return batch

    with pytest.raises(ValueError, match=r"pads the rows.*isolate_documents to false"):
        isolated(collate)(packed_rows(rows))


def test_a_worker_can_be_given_the_collator(rows):
    collate = pickle.loads(pickle.dumps(isolated(flatten=True)))
    assert collate(packed_rows(rows))["input_ids"].shape == (1, 96)


def test_flex_attention_gets_a_mask_of_blocks(rows, monkeypatch):
    from transformers import masking_utils

    # Its kernel takes a minute to compile, so only its mask is tested.
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda mask_mod, **kwargs: mask_mod)
    config = tiny_llama().config
    config._attn_implementation = "flex_attention"
    positions = isolated()(packed_rows(rows))["position_ids"]
    sees = masking_utils.create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(3, 32, config.hidden_size),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    for row, lengths in enumerate(LENGTHS):
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        for q in range(32):
            for k in range(32):
                seen = bool(sees(torch.tensor(row), torch.tensor(0), torch.tensor(q), torch.tensor(k)))
                assert seen == (k <= q and bool(document[k] == document[q]))


def test_flash_attention_cuts_a_row_where_positions_restart(rows):
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    positions = isolated(flatten=True)(packed_rows(rows))["position_ids"]
    assert _is_packed_sequence(positions, batch_size=1) and not _is_packed_sequence(positions.view(3, 32), 3)
    (cuts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    lengths = [length for row in LENGTHS for length in row]
    assert cuts.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()] and longest == 32


# ---- The collator ----


@pytest.mark.parametrize("isolate", [False, True])
def test_an_eos_inside_a_document_is_no_boundary(rows, isolate):
    rows[[0, 2], 3] = EOS
    batch = PackedRowCollator(stack, EOS, isolate)(packed_rows(rows))
    assert (batch["labels"][[0, 2], 3] == EOS).all()
    if isolate:
        assert batch["position_ids"][[0, 2], 3:5].tolist() == [[3, 4], [3, 4]]
        assert (batch["labels"] == -100).sum() == sum(map(len, LENGTHS))


def test_joined_rows_are_the_batch_of_the_collator(rows):
    seen = []

    def collate(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen.extend(row.keys() for row in given)
        return stack(given)

    batch = PackedRowCollator(collate, EOS, isolate=False)(packed_rows(rows))
    assert all(keys == {"input_ids", "labels"} for keys in seen)  # as a collator of the user expects
    assert batch.keys() == {"input_ids", "labels", "attention_mask"} and batch["labels"].equal(rows)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("pad", [EOS, BOS])
def test_an_eos_or_bos_that_is_also_the_padding_is_a_target(rows, isolate, pad):
    rows[:, 7] = BOS
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    lm = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert (lm([{"input_ids": row} for row in rows])["labels"][rows == pad] == -100).all()
    made, plain = (PackedRowCollator(c, EOS, isolate, bos_token_id=BOS)(packed_rows(rows)) for c in (lm, stack))
    assert made["labels"].equal(plain["labels"])


def test_other_ignored_labels_stay_ignored(rows):
    def collate(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = stack(given)
        batch["labels"][:, ::2] = -100
        return batch

    labels = PackedRowCollator(collate, EOS, isolate=False)(packed_rows(rows))["labels"]
    assert (labels[:, ::2] == -100).all() and labels[:, 1::2].equal(rows[:, 1::2])


@pytest.mark.parametrize("flatten", [False, True])
def test_rows_without_labels_are_kept_apart_too(rows, flatten):
    without = [{name: row[name] for name in ("input_ids", "position_ids")} for row in packed_rows(rows)]
    batch = isolated(default_data_collator, flatten)(without)
    whole = isolated(flatten=flatten)(packed_rows(rows))
    assert "labels" not in batch
    assert all(batch[name].equal(whole[name]) for name in ("input_ids", "position_ids"))


def test_rows_that_were_not_packed_are_left_to_the_collator(rows):
    batch = isolated(default_data_collator)([{"input_ids": row, "labels": row} for row in rows])
    assert batch.keys() == {"input_ids", "labels"} and batch["labels"].equal(rows)


def test_rows_of_others_may_have_positions(rows):
    lists = [{name: value.tolist() for name, value in row.items()} for row in packed_rows(rows)]
    own, given = (isolated(default_data_collator)(batch) for batch in (packed_rows(rows), lists))
    assert own.keys() == given.keys() and all(own[name].equal(given[name]) for name in own)
    ragged = [{name: value[: 9 + i] for name, value in row.items()} for i, row in enumerate(lists)]
    assert isolated(len)(ragged) == 3  # the wrapped collator has them as they are


def test_boundaries_of_whole_rows_are_dropped(rows):
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = isolated(flattening)(packed_rows(rows))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[i for of in LENGTHS for length in of for i in range(length)]]


# ---- The probe ----

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "use_cache": False,
}
LINEAR: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "activation_function": "gelu"},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "mixtral": EXPERTS,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_oss": EXPERTS,
    "mamba": {"state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 32, "block_multiple_of": 8},
    "qwen3_next": {**EXPERTS, **LINEAR, **HYBRID, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **ARCHITECTURES[name]})).float()


def changes_the_next(model: nn.Module) -> bool:
    """Whether another first document changes the logits of the second, with positions that restart."""
    rows = torch.randint(2, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    rows[1, 8:] = rows[0, 8:]
    positions = torch.cat([torch.arange(8), torch.arange(6)]).expand(2, -1)
    with torch.no_grad():
        a, b = model.eval()(input_ids=rows, position_ids=positions).logits[:, 8:]
    return bool((a - b).abs().max() > 1e-5 * a.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probe_finds_what_an_architecture_does(name):
    model = tiny(name)
    assert (isolation_problem(model) is not None) == changes_the_next(model)


def test_the_probe_sees_both_kinds_of_architectures():
    apart = {name for name in ("llama", "gpt2", "qwen3", "gemma2", "mixtral") if isolation_problem(tiny(name)) is None}
    assert apart == {"llama", "gpt2", "qwen3", "gemma2", "mixtral"}
    assert all(isolation_problem(tiny(name)) is not None for name in ("opt", "bloom", "mamba", "lfm2", "qwen3_next"))


def test_a_cache_of_the_text_model_is_found():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = AutoConfig.for_model("llama", **{**SHAPE, "use_cache": True})
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))
    model.config.use_cache = False
    assert isolation_problem(model) == "LlavaForConditionalGeneration lets one document change the next (sdpa)"
    model.config.text_config.use_cache = False
    assert isolation_problem(model) is None


class Bigrams(nn.Module):
    """A plain module, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"logits": self.table(input_ids)}


def test_a_model_without_positions_does_not_isolate():
    assert "a probe of Bigrams with position_ids failed with TypeError" in str(isolation_problem(Bigrams()))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "T5ForConditionalGeneration" in str(isolation_problem(t5))


def test_an_unknown_attention_does_not_isolate():
    model = model_with("eager")
    model.config._attn_implementation = "my_kernel"
    assert "my_kernel" in str(isolation_problem(model))


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_an_attention_that_cannot_run_here_is_replaced_to_probe(attention):
    model = model_with("eager")
    model.config._attn_implementation = attention
    assert isolation_problem(model) is None
    assert model.config._attn_implementation == attention


def test_a_trained_head_on_frozen_16_bit_weights_isolates():
    model = tiny_llama(dtype=torch.bfloat16, use_cache=False)
    model.lm_head.float()
    assert isolation_problem(model) is None


def test_the_probe_changes_neither_model_nor_random_state():
    model = tiny_llama(attention_dropout=0.5, use_cache=False).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    assert isolation_problem(model) is None  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert all(p.equal(before[n]) for n, p in model.state_dict().items()) and torch.get_rng_state().equal(state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["lm_head", "o_proj"])
def test_zero_weights_do_not_hide_isolation(name):
    model = tiny_llama(use_cache=False)
    for module, layer in model.named_modules():
        if module.endswith(name):
            nn.init.zeros_(layer.weight)
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    assert isolation_problem(model) is None
    assert all(p.equal(before[n]) for n, p in model.state_dict().items()) and torch.get_rng_state().equal(state)
    model.config.use_cache = True
    assert "lets one document change the next" in str(isolation_problem(model))


def test_isolation_is_chosen_by_what_the_model_can_do():
    assert choose_isolation(None, None) and choose_isolation(True, None)
    assert not choose_isolation(None, "it leaks") and not choose_isolation(False, None)
    with pytest.raises(ValueError, match=r"cannot be kept apart: it leaks\. Set isolate_documents to false"):
        choose_isolation(True, "it leaks")
    names = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "")
    assert [needs_flat_rows(name) for name in names] == [False, False, False, True, True, False]
