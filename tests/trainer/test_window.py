"""A window and its counts, and the walk over it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_nexus import Nexus, NexusConfig
from hf_nexus.mixture.stream.reader import SourceError
from hf_nexus.mixture.tags import MicroBatchTag, TaggedRows, TaggingCollator
from hf_nexus.trainer.window import Walker, Window, countable, inner_lr_scale
from tests.trainer.distributed.losses_worker import segmenter

TOKENS = torch.tensor([3, 1])


def tagged(source: str, rows: int = 2) -> dict:
    collate = TaggingCollator(lambda rows: {"x": torch.zeros(1, 6)})
    return collate(TaggedRows([0] * rows, MicroBatchTag({source: rows})))


def test_tags_are_taken_out_and_noted() -> None:
    window = Window()
    batches = list(window.take([tagged("text"), tagged("code", 3)], tagged=True))
    assert [list(batch) for batch in batches] == [["x"], ["x"]]
    assert (window.sources, window.rows) == (["text", "code"], [{"text": 2}, {"code": 3}])


def test_a_plain_micro_batch_counts_its_rows() -> None:
    window = Window()
    list(window.take([{"x": torch.zeros(5, 2)}], tagged=False))
    assert window.rows == [{"": 5}]


def test_a_missing_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say which source it holds"):
        list(Window().take([{"x": torch.zeros(1)}], tagged=True))


def test_only_a_mixed_window_holds_several_sources() -> None:
    def mixed() -> dict:
        return TaggingCollator(lambda rows: {"x": rows})(TaggedRows([0] * 3, MicroBatchTag({"text": 1, "code": 2})))

    window = Window(mixed=True)
    assert len(list(window.take([mixed()], tagged=True))) == 1 and window.sources == [""]
    with pytest.raises(AssertionError, match="several sources"):
        list(Window().take([mixed()], tagged=True))


def test_an_unreadable_source_ends_the_window() -> None:
    def batches():
        yield tagged("text")
        raise SourceError("Traceback ...\nSourceError: the disk is gone ")

    window = Window()
    assert len(list(window.take(batches(), tagged=True))) == 1
    assert str(window.error) == "the disk is gone"


def test_a_window_is_complete_once_all_of_it_was_seen() -> None:
    window = Window([{"a": 2}, {"b": 2}])
    assert Window().complete and not window.complete
    window.inputs += [1, 2]
    assert window.complete


@pytest.mark.parametrize(("items", "summed"), [(TOKENS, 6.0), (torch.tensor([2.5, 4.5]), 5.0)])
def test_a_mean_loss_is_summed_over_this_ranks_tokens(items: torch.Tensor, summed: float) -> None:
    """The divisor of the loss is the mean of the counts of the ranks."""
    window = Window([{"a": 2}, {"b": 2}], unit="tokens", tokens=TOKENS, items=items)
    rows, loss, count = window.summed(0, torch.tensor(2.0))
    assert (rows, float(loss), int(count)) == ({"a": 2}, summed, 3)


# What a loss function does with the count `n` and the number of micro-batches `k` of a window, given sum and mean of
# its token losses.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "divided by the count": lambda total, mean, n, k: total / n,
    "divided by the count, changed in place": lambda total, mean, n, k: total / n.clamp_(min=1),
    "a mean, divided by the micro-batches": lambda total, mean, n, k: mean / k,
    "a mean": lambda total, mean, n, k: mean,
    "divided by both": lambda total, mean, n, k: total / n / k,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_is_divided_by_the_count_once(kind: str, whole: bool) -> None:
    tokens, items = torch.tensor([3, 1]), torch.tensor([2.5, 4.5])  # the other rank has 2 and 8
    window = Window([{"a": 2}, {"b": 2}], unit="tokens", tokens=tokens, items=items)
    divisors = window.divisors(0, differentiable=True, whole=whole)
    weight = torch.tensor(1.0, requires_grad=True)
    loss = LOSSES[kind](6.0 * weight, 2.0 * weight, divisors.items, divisors.steps)
    loss.backward()
    part = divisors.divide(loss.detach())
    assert float(part) == pytest.approx(6.0 / (7.0 if whole else 2.5))
    if whole:
        assert float(window.mean_of_part(0, part)) == pytest.approx(6.0 / 2.5)


@pytest.mark.parametrize("divided", [False, True])
def test_a_loss_without_a_count_is_a_mean(divided: bool) -> None:
    window = Window([{"a": 2}, {"b": 2}])
    divisors = window.divisors(0, differentiable=True, whole=True)
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight / divisors.steps if divided else weight * 1
    loss.backward()
    part = divisors.divide(loss.detach())
    assert (float(part), float(window.mean_of_part(0, part))) == (1.0, 2.0)


def test_a_part_that_is_not_divided_is_a_mean() -> None:
    """The losses of mixtures of experts have such a part."""
    divisors = Window([{"a": 2}], tokens=torch.tensor([4]), items=torch.tensor([2.0])).divisors(0, differentiable=True)
    weight = torch.tensor(1.0, requires_grad=True)
    loss = 6.0 * weight / divisors.items + 0.5 * weight
    loss.backward()
    assert float(divisors.divide(loss.detach())) == pytest.approx(3.0 + 0.5 * 4 / 2)


@pytest.mark.parametrize(("own", "whole"), [(0.0, True), (1.5, True), (1.5, False)])
def test_a_mean_over_no_token_adds_nothing(own: float, whole: bool) -> None:
    """Other micro-batches of the window have tokens, or other ranks in this one."""
    window = Window([{"a": 2}, {"b": 2}], unit="tokens", tokens=torch.tensor([0, 3]), items=torch.tensor([own, 4.5]))
    divisors = window.divisors(0, differentiable=True, whole=whole)
    logits = torch.zeros(2, 5, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([-100, -100]))
    loss.backward()
    part = divisors.divide(loss.detach())
    assert loss.isnan() and float(part) == 0.0
    assert float(window.summed(0, window.mean_of_part(0, part) if whole else part)[1]) == 0.0


def test_a_loss_that_is_not_a_number_stays_so() -> None:
    window = Window([{"a": 2}], unit="tokens", tokens=torch.tensor([3]), items=torch.tensor([3.0]))
    assert window.divisors(0, differentiable=True).divide(torch.tensor(math.nan)).isnan()


def test_without_token_labels_rows_are_counted() -> None:
    rows, loss, count = Window([{"a": 3, "b": 1}], mixed=True).summed(0, torch.tensor(2.0))
    assert (rows, float(loss), int(count)) == ({"a": 3, "b": 1}, 8.0, 4)


def test_the_loss_of_a_window_weighs_tokens_of_finite_losses() -> None:
    window = Window([{"a": 2}, {"b": 2}], tokens=TOKENS, items=TOKENS)
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


# ---- Walker ----


def walked(rows: list[torch.Tensor], **config: Any) -> tuple[torch.nn.Linear, torch.Tensor, Any]:
    torch.manual_seed(0)
    model, args = torch.nn.Linear(4, 1), NexusConfig("out", use_cpu=True, report_to="none", inner_lr=0.1, **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def micro_step(model: torch.nn.Module, i: int) -> torch.Tensor:
        loss = model(rows[i]).square().mean()
        loss.backward()
        return loss.detach()

    window = Window([{"a": 1}] * len(rows))
    return model, *Walker(args).walk(model, window, micro_step, optimizer=optimizer, step=3)


def test_a_walk_restores_weights_and_leaves_a_pseudo_gradient() -> None:
    rows = [torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model, losses, nexus = walked(rows)
    torch.manual_seed(0)
    start = torch.nn.Linear(4, 1)
    assert torch.equal(model.weight, start.weight)
    expected, reference = Nexus(start.parameters(), 0.1), []
    with expected.window():
        for x in rows:
            loss = start(x).square().mean()
            loss.backward()
            expected.inner_step()
            reference.append(loss.detach())
    assert torch.equal(losses, torch.stack(reference)) and nexus.taken == [True] * 3
    assert torch.equal(model.weight.grad, start.weight.grad)


def test_a_walk_that_fails_restores_the_weights() -> None:
    rows = [torch.ones(2, 4), torch.ones(2, 5)]
    torch.manual_seed(0)
    start = torch.nn.Linear(4, 1)
    model = torch.nn.Linear(4, 1)
    model.load_state_dict(start.state_dict())
    walker = Walker(NexusConfig("out", use_cpu=True, report_to="none", inner_lr=0.1))

    def micro_step(model: torch.nn.Module, i: int) -> torch.Tensor:
        loss = model(rows[i]).square().mean()
        loss.backward()
        return loss.detach()

    with pytest.raises(RuntimeError, match="shapes"):
        optimizer = torch.optim.SGD(model.parameters())
        walker.walk(model, Window([{"a": 1}] * 2), micro_step, optimizer=optimizer, step=0)
    assert torch.equal(model.weight, start.weight) and model.weight.grad is None


def test_a_walker_refuses_parameters_that_the_optimizer_lacks() -> None:
    model = torch.nn.Linear(4, 1)
    walker = Walker(NexusConfig("out", use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match="'bias' is trainable, but the optimizer does not train it"):
        walker.begin(model, torch.optim.SGD([model.weight]))


def test_a_class_of_rows_may_have_the_number_of_ignored_pixels():
    rows = {"labels": torch.tensor([255, 3])}
    assert countable(rows, segmenter()) is rows
    assert countable({"labels": torch.tensor([[255, 3]], dtype=torch.uint8)}, segmenter())["labels"].tolist() == [
        [-100, 3]
    ]
