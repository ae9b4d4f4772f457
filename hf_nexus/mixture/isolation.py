"""Documents of a packed row that do not attend to each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from ..tensors import random_state_kept

__all__ = [
    "PackedRowCollator",
    "attention_of",
    "choose_isolation",
    "isolation_problem",
    "needs_flat_rows",
    "text_config",
]

# Tokens of each of the two documents that a model is probed with.
_PROBE = 4
# Share of the effect of one document on the next that rounding may leave when the documents are kept apart.
_ROUNDING = 1e-4
# What collators add that lay rows end to end.
_ROW_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def text_config(model: Any) -> PreTrainedConfig:
    """The configuration of the language model. It is empty for modules that are not of transformers."""
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else PreTrainedConfig()


def attention_of(model: Any) -> str:
    """The attention implementation of a model of transformers, empty for other modules."""
    return text_config(model)._attn_implementation or ""


def needs_flat_rows(attention: str) -> bool:
    """Whether an attention implementation uses restarting position ids only if the batch is one long row."""
    return is_flash_attention_requested(requested_attention_implementation=attention)


def isolation_problem(model: Any, **inputs: Any) -> str | None:
    """
    Why a causal language model does not keep documents of a row apart if their position ids restart; `None` if it
    does.

    It is probed before it is wrapped for training, with the further `inputs` of training. The first of two short
    documents is changed. The logits of the second must not change, as they do without position ids. If they do not do
    so either, weights that are zero are random for a second probe. Neither the model nor a random state is changed in
    the end. On several ranks, all must call it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_nexus.mixture.isolation import isolation_problem
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape))
        >>> isolation_problem(model)  # its cache is on
        'LlamaForCausalLM lets one document change the next (sdpa)'
        >>> isolation_problem(model, use_cache=False) is None
        True
    """
    name, attention = type(model).__name__, attention_of(model)
    with_attention = f" ({attention})" if attention else ""
    flat = needs_flat_rows(attention)
    # Frozen weights of 16 bits beside trained ones of 32, on which the model computes under autocast only.
    several_types = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    try:
        with _undisturbed(model, attention) as device:
            batch = PackedRowCollator(_stack, eos_token_id=-1, isolate=True, flatten=flat)(_probe_rows(model))
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            joined_batch = {key: value for key, value in batch.items() if key != "position_ids"}

            def effects() -> tuple[float, float]:
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=flat or several_types):
                    return _effect(model(**batch, **inputs)), _effect(model(**joined_batch, **inputs))

            apart, joined = effects()
            if not joined > 0:
                with _zeros_replaced(model):
                    apart, joined = effects()
    except Exception as error:  # what a model raises for inputs that it does not know depends on the model
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"a probe of {name}{with_attention} with position_ids failed with {cause}"
    if not joined > 0:
        return f"a probe of {name}{with_attention} shows no effect of one document on the next at all"
    if not apart <= _ROUNDING * joined:
        return f"{name} lets one document change the next{with_attention}"
    return None


def _probe_rows(model: Any) -> list[dict[str, Tensor]]:
    """Two rows of two documents each. The rows differ in the first document only."""
    size = getattr(text_config(model), "vocab_size", 8)
    # From the middle of the vocabulary, since special tokens are at its ends.
    words = size // 2 + torch.arange(2 * _PROBE) % max(1, size // 2)
    changed = torch.cat([words[:_PROBE].roll(1), words[_PROBE:]])
    positions = torch.arange(_PROBE).repeat(2)
    return [{"input_ids": ids, "labels": ids, "position_ids": positions} for ids in (words, changed)]


def _effect(output: Any) -> float:
    """How much the logits of the second document differ between the rows."""
    first, second = output["logits"].float().reshape(2, 2 * _PROBE, -1)[:, _PROBE:]
    return float((first - second).abs().max())


@contextmanager
def _undisturbed(model: Any, attention: str) -> Iterator[torch.device]:
    """Evaluation mode with an attention that runs where the model is. Everything is restored at the end."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    # These take the documents from the same positions as sdpa. One is compiled for minutes, the others need a GPU.
    replaced = attention == "flex_attention" or (needs_flat_rows(attention) and device.type != "cuda")
    with random_state_kept(device):
        try:
            if replaced:
                text_config(model)._attn_implementation = "sdpa"
            model.eval()
            yield device
        finally:
            for module, mode in modes.items():
                module.training = mode
            if replaced:
                text_config(model)._attn_implementation = attention


@contextmanager
def _zeros_replaced(model: Any) -> Iterator[None]:
    """Random numbers in place of weights that are zero as a whole, as a new output layer may be: they hide effects."""
    zeros = [p for p in model.parameters() if p.is_floating_point() and not p.any()]
    with torch.no_grad():
        try:
            for p in zeros:
                p.normal_(std=0.1)
            yield
        finally:
            for p in zeros:
                p.zero_()


def choose_isolation(wanted: bool | None, problem: str | None) -> bool:
    """
    Whether a run isolates documents: as wanted by `isolate_documents`, or by default if [`isolation_problem`] found
    none.

    Raises:
        ValueError: it is wanted, and the model cannot do it.
    """
    if wanted and problem is not None:
        raise ValueError(
            f"isolate_documents: the documents of a row cannot be kept apart: {problem}. Set isolate_documents to "
            "false, or use a model with sdpa or eager attention in all of its layers."
        )
    return problem is None if wanted is None else wanted


class PackedRowCollator:
    """
    A collator of packed rows, which have the position of each token in its document. `others` collates any other rows.

    The wrapped collator gets the rows without their `position_ids`, and returns a mapping with `input_ids` and
    `labels`, both (B, L), which the model shifts. If it takes the tokens for labels, or ignores each EOS or each BOS
    as padding, the labels of the rows replace its own, because packed rows are full.

    With `isolate`, the batch has `position_ids`, which restart at each document, and the first token of a document is
    no target. With `flatten`, isolated rows are laid end to end, (1, B * L), for attention implementations that
    [`needs_flat_rows`].

    Raises:
        ValueError: isolated rows are padded, which needs an attention mask.

    Example:
        >>> import torch
        >>> from transformers import default_data_collator
        >>> from hf_nexus.mixture.isolation import PackedRowCollator
        >>> ids = torch.tensor([5, 6, 0, 7, 0, 8])
        >>> row = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([0, 1, 2, 0, 1, 0])}
        >>> batch = PackedRowCollator(default_data_collator, eos_token_id=0, isolate=True)([row])
        >>> batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[0, 1, 2, 0, 1, 0]], [[-100, 6, 0, -100, 0, -100]])
    """

    def __init__(
        self,
        collate: Callable[[list], Any],
        eos_token_id: int,
        isolate: bool,
        flatten: bool = False,
        others: Callable[[list], Any] | None = None,
        bos_token_id: int | None = None,
    ):
        self.collate = collate
        self.others = others or collate
        self.boundaries = eos_token_id, bos_token_id
        self.isolate = isolate
        self.flatten = flatten

    def __call__(self, rows: list) -> Any:
        lengths = {len(row["position_ids"]) if "position_ids" in row else 0 for row in rows}
        if 0 in lengths or len(lengths) > 1:  # packed rows have one length
            return self.others(rows)
        batch = self.collate([{key: row[key] for key in row if key != "position_ids"} for row in rows])
        self._keep_labels(batch, rows)
        if not self.isolate:
            return batch
        ids, positions = batch["input_ids"], torch.stack([torch.as_tensor(row["position_ids"]).long() for row in rows])
        mask = batch.pop("attention_mask", None)
        if ids.numel() != positions.numel() or (mask is not None and not mask.all()):
            raise ValueError(
                "The collator pads the rows, and only documents in rows without padding can be isolated. Pack them to "
                "one length, or set isolate_documents to false."
            )
        for name in _ROW_BORDERS:  # those of whole rows
            batch.pop(name, None)
        batch["position_ids"] = positions.view(ids.shape)
        if "labels" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
        if self.flatten:
            for name in batch.keys() & {"input_ids", "labels", "position_ids"}:
                batch[name] = batch[name].reshape(1, -1)
        return batch

    def _keep_labels(self, batch: Any, rows: list) -> None:
        """Undo that a collator has made labels of the tokens, without the token that the tokenizer pads with."""
        if "labels" not in batch or "labels" not in rows[0]:  # predictions need none
            return
        ids, own = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "labels"))
        if batch["labels"].shape != ids.shape:
            return
        ignored = ids[batch["labels"] == -100].unique()
        # Any other token than EOS and BOS is padding in the text, or meant, unless this would train on masked tokens.
        one = len(ignored) == 0 or (len(ignored) == 1 and (ignored.item() in self.boundaries or not own.equal(ids)))
        if one and batch["labels"].equal(ids.masked_fill(torch.isin(ids, ignored), -100)):
            batch["labels"] = own


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
