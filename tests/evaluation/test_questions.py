"""Scores of a model on questions."""

from typing import Any

import pytest
import torch

from hf_nexus.evaluation.questions import answer_scores
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

QUESTIONS = [
    {"question": "the quick brown fox?", "answer": "it jumps over the dog\n#### 42"},
    {"question": "how many?", "answer": "#### $1,000"},
    {"question": "what does the lazy dog do, over and over?", "answer": "the fox\n#### 7"},
    {"question": "x", "answer": "y z\n#### blue"},
    {"question": "over", "answer": "the lazy dog\n#### 1"},
]


def scores_of(model: Any, tokenizer: Any, rows: list[dict[str, str]], **options: Any) -> dict[str, float]:
    defaults = {"prompt": "Question: {question}\nAnswer: ", "batch_size": 8, "max_new_tokens": 0}
    return answer_scores(model, tokenizer, rows, **defaults | options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def answering(room: int = 256) -> Any:
    return tiny_llama(vocab_size=300, max_position_embeddings=room)


class Oracle(torch.nn.Module):
    """Continues each prompt with its answer, token by token, and a further question."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]):
        super().__init__()
        self.llama = answering()
        self.config, self.generation_config = self.llama.config, self.llama.generation_config
        self.tokenizer, self.answers, self.calls = tokenizer, answers, []

    def forward(self, **inputs: Any) -> Any:
        return self.llama(**inputs)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        assert not self.training
        self.calls.append(kwargs)
        assert attention_mask[:, -1].all()  # padded on the left
        texts = [self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        rows = [
            self.tokenizer(self.answers[text.split("\n")[0]] + "\nQuestion: ?\n#### 0")["input_ids"] for text in texts
        ]
        longest = max(map(len, rows))
        new = torch.tensor([row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        return torch.cat([input_ids, new], 1)


def by_hand(model: Any, tokenizer: Any, prompt: str = "Question: {question}\nAnswer: ") -> float:
    """The mean over the tokens of all answers, one row after the other."""
    losses = []
    for row in QUESTIONS:
        text = prompt.format(question=row["question"])
        start = len(tokenizer(text.rstrip(" "))["input_ids"])
        ids = torch.tensor(tokenizer(text + row["answer"])["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none"))
    assert len({len(loss) for loss in losses}) > 2
    return float(torch.cat(losses).double().mean())


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_answer_loss_is_the_mean_over_answer_tokens(tokenizer, batch):
    model = answering()
    found = scores_of(model, tokenizer, QUESTIONS, batch_size=batch)
    assert found == {"answer_loss": pytest.approx(by_hand(model, tokenizer), rel=1e-6)}
    prompt = "{question} = "
    other = scores_of(model, tokenizer, QUESTIONS, batch_size=batch, prompt=prompt)["answer_loss"]
    assert other == pytest.approx(by_hand(model, tokenizer, prompt), rel=1e-6)
    assert abs(other - found["answer_loss"]) > 1e-4


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_generated_text_counts_up_to_its_first_answer(tokenizer, batch):
    answers = {f"Question: {row['question']}": row["answer"] for row in QUESTIONS}
    answers["Question: how many?"] = "just a thousand\n#### 1000.00"
    answers["Question: x"] = "no idea"
    oracle = Oracle(tokenizer, answers)
    found = scores_of(oracle, tokenizer, QUESTIONS, batch_size=batch, max_new_tokens=99)
    # Of `x`, the first answer is that to the next question: 0.
    assert found["exact_match"] == 4 / 5
    assert oracle.calls[0]["max_new_tokens"] == 99 and oracle.calls[0]["do_sample"] is False


@pytest.mark.slow
def test_a_model_that_learned_the_answers_generates_them(tokenizer):
    """Through `generate` itself, with rows of different lengths in one batch."""
    rows = [{"question": str(i) * (i + 1), "answer": f"#### {i}"} for i in range(4)]
    model = answering()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    eos = tokenizer.eos_token_id
    for _ in range(150):
        for row in rows:
            ids = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"] + [eos]
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for batch in (1, 4):
        found = scores_of(model, tokenizer, rows, batch_size=batch, max_new_tokens=12)
        assert found["exact_match"] == 1.0
        assert found["answer_loss"] < 0.1
    wrong = [{**row, "answer": "#### 9"} for row in rows]
    assert scores_of(model, tokenizer, wrong, max_new_tokens=12)["exact_match"] == 0.0


def test_rows_that_do_not_fit_are_left_out(tokenizer):
    long = {"question": "x" * 300, "answer": "#### 1"}
    model = answering(room=128)
    found = scores_of(model, tokenizer, [*QUESTIONS, long])
    assert found["answer_loss"] == pytest.approx(by_hand(model, tokenizer), rel=1e-6)
    with pytest.raises(ValueError, match="None of the 5 rows fits into the model's context of 128 tokens"):
        scores_of(model, tokenizer, QUESTIONS, max_new_tokens=128)


def test_prompts_start_with_bos_if_texts_of_the_tokenizer_do(tokenizer):
    from tokenizers import processors

    with_bos = tiny_tokenizer()
    with_bos.add_special_tokens({"bos_token": "<bos>"})
    bos = with_bos.bos_token_id
    with_bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", with_bos.eos_token_id)]
    )
    seen: list[torch.Tensor] = []

    class Watched(Oracle):
        def forward(self, **inputs: Any) -> Any:
            seen.append(inputs["input_ids"])
            return self.llama(**inputs)

    model = Watched(with_bos, {})
    model.llama.resize_token_embeddings(len(with_bos))
    assert with_bos("x")["input_ids"][-1] == with_bos.eos_token_id
    scores_of(model, with_bos, QUESTIONS, batch_size=1)
    assert all(ids[0, 0] == bos and bos not in ids[0, 1:] for ids in seen)
    assert not any(with_bos.eos_token_id in ids for ids in seen)
    assert [len(ids[0]) - 1 for ids in seen] == sorted(
        len(tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]) for row in QUESTIONS
    )


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([], {}, "None of the 0 rows"),
        ([{"question": "x", "answer": ""}], {"prompt": "{question}"}, "has a token to compute a loss on"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokenizer, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scores_of(answering(), tokenizer, rows, **kwargs)
