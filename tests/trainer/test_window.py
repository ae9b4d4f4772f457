"""A window and its counts."""

import math

import pytest
import torch

from hf_nexus.mixture.stream.reader import SourceError
from hf_nexus.mixture.tags import TaggedRows, TaggingCollator
from hf_nexus.trainer.window import Window, inner_lr_scale

TOKENS = torch.tensor([3, 1])


def tagged(source: str, rows: int = 2) -> dict:
    return TaggingCollator(lambda rows: {"x": torch.zeros(1, 6)})(TaggedRows([0] * rows, source))


def test_tags_are_taken_out_and_noted() -> None:
    window = Window()
    batches = list(window.take([tagged("text"), tagged("code", 3)], tagged=True))
    assert [list(batch) for batch in batches] == [["x"], ["x"]]
    assert (window.sources, window.rows, len(window)) == (["text", "code"], [2, 3], 2)


def test_a_plain_micro_batch_counts_its_rows() -> None:
    window = Window()
    list(window.take([{"x": torch.zeros(5, 2)}], tagged=False))
    assert (window.sources, window.rows) == ([""], [5])


def test_a_missing_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say which source it holds"):
        list(Window().take([{"x": torch.zeros(1)}], tagged=True))


def test_an_unreadable_source_ends_the_window() -> None:
    def batches():
        yield tagged("text")
        raise SourceError("Traceback ...\nSourceError: the disk is gone ")

    window = Window()
    assert len(list(window.take(batches(), tagged=True))) == 1
    assert str(window.error) == "the disk is gone"


def test_a_window_is_complete_once_all_of_it_was_seen() -> None:
    window = Window(sources=["a", "b"])
    assert Window().complete and not window.complete
    window.inputs += [1, 2]
    assert window.complete


@pytest.mark.parametrize(("ranks", "summed", "tokens"), [(1, 6.0, 3), (2, 5.0, 3)])
def test_a_mean_loss_is_summed_over_this_ranks_tokens(ranks: int, summed: float, tokens: int) -> None:
    """With a count over all ranks, the Trainer multiplies the loss by the number of ranks."""
    divisors = TOKENS if ranks == 1 else torch.tensor([5, 9])
    window = Window(["a", "b"], [2, 2], unit="tokens", tokens=TOKENS, divisors=divisors)
    source, loss, count = window.summed(0, torch.tensor(2.0), ranks)
    assert (source, float(loss), int(count)) == ("a", summed, tokens)


def test_without_token_labels_rows_are_counted() -> None:
    source, loss, count = Window(["a"], [4]).summed(0, torch.tensor(2.0), 1)
    assert (source, float(loss), int(count)) == ("a", 8.0, 4)


def test_the_loss_of_a_window_weighs_tokens_of_finite_losses() -> None:
    window = Window(["a", "b"], tokens=TOKENS, divisors=TOKENS)
    other = torch.tensor(7.0)
    assert float(window.mean_loss(torch.tensor([1.0, 5.0]), other)) == 2.0
    assert float(window.mean_loss(torch.tensor([math.nan, 5.0]), other)) == 5.0
    assert float(window.mean_loss(torch.tensor([math.nan, math.inf]), other)) == 7.0


def test_inner_lr_follows_the_learning_rate_to_its_peak() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert inner_lr_scale("constant", optimizer, 0.4) == 1.0
    assert inner_lr_scale("follow", optimizer, 0.4) == pytest.approx(0.25)
    optimizer.param_groups[0]["initial_lr"] = 0.2
    assert inner_lr_scale("follow", optimizer, 0.4) == pytest.approx(0.5)
