"""Evaluating several sets shows one bar for each, and one row of metrics."""

import pytest
from transformers import ProgressCallback, TrainerCallback

from tests.support.tiny import Rows


class Bars(ProgressCallback):
    """Records the total and the end of each progress bar of an evaluation."""

    def __init__(self):
        super().__init__()
        self.closed: list[tuple[int, int]] = []

    def _note(self) -> None:
        if self.prediction_bar is not None:
            self.closed.append((self.prediction_bar.total, self.prediction_bar.n))

    def on_predict(self, args, state, control, **kwargs):
        self._note()
        super().on_predict(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        self._note()
        super().on_evaluate(args, state, control, **kwargs)


class Evaluations(TrainerCallback):
    def __init__(self):
        self.metrics: list[dict] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(dict(metrics))


@pytest.fixture
def evaluated(make_trainer, sources):
    bars, events = Bars(), Evaluations()
    trainer = make_trainer(
        sources,
        per_device_eval_batch_size=2,
        trainer_kwargs={
            "eval_dataset": {"text": Rows(4, 0), "code": Rows(10, 1), "law": Rows(6, 2)},
            "callbacks": [bars, events],
        },
    )
    return trainer, trainer.evaluate(), bars, events


def test_each_set_has_a_bar_that_is_filled_and_closed(evaluated):
    _, _, bars, _ = evaluated
    assert bars.closed == [(2, 2), (5, 5), (3, 3)]


def test_callbacks_see_one_evaluation_without_run_times_of_sets(evaluated):
    _, metrics, _, events = evaluated
    assert len(events.metrics) == 1
    assert {"eval_loss", "eval_ood_loss", "eval_text_loss", "eval_law_perplexity"} <= set(events.metrics[0])
    assert not [key for key in events.metrics[0] if key.endswith(("_runtime", "_per_second"))]
    assert "eval_text_runtime" in metrics


def test_the_log_has_one_entry_for_the_evaluation(evaluated):
    trainer, metrics, _, _ = evaluated
    assert len(trainer.state.log_history) == 1
    assert trainer.state.log_history[0] == {**metrics, "step": 0}
