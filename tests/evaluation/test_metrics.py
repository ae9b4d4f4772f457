"""Metrics of the `evaluate` library: next-token accuracy and exact match of answers."""

import numpy as np
import pytest
import torch

from hf_nexus.evaluation.metrics import AnswerExactMatch, NextTokenAccuracy
from tests.support.tiny import Rows


def test_exact_match_compares_numbers_by_value():
    def score(prediction: str, reference: str) -> float:
        return AnswerExactMatch().compute(predictions=[prediction], references=[reference])["exact_match"]

    assert score("#### 1.0", "#### 1") == score("#### nan", "#### nan") == score("#### a b", "#### a b.") == 1.0
    assert score("#### 2", "#### 1") == score("1", "#### 1") == score("#### one", "#### 1") == 0.0
    assert score("#### 12345678901234567891", "#### 12345678901234567890") == 0.0  # as floats they are equal
    together = AnswerExactMatch()
    together.add_batch(predictions=["#### 1", "#### 2"], references=["#### 1", "#### 1"])
    together.add(prediction="#### 5", reference="#### 5")
    assert together.compute() == {"exact_match": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="Reference 0 has no final answer: '42'"):
        score("#### 42", "42")


@pytest.mark.parametrize("kind", [lambda x: x, np.array, torch.tensor])
def test_a_prediction_is_compared_with_the_next_label(kind):
    predictions, references = [[7, 8, 5, 0], [1, 2, 3, 9]], [[6, 7, 9, -100], [-100, -100, 2, 3]]
    found = NextTokenAccuracy().compute(predictions=kind(predictions), references=kind(references))
    assert found == {"accuracy": 3 / 4}


def test_only_the_two_rows_of_a_pair_need_one_length():
    accuracy = NextTokenAccuracy()
    assert accuracy.compute(predictions=[[1], [2, 3]], references=[[1], [7, 2]]) == {"accuracy": 1.0}
    assert np.isnan(accuracy.compute(predictions=[[1]], references=[[1]])["accuracy"])
    with pytest.raises(ValueError, match="Prediction 0 has 1 tokens and its reference 2"):
        accuracy.compute(predictions=[[1]], references=[[1, 2]])


def test_accuracy_in_a_trainer_is_that_of_the_model(make_trainer, sources):
    rows = Rows(7, 0, pad=True)
    accuracy = NextTokenAccuracy()
    hooks = {"compute_metrics": accuracy.compute_metrics, "preprocess_logits_for_metrics": accuracy.argmax}
    trainer = make_trainer(sources, trainer_kwargs=hooks, per_device_eval_batch_size=3, max_steps=20)
    trainer.train()
    with torch.no_grad():
        predicted = trainer.model.eval()(input_ids=rows.ids).logits.argmax(-1)[:, :-1]
    labels = rows.labels[:, 1:]
    expected = (predicted == labels)[labels != -100].float().mean().item()
    assert 0.05 < expected < 1
    found = trainer.evaluate({"text": rows})
    assert found["eval_text_accuracy"] == pytest.approx(expected)
    assert "eval_text_loss" in found


def test_logits_are_refused_with_the_fix(make_trainer, sources):
    hooks = {"compute_metrics": NextTokenAccuracy().compute_metrics}
    with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics=NextTokenAccuracy\.argmax"):
        make_trainer(sources, trainer_kwargs=hooks).evaluate(Rows(3, 0))
    logits = torch.eye(5)[None]
    assert NextTokenAccuracy.argmax((logits, None)).tolist() == [[0, 1, 2, 3, 4]]
