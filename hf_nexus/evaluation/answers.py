"""How well a model answers questions: the loss of the right answer, and whether its own ends in the right figure."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from torch import Tensor

__all__ = ["ANSWER_MARK", "PROMPT", "answer_scores", "final_answer"]

# What GSM8K puts before the final answer of a solution.
ANSWER_MARK = "#### "
PROMPT = "Question: {question}\nAnswer: "


def final_answer(text: str) -> Decimal | str | None:
    r"""
    The final answer of a solution by the convention of GSM8K: the rest of the line after the last `#### `, without
    commas, dollar signs and dots at its end.

    Args:
        text (`str`): A solution.

    Returns:
        `Decimal`, `str` or `None`: a number where it can be read as one, so that 1 equals 1.0; `None` if there is no
        final answer.

    Example:
        >>> from hf_nexus.evaluation import final_answer
        >>> final_answer("6 * 7 = 42\n#### $1,042.00."), final_answer("#### blue."), final_answer("It is 42.")
        (Decimal('1042.00'), 'blue', None)
    """
    _, mark, rest = text.rpartition(ANSWER_MARK)
    answer = rest.partition("\n")[0].replace(",", "").replace("$", "").strip().rstrip(".").strip()
    if not mark or not answer:
        return None
    try:
        number = Decimal(answer)
    except InvalidOperation:
        return answer
    return number if number.is_finite() else answer  # "nan" is a word, and would not equal itself


def answer_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 0,
    prompt: str = PROMPT,
) -> dict[str, float]:
    r"""
    Loss of the answers given their questions, and how many the model gets right by greedy generation.

    The prompt and the answer are tokenized as one text, as a language model reads them, so that a space at the
    prompt's end belongs to the answer's first token; for generation such spaces are left out. What is generated counts
    up to the end of the first line with `#### `: a model that was not taught to stop goes on with further questions.

    Args:
        model (`torch.nn.Module`):
            A causal language model of transformers. It is in evaluation mode meanwhile.
        tokenizer (`PreTrainedTokenizerBase`):
            If it puts a BOS token before a text, so it does here.
        rows (`Sequence[Mapping[str, Any]]`):
            Each with the strings `question` and `answer`, a solution that ends in `#### <final answer>`.
        batch_size (`int`, *optional*, defaults to 8):
            Rows at a time. The figures do not depend on it.
        max_new_tokens (`int`, *optional*, defaults to 0):
            How much is generated at most; with 0, only the loss is computed.
        prompt (`str`, *optional*, defaults to `"Question: {question}\nAnswer: "`):
            Where `{question}` is put.

    Returns:
        `dict[str, float]`: `answer_loss`, nats per token of the answers, prompts masked; `exact_match`, the share of
        rows whose [`final_answer`] is that of the reference, with `max_new_tokens` above 0; `examples`, the rows
        behind both; `left_out`, the rows that do not fit into the model's context, with the answer or with
        `max_new_tokens`.

    Raises:
        ValueError: no row is left, no answer has a token, a prompt without `{question}`, a `batch_size` or
        `max_new_tokens` that is not allowed, or a reference without a final answer where it would be compared.

    Example:

    ```python
    rows = [{"question": "What is 6 times 7?", "answer": "6 * 7 = 42\n#### 42"}]
    scores = answer_scores(model, tokenizer, rows, batch_size=16, max_new_tokens=64)
    print(f"{scores['answer_loss']:.3f} nats per token, {scores['exact_match']:.0%} right")
    ```
    """
    if batch_size < 1 or max_new_tokens < 0 or "{question}" not in prompt:
        raise ValueError(
            f"batch_size={batch_size}, max_new_tokens={max_new_tokens}, prompt={prompt!r}: the first is at least 1, "
            "the second at least 0, and the prompt contains {question}."
        )
    if max_new_tokens:
        for i, row in enumerate(rows):
            if final_answer(row["answer"]) is None:
                raise ValueError(
                    f"Row {i} has no final answer to compare with: its `answer` must end in a line '{ANSWER_MARK}"
                    "<answer>'. Mend it, or pass max_new_tokens=0 for the loss alone."
                )
    tokenized = _tokenize(tokenizer, rows, prompt)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some models have no limit
    fitting = [r for r in tokenized if room is None or max(len(r.ids), r.asked + max_new_tokens) <= room]
    if not fitting:
        raise ValueError(
            f"None of the {len(rows)} rows fits into the model's context of {room} tokens, with its answer and with "
            f"max_new_tokens={max_new_tokens}. Pass rows, shorter ones, or a smaller max_new_tokens."
        )
    # Rows of like length together: little padding.
    fitting.sort(key=lambda row: len(row.ids))
    batches = [fitting[i : i + batch_size] for i in range(0, len(fitting), batch_size)]
    with _evaluating(model):
        scores = {"answer_loss": _answer_loss(model, batches)}
        if max_new_tokens:
            right = sum(_right_answers(model, tokenizer, batch, max_new_tokens) for batch in batches)
            scores["exact_match"] = right / len(fitting)
    return scores | {"examples": len(fitting), "left_out": len(rows) - len(fitting)}


@dataclass
class _Row:
    ids: list[int]  # prompt and answer
    start: int  # of the answer in it
    question: list[int]  # the prompt that is generated from
    answer: str

    @property
    def asked(self) -> int:
        return len(self.question)


def _tokenize(tokenizer: Any, rows: Sequence[Mapping[str, Any]], prompt: str) -> list[_Row]:
    empty = tokenizer("")["input_ids"]
    bos = empty[:1] if tokenizer.bos_token_id in empty[:1] else []

    def encode(text: str) -> list[int]:
        return bos + tokenizer(text, add_special_tokens=False)["input_ids"]

    found = []
    for row in rows:
        text = prompt.replace("{question}", row["question"])
        question, ids = encode(text.rstrip(" ")), encode(text + row["answer"])
        # A token that reaches from the prompt into the answer is the answer's.
        shared = next((i for i, (a, b) in enumerate(zip(question, ids, strict=False)) if a != b), len(question))
        found.append(_Row(ids, min(shared, len(ids)), question, row["answer"]))
    return found


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _pad(rows: list[list[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows, both (B, T), padded with the token 0, which the mask hides."""
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
        counted = targets != -100  # only these are cast to float32: few, where prompts are long
        total += float(torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum"))
        tokens += int(counted.sum())
    if not tokens:
        raise ValueError("The answers of the rows that fit have no token that a loss could be taken of: give answers.")
    return total / tokens


def _right_answers(model: Any, tokenizer: Any, batch: list[_Row], max_new_tokens: int) -> int:
    """How many rows of a batch are answered with the reference's final answer."""
    device = next(model.parameters()).device
    ids, mask = _pad([row.question for row in batch], device, left=True)
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
    texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(final_answer(_first_answer(t)) == final_answer(r.answer) for t, r in zip(texts, batch, strict=True))


def _first_answer(text: str) -> str:
    """A continuation up to the end of the first line with a final answer."""
    before, mark, rest = text.partition(ANSWER_MARK)
    return before + mark + rest.partition("\n")[0]
