"""Metrics in the form of the `evaluate` library that need no network: `pip install hf-nexus[eval]`."""

from typing import Any

import numpy as np
from torch import Tensor

from .answers import ANSWER_MARK, final_answer

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError("These metrics need the evaluate library: pip install 'hf-nexus[eval]'") from error

__all__ = ["AnswerExactMatch", "NextTokenAccuracy"]


class _InMemory(evaluate.Metric):
    """Keeps what it is given in memory: by default, `evaluate` writes it to files that processes share."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})


class NextTokenAccuracy(_InMemory):
    """
    Share of tokens that were predicted as the most probable one from those before them.

    `compute` takes:

    - **predictions**, (N, T): the most probable token after each position. The models' logits, (N, T, V), need as much
      memory as V of these; `argmax` makes one of the other, batch by batch.
    - **references**, (N, T): labels as causal models take them, not shifted, -100 where they do not count.

    It returns `{"next_token_accuracy": float}`; NaN without a label that counts.

    Raises:
        ValueError: a prediction is not as long as its reference.

    Example:
        >>> from hf_nexus.evaluation.metrics import NextTokenAccuracy
        >>> NextTokenAccuracy().compute(predictions=[[7, 8, 5, 0]], references=[[6, 7, 9, -100]])
        {'next_token_accuracy': 0.5}

    In a Trainer:

    ```python
    accuracy = NextTokenAccuracy()
    trainer = NexusTrainer(
        ...,
        compute_metrics=accuracy.compute_metrics,  # eval_<name>_next_token_accuracy
        preprocess_logits_for_metrics=accuracy.argmax,
    )
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Share of tokens that were predicted as the most probable one from those before them.",
            citation="",
            inputs_description="predictions: token ids, (N, T); references: labels, (N, T), -100 where none counts",
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        right = count = 0
        for i, (predicted, labels) in enumerate(zip(map(np.asarray, predictions), references, strict=True)):
            labels = np.asarray(labels)
            if len(predicted) != len(labels):
                raise ValueError(
                    f"Prediction {i} has {len(predicted)} tokens and its reference {len(labels)}. Pass both as the "
                    "model has them, one token per position, not shifted."
                )
            counts = labels[1:] != -100
            right += int((predicted[:-1] == labels[1:])[counts].sum())
            count += int(counts.sum())
        return {"next_token_accuracy": right / count if count else float("nan")}

    @staticmethod
    def argmax(logits: Tensor | tuple[Tensor, ...], labels: Any = None) -> Tensor:
        """For `preprocess_logits_for_metrics`: the most probable tokens, (B, T), of logits, (B, T, V)."""
        if isinstance(logits, tuple):  # a model with further outputs
            logits = logits[0]
        return logits.argmax(-1)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """For `compute_metrics`: of an [`~transformers.EvalPrediction`] whose predictions are token ids."""
        predictions = np.asarray(prediction.predictions)
        if predictions.ndim != 2:
            raise ValueError(
                f"The predictions have the shape {predictions.shape}, not (N, T). Pass "
                "preprocess_logits_for_metrics=NextTokenAccuracy.argmax to the Trainer."
            )
        result: dict[str, float] = self.compute(predictions=predictions, references=prediction.label_ids)
        return result


class AnswerExactMatch(_InMemory):
    r"""
    Share of solutions that end in the reference's final answer, by the convention of GSM8K; see [`final_answer`].

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

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of solutions that end in the reference's final answer.",
            citation="",
            inputs_description=f"predictions, references: solutions, each ending in a line '{ANSWER_MARK}<answer>'",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        expected = [final_answer(text) for text in references]
        if None in expected:
            i = expected.index(None)
            raise ValueError(
                f"Reference {i} has no final answer: {references[i]!r}. It must end in a line '{ANSWER_MARK}<answer>'."
            )
        right = [final_answer(text) == answer for text, answer in zip(predictions, expected, strict=True)]
        return {"exact_match": sum(right) / len(right)}
