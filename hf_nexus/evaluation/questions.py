"""Scores of a model on questions: loss of the given answers, and exact match of the generated ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answers import ANSWER_MARK

__all__ = ["answer_scores"]


@torch.no_grad()
def answer_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """
    Loss of the answers given their questions, and fraction of questions answered correctly by greedy generation.

    Prompt and answer are tokenized as one text, so a space at the end of the prompt belongs to the first token of the
    answer. Generation starts without such spaces. A generated text counts up to the end of its first line with
    `#### `: a model that never learned to stop goes on with further questions.

    Rows that do not fit into the context of the model, with the answer or with `max_new_tokens`, are left out. The
    scores do not depend on the batch size. They are `answer_loss`, nats per token of the answers, prompts masked, and
    with `max_new_tokens` also `exact_match`, as computed by [`AnswerExactMatch`]. The model stays in evaluation mode.

    Raises:
        ValueError: no row fits, or no answer has a token.
    """
    model.eval()
    tokenized = [_tokenize(tokenizer, row, prompt) for row in rows]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some models have no limit
    fitting = [r for r in tokenized if context is None or max(len(r.ids), len(r.question) + max_new_tokens) <= context]
    if not fitting:
        raise ValueError(
            f"None of the {len(rows)} rows fits into the model's context of {context} tokens, with its answer and "
            f"with max_new_tokens={max_new_tokens}. Pass shorter rows, or a smaller max_new_tokens."
        )
    fitting.sort(key=lambda row: len(row.ids))  # rows of similar length need little padding
    batches = [fitting[i : i + batch_size] for i in range(0, len(fitting), batch_size)]
    scores = {"answer_loss": _answer_loss(model, batches)}
    if max_new_tokens:
        scores |= _exact_match(model, tokenizer, batches, max_new_tokens)
    return scores


@dataclass
class _Row:
    ids: list[int]  # prompt and answer
    start: int  # index of the first token of the answer
    question: list[int]  # prompt to generate from
    answer: str


def _tokenize(tokenizer: Any, row: Mapping[str, Any], prompt: str) -> _Row:
    empty = tokenizer("")["input_ids"]
    bos = empty[:1] if tokenizer.bos_token_id in empty[:1] else []
    text = prompt.replace("{question}", row["question"])
    question, ids = (
        bos + tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (text.rstrip(" "), text + row["answer"])
    )
    # A token with characters of both prompt and answer belongs to the answer.
    shared = next((i for i, (a, b) in enumerate(zip(question, ids, strict=False)) if a != b), len(question))
    return _Row(ids, min(shared, len(ids)), question, row["answer"])


def _pad(rows: list[list[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T). The padding token is 0; the mask hides it."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(ids.shape[1] - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def _answer_loss(model: Any, batches: list[list[_Row]]) -> float:
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = _pad([row.ids for row in batch], device, left=False)
        labels = ids.masked_fill(mask == 0, -100)
        for i, row in enumerate(batch):
            labels[i, : row.start] = -100
        targets = labels[:, 1:].reshape(-1)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
        counted = targets != -100  # only these are cast to float32: few if prompts are long
        total += float(torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum"))
        tokens += int(counted.sum())
    if not tokens:
        raise ValueError("No answer of the rows that fit has a token to compute a loss on. Pass non-empty answers.")
    return total / tokens


def _exact_match(model: Any, tokenizer: Any, batches: list[list[_Row]], max_new_tokens: int) -> dict[str, float]:
    from .metrics import AnswerExactMatch  # imports `evaluate`, which takes a second

    metric = AnswerExactMatch()
    for batch in batches:
        texts = _generate(model, tokenizer, [row.question for row in batch], max_new_tokens)
        metric.add_batch(predictions=list(map(_first_answer, texts)), references=[row.answer for row in batch])
    scores: dict[str, float] = metric.compute()
    return scores


def _generate(model: Any, tokenizer: Any, questions: list[list[int]], max_new_tokens: int) -> list[str]:
    ids, mask = _pad(questions, next(model.parameters()).device, left=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ends = {"eos_token_id": tokenizer.eos_token_id} if model.generation_config.eos_token_id is None else {}
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0 if pad is None else pad,
        **ends,
    )
    texts: list[str] = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _first_answer(text: str) -> str:
    """`text` up to the end of the first line with a final answer."""
    before, mark, rest = text.partition(ANSWER_MARK)
    return before + mark + rest.partition("\n")[0]
