"""Next-token accuracy, final answers, and the scores of a model on questions."""

import subprocess
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from hf_nexus.evaluation import answer_scores, final_answer
from tests.support.tiny import Rows, tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

metrics = pytest.importorskip("hf_nexus.evaluation.metrics")

# ---- Final answers ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 42", 42),
        ("so 6 * 7\n#### 42.0", 42),
        ("#### $1,234.50.", Decimal("1234.5")),
        ("#### -7\nQuestion: what else?", -7),
        ("#### 1\nno:\n#### 2", 2),
        ("#### 1e3", 1000),
        ("#### 12345678901234567891", 12345678901234567891),
        ("#### blue whale..", "blue whale"),
        ("#### 50%", "50%"),
        ("#### nan", "nan"),
        ("#### Infinity", "Infinity"),
        ("#### ", None),
        ("####42", None),
        ("42", None),
        ("", None),
    ],
)
def test_final_answers(text, expected):
    assert final_answer(text) == expected


def test_exact_match_compares_numbers_as_numbers_and_the_rest_as_strings():
    def score(prediction: str, reference: str) -> float:
        return metrics.AnswerExactMatch().compute(predictions=[prediction], references=[reference])["exact_match"]

    assert score("#### 1.0", "#### 1") == score("#### nan", "#### nan") == score("#### a b", "#### a b.") == 1.0
    assert score("#### 2", "#### 1") == score("1", "#### 1") == score("#### one", "#### 1") == 0.0
    assert score("#### 12345678901234567891", "#### 12345678901234567890") == 0.0  # as floats they are equal
    together = metrics.AnswerExactMatch()
    together.add_batch(predictions=["#### 1", "#### 2"], references=["#### 1", "#### 1"])
    together.add(prediction="#### 5", reference="#### 5")
    assert together.compute() == {"exact_match": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="Reference 0 has no final answer: '42'"):
        score("#### 42", "42")


# ---- Next-token accuracy ----


@pytest.mark.parametrize("kind", [lambda x: x, np.array, torch.tensor])
def test_a_prediction_is_compared_with_the_next_label(kind):
    predictions, references = [[7, 8, 5, 0], [1, 2, 3, 9]], [[6, 7, 9, -100], [-100, -100, 2, 3]]
    found = metrics.NextTokenAccuracy().compute(predictions=kind(predictions), references=kind(references))
    assert found == {"next_token_accuracy": 3 / 4}


def test_rows_may_have_different_lengths_but_not_the_two_of_a_pair():
    accuracy = metrics.NextTokenAccuracy()
    assert accuracy.compute(predictions=[[1], [2, 3]], references=[[1], [7, 2]]) == {"next_token_accuracy": 1.0}
    assert np.isnan(accuracy.compute(predictions=[[1]], references=[[1]])["next_token_accuracy"])
    with pytest.raises(ValueError, match="Prediction 0 has 1 tokens and its reference 2"):
        accuracy.compute(predictions=[[1]], references=[[1, 2]])


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_accuracy_in_a_trainer_is_that_of_the_model_at_any_batch_size(make_trainer, sources, batch):
    rows = Rows(7, 0, pad=True)
    accuracy = metrics.NextTokenAccuracy()
    hooks = {"compute_metrics": accuracy.compute_metrics, "preprocess_logits_for_metrics": accuracy.argmax}
    trainer = make_trainer(sources, trainer_kwargs=hooks, per_device_eval_batch_size=batch, max_steps=20)
    trainer.train()
    with torch.no_grad():
        predicted = trainer.model.eval()(input_ids=rows.ids).logits.argmax(-1)[:, :-1]
    labels = rows.labels[:, 1:]
    expected = (predicted == labels)[labels != -100].float().mean().item()
    assert 0.05 < expected < 1
    found = trainer.evaluate({"text": rows})
    assert found["eval_text_next_token_accuracy"] == pytest.approx(expected)
    assert "eval_text_loss" in found


def test_logits_are_refused_with_the_fix(make_trainer, sources):
    hooks = {"compute_metrics": metrics.NextTokenAccuracy().compute_metrics}
    with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics=NextTokenAccuracy\.argmax"):
        make_trainer(sources, trainer_kwargs=hooks).evaluate(Rows(3, 0))
    logits = torch.eye(5)[None]
    assert metrics.NextTokenAccuracy.argmax((logits, None)).tolist() == [[0, 1, 2, 3, 4]]


# ---- Without the evaluate library ----


def test_only_the_metrics_need_the_evaluate_library():
    code = """
import sys
sys.modules["evaluate"] = None
import hf_nexus.evaluation
assert hf_nexus.evaluation.final_answer("#### 1") == 1
import hf_nexus.evaluation.metrics
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("pip install 'hf-nexus[eval]'")


# ---- Questions and answers ----

QUESTIONS = [
    {"question": "the quick brown fox?", "answer": "it jumps over the dog\n#### 42"},
    {"question": "how many?", "answer": "#### $1,000"},
    {"question": "what does the lazy dog do, over and over?", "answer": "the fox\n#### 7"},
    {"question": "x", "answer": "y z\n#### blue"},
    {"question": "over", "answer": "the lazy dog\n#### 1"},
]


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
def test_the_answer_loss_is_the_mean_over_the_tokens_of_answers(tokenizer, batch):
    model = answering()
    found = answer_scores(model, tokenizer, QUESTIONS, batch_size=batch)
    assert found == {"answer_loss": pytest.approx(by_hand(model, tokenizer), rel=1e-6), "examples": 5, "left_out": 0}
    prompt = "{question} = "
    other = answer_scores(model, tokenizer, QUESTIONS, batch_size=batch, prompt=prompt)["answer_loss"]
    assert other == pytest.approx(by_hand(model, tokenizer, prompt), rel=1e-6)
    assert abs(other - found["answer_loss"]) > 1e-4


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_is_generated_counts_up_to_its_first_answer(tokenizer, batch):
    answers = {f"Question: {row['question']}": row["answer"] for row in QUESTIONS}
    answers["Question: how many?"] = "just a thousand\n#### 1000.00"
    answers["Question: x"] = "no idea"
    oracle = Oracle(tokenizer, answers)
    found = answer_scores(oracle, tokenizer, QUESTIONS, batch_size=batch, max_new_tokens=99)
    # Of `x`, the first answer is that to the next question: 0.
    assert found["exact_match"] == 4 / 5
    assert oracle.calls[0]["max_new_tokens"] == 99 and oracle.calls[0]["do_sample"] is False


def test_a_model_that_was_taught_the_answers_gives_them(tokenizer):
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
        found = answer_scores(model, tokenizer, rows, batch_size=batch, max_new_tokens=12)
        assert found["exact_match"] == 1.0
        assert found["answer_loss"] < 0.1
    wrong = [{**row, "answer": "#### 9"} for row in rows]
    assert answer_scores(model, tokenizer, wrong, max_new_tokens=12)["exact_match"] == 0.0


def test_rows_that_do_not_fit_are_left_out_of_both_figures(tokenizer):
    long = {"question": "x" * 300, "answer": "#### 1"}
    model = answering(room=128)
    found = answer_scores(model, tokenizer, [*QUESTIONS, long])
    assert (found["examples"], found["left_out"]) == (5, 1)
    assert found["answer_loss"] == pytest.approx(by_hand(model, tokenizer), rel=1e-6)
    with pytest.raises(ValueError, match="None of the 5 rows fits into the model's context of 128 tokens"):
        answer_scores(model, tokenizer, QUESTIONS, max_new_tokens=128)


def test_each_module_gets_back_the_mode_it_was_in(tokenizer):
    model = answering().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    answer_scores(model, tokenizer, QUESTIONS)
    assert [module.training for module in model.modules()] == before
    model.forward = lambda **inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        answer_scores(model, tokenizer, QUESTIONS)
    assert [module.training for module in model.modules()] == before


def test_a_tokenizer_that_begins_texts_with_bos_does_so_here(tokenizer):
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
    answer_scores(model, with_bos, QUESTIONS, batch_size=1)
    assert all(ids[0, 0] == bos and bos not in ids[0, 1:] for ids in seen)
    assert not any(with_bos.eos_token_id in ids for ids in seen)
    assert [len(ids[0]) - 1 for ids in seen] == sorted(
        len(tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]) for row in QUESTIONS
    )


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([], {}, "None of the 0 rows"),
        (QUESTIONS, {"batch_size": 0}, "batch_size=0"),
        (QUESTIONS, {"prompt": "Question:"}, r"the prompt contains \{question\}"),
        (QUESTIONS, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([{"question": "x", "answer": "y"}], {"max_new_tokens": 1}, "Row 0 has no final answer"),
        ([{"question": "x", "answer": ""}], {"prompt": "{question}"}, "no token that a loss could be taken of"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokenizer, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        answer_scores(answering(), tokenizer, rows, **kwargs)
