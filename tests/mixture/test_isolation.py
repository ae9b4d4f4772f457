"""Documents of a packed row are computed as if alone, with every attention that runs here."""

import pickle

import pytest
import torch

from hf_nexus.mixture.isolation import IsolateDocuments, choose_isolation, isolates, needs_flat_rows

from ..support.tiny import VOCAB, tiny_llama

EOS = 0
LENGTHS = [[5, 9, 2, 16], [1, 20, 11], [32]]  # of the documents of each row, the EOS included


@pytest.fixture
def rows() -> torch.Tensor:
    """Packed rows, (3, 32); the last row is a piece of a longer document, without an EOS."""
    ids = torch.randint(1, VOCAB, (3, 32), generator=torch.Generator().manual_seed(0))
    for row, lengths in enumerate(LENGTHS[:2]):
        ids[row, torch.tensor(lengths).cumsum(0) - 1] = EOS
    return ids


def stack(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def documents(row: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return list(row.split(lengths))


def model_with(attention: str) -> torch.nn.Module:
    return tiny_llama(attn_implementation=attention, use_cache=False).eval()


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_document_in_a_packed_row_has_the_logits_it_has_alone(rows, attention, flatten):
    model = model_with(attention)
    batch = IsolateDocuments(stack, EOS, flatten)(list(rows))
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
        loss = model(**IsolateDocuments(stack, EOS, flatten)(list(rows))).loss
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
    labels = IsolateDocuments(stack, EOS, flatten)(list(rows))["labels"]
    expected = sum(length - 1 for lengths in LENGTHS for length in lengths)
    assert int((labels[..., 1:] != -100).sum()) == expected  # as transformers counts: what is left after the shift
    assert int((labels != -100).sum()) == expected


def test_positions_count_from_the_start_of_each_document(rows):
    positions = IsolateDocuments(stack, EOS)(list(rows))["position_ids"]
    for row, lengths in zip(positions, LENGTHS, strict=True):
        assert row.tolist() == [i for length in lengths for i in range(length)]


def test_labels_that_were_no_targets_before_stay_none(rows):
    def collate(given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = stack(given)
        batch["labels"][:, 20:] = -100
        return batch

    labels = IsolateDocuments(collate, EOS)(list(rows))["labels"]
    assert (labels[:, 20:] == -100).all() and (labels[2, 1:20] == rows[2, 1:20]).all()


def test_padding_is_refused(rows):
    def collate(given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = stack(given)
        batch["attention_mask"][0, -1] = 0
        return batch

    with pytest.raises(ValueError, match=r"pads the rows.*isolate_documents to false"):
        IsolateDocuments(collate, EOS)(list(rows))


def test_a_worker_can_be_given_the_collator(rows):
    collate = pickle.loads(pickle.dumps(IsolateDocuments(stack, EOS, True)))
    assert collate(list(rows))["input_ids"].shape == (1, 96)


def test_flex_attention_gets_a_mask_of_blocks(rows, monkeypatch):
    from transformers import masking_utils

    # Its kernel takes a minute to compile, so only its mask is tested.
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda mask_mod, **kwargs: mask_mod)
    config = tiny_llama().config
    config._attn_implementation = "flex_attention"
    positions = IsolateDocuments(stack, EOS)(list(rows))["position_ids"]
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


def test_flash_attention_cuts_a_flat_row_where_positions_restart(rows):
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    positions = IsolateDocuments(stack, EOS, flatten=True)(list(rows))["position_ids"]
    assert _is_packed_sequence(positions, batch_size=1) and not _is_packed_sequence(positions.view(3, 32), 3)
    (cuts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    lengths = [length for row in LENGTHS for length in row]
    assert cuts.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()] and longest == 32


def test_isolation_is_chosen_by_what_the_attention_can_do():
    known = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
    assert all(isolates(name) and choose_isolation(None, name) for name in known)
    assert [needs_flat_rows(name) for name in known] == [False, False, False, True, True]
    assert not isolates("my_kernel") and not choose_isolation(None, "my_kernel")
    assert not choose_isolation(False, "sdpa")
    with pytest.raises(ValueError, match=r"'my_kernel' cannot separate.*sdpa"):
        choose_isolation(True, "my_kernel")
