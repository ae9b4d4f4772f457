"""Documents of a packed row that do not attend to each other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.utils.generic import is_flash_attention_requested

__all__ = ["IsolateDocuments", "choose_isolation", "isolated_collator", "isolates", "needs_flat_rows"]

# Without an attention mask, these build a block mask from position ids that restart.
_MASKED = ("eager", "sdpa", "flex_attention")


def isolates(attn_implementation: str) -> bool:
    """
    Whether an attention implementation of transformers separates documents whose position ids restart.

    It does so only without an `attention_mask` and without a cache (`use_cache=False`, as the Trainer sets it).

    Example:
        >>> from hf_nexus.mixture.isolation import isolates
        >>> isolates("sdpa"), isolates("flash_attention_2"), isolates("my_kernel")
        (True, True, False)
    """
    return attn_implementation in _MASKED or needs_flat_rows(attn_implementation)


def needs_flat_rows(attn_implementation: str) -> bool:
    """
    Whether an attention implementation uses restarting position ids only if the batch is one long row.

    Example:
        >>> from hf_nexus.mixture.isolation import needs_flat_rows
        >>> needs_flat_rows("sdpa"), needs_flat_rows("flash_attention_2")
        (False, True)
    """
    return is_flash_attention_requested(requested_attention_implementation=attn_implementation)


def choose_isolation(wanted: bool | None, attn_implementation: str) -> bool:
    """
    Whether a run isolates documents: as wanted, or by default if the attention implementation can do it.

    Args:
        wanted (`bool`, *optional*):
            [`MixtureConfig`]'s `isolate_documents`.
        attn_implementation (`str`):
            The model's: `model.config._attn_implementation`.

    Raises:
        ValueError: it is wanted, and the attention implementation cannot do it.

    Example:
        >>> from hf_nexus.mixture.isolation import choose_isolation
        >>> choose_isolation(None, "sdpa"), choose_isolation(None, "my_kernel"), choose_isolation(False, "sdpa")
        (True, False, False)
    """
    possible = isolates(attn_implementation)
    if wanted and not possible:
        raise ValueError(
            f"isolate_documents: the attention implementation {attn_implementation!r} cannot separate the documents "
            f"of a row. Use one of {', '.join(_MASKED)}, flash_attention_2, or set isolate_documents to false."
        )
    return possible if wanted is None else wanted


def isolated_collator(
    collate: Callable[[list], Any], wanted: bool | None, attn_implementation: str, eos_token_id: int
) -> Callable[[list], Any]:
    """
    The collator of a run: [`IsolateDocuments`] around `collate`, or `collate` itself, as [`choose_isolation`] decides.

    Raises:
        ValueError: as for [`choose_isolation`].
    """
    if not choose_isolation(wanted, attn_implementation):
        return collate
    return IsolateDocuments(collate, eos_token_id, needs_flat_rows(attn_implementation))


class IsolateDocuments:
    """
    A collator whose packed rows hold independent documents: `position_ids` restart after each EOS, and the first token
    of a document is no target.

    Args:
        collate (`Callable[[list], Any]`):
            The wrapped collator. Returns a mapping with `input_ids` and `labels`, both (B, L), which the model shifts.
        eos_token_id (`int`):
            The token that ends each document.
        flatten (`bool`, *optional*, defaults to `False`):
            Lay the rows end to end, (1, B * L), for attention implementations that [`needs_flat_rows`].

    Raises:
        ValueError: a batch has padding, which needs an attention mask.

    Example:
        >>> import torch
        >>> from hf_nexus.mixture.isolation import IsolateDocuments
        >>> row = torch.tensor([[5, 6, 0, 7, 0, 8]])
        >>> collate = IsolateDocuments(lambda rows: {"input_ids": row, "labels": row.clone()}, eos_token_id=0)
        >>> batch = collate([])
        >>> batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[0, 1, 2, 0, 1, 0]], [[-100, 6, 0, -100, 0, -100]])
    """

    def __init__(self, collate: Callable[[list], Any], eos_token_id: int, flatten: bool = False):
        self.collate = collate
        self.eos_token_id = eos_token_id
        self.flatten = flatten

    def __call__(self, rows: list) -> Any:
        batch = self.collate(rows)
        mask = batch.pop("attention_mask", None)
        if mask is not None and not mask.all():
            raise ValueError(
                "The collator pads the rows, and only documents in rows without padding can be isolated. Pack them to "
                "one length, or set isolate_documents to false."
            )
        ids = batch["input_ids"].numpy()
        first = np.ones(ids.shape, dtype=bool)  # token of a document, or of its part in this row
        first[:, 1:] = ids[:, :-1] == self.eos_token_id
        starts = np.flatnonzero(first)
        positions = np.arange(ids.size) - np.repeat(starts, np.diff(starts, append=ids.size))
        batch["position_ids"] = torch.from_numpy(positions).view(ids.shape)
        batch["labels"] = batch["labels"].clone()  # they may share memory with input_ids
        batch["labels"].view(-1)[torch.from_numpy(starts)] = -100
        if self.flatten:
            for name in ("input_ids", "labels", "position_ids"):
                batch[name] = batch[name].reshape(1, -1)
        return batch
