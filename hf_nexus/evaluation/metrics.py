"""Metrics of the `evaluate` library that need no network."""

from typing import Any

import datasets
import evaluate
import numpy as np
from torch import Tensor

from .answers import ANSWER_MARK, final_answer

__all__ = ["AnswerExactMatch", "NextTokenAccuracy"]


class _LocalMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """A metric whose predictions and references are features of one kind, and which keeps them in memory."""

    feature: Any
    inputs: str

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})  # evaluate's default are files that processes share

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__).strip().partition("\n")[0],
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), self.feature)),
        )


class NextTokenAccuracy(_LocalMetric):
    """
    Fraction of tokens that the model predicted as the most probable next token.

    `compute` takes:

    - **predictions**, (N, T): the most probable next token at each position.
    - **references**, (N, T): labels, not shifted, -100 where a position does not count.

    It returns `{"accuracy": float}`; NaN if no position counts.

    Raises:
        ValueError: a prediction and its reference have different lengths.

    Example:
        >>> from hf_nexus.evaluation.metrics import NextTokenAccuracy
        >>> NextTokenAccuracy().compute(predictions=[[7, 8, 5, 0]], references=[[6, 7, 9, -100]])
        {'accuracy': 0.5}

    In a Trainer:

    ```python
    accuracy = NextTokenAccuracy()
    trainer = NexusTrainer(
        ...,
        compute_metrics=accuracy.compute_metrics,  # logs eval_accuracy
        preprocess_logits_for_metrics=accuracy.argmax,
    )
    ```
    """

    feature = datasets.Sequence(datasets.Value("int64"))
    inputs = "predictions: token ids, (N, T); references: labels, (N, T), -100 if not counted"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = count = 0
        for i, (predicted, labels) in enumerate(zip(map(np.asarray, predictions), references, strict=True)):
            labels = np.asarray(labels)
            if len(predicted) != len(labels):
                raise ValueError(
                    f"Prediction {i} has {len(predicted)} tokens and its reference {len(labels)}. Pass both with one "
                    "token per position, not shifted."
                )
            counted = labels[1:] != -100
            right += int((predicted[:-1] == labels[1:])[counted].sum())
            count += int(counted.sum())
        return {"accuracy": right / count if count else float("nan")}

    @staticmethod
    def argmax(logits: Tensor | tuple[Tensor, ...], labels: Any = None) -> Tensor:
        """
        Most probable tokens, (B, T), of logits, (B, T, V). As `preprocess_logits_for_metrics` it saves the memory of
        the logits of a whole evaluation set.
        """
        if isinstance(logits, tuple):  # a model with further outputs
            logits = logits[0]
        return logits.argmax(-1)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Metric of an [`~transformers.EvalPrediction`] with token ids as predictions, for `compute_metrics`."""
        predictions = np.asarray(prediction.predictions)
        if predictions.ndim != 2:
            raise ValueError(
                f"The predictions have the shape {predictions.shape}, not (N, T). Pass "
                "preprocess_logits_for_metrics=NextTokenAccuracy.argmax to the Trainer."
            )
        result: dict[str, float] = self.compute(predictions=predictions, references=prediction.label_ids)
        return result


class AnswerExactMatch(_LocalMetric):
    r"""
    Fraction of solutions with the [`final_answer`] of the reference, by the convention of GSM8K.

    `compute` takes **predictions** and **references**, solutions as strings. A prediction without a final answer is
    wrong. It returns `{"exact_match": float}`.

    Raises:
        ValueError: a reference has no final answer.

    Example:
        >>> from hf_nexus.evaluation.metrics import AnswerExactMatch
        >>> solutions = ["It makes 40 + 2.\n#### 42.0", "42"]
        >>> AnswerExactMatch().compute(predictions=solutions, references=["#### 42", "#### 42"])
        {'exact_match': 0.5}
    """

    feature = datasets.Value("string")
    inputs = f"predictions, references: solutions, each ending in a line '{ANSWER_MARK}<answer>'"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        expected = [final_answer(text) for text in references]
        if None in expected:
            i = expected.index(None)
            raise ValueError(
                f"Reference {i} has no final answer: {references[i]!r}. It must end in a line '{ANSWER_MARK}<answer>'."
            )
        right = [final_answer(text) == answer for text, answer in zip(predictions, expected, strict=True)]
        return {"exact_match": sum(right) / len(right)}
