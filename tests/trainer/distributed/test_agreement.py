"""What a window relies on is compared over the ranks: data, settings, wrapping, trainable parameters, sources."""

import pytest

from tests.trainer.distributed.agreement_worker import OTHER


@pytest.fixture(scope="module")
def ranks(two_ranks: list[dict]) -> list[dict]:
    return [rank["agreement"] for rank in two_ranks]


SAYS = {
    "order": "sources was ['text', 'code', 'math'] and is ['math', 'code', 'text']",
    "names": "source 'txt'",
    "size": "source 'code': rows was 32 and is 30",
    "plain size": "rows was 40 and is 30",
    "weights": "weights",
    "stages": "weights",
    "seed": "seed was 42 and is 43",
    "data seed": "data_seed",
    "schedule": "source_schedule was 'random' and is 'stratified'",
    "inner_lr": "inner_lr was 0.05 and is 0.1",
    "learning rate": "learning_rate was 0.01 and is 0.001",
    "steps": "steps was 5 and is 4",
    "without nexus": "source_schedule",
    "epsilon": "adam_epsilon was 1e-08 and is 0.001",
    "precision": "mixed_precision was 'no' and is 'bf16'",
    "label smoothing": "label_smoothing_factor was 0.0 and is 0.1",
    "rows": "source 'code': sample was ",
    "plain rows": "sample was ",
}


@pytest.mark.parametrize("name", OTHER)
def test_ranks_that_were_given_something_else_are_refused(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        assert rank[name].startswith("The ranks were given different data or settings. From rank 0 to rank 1, ")
        assert SAYS[name] in rank[name]


@pytest.mark.parametrize("train", [False, True])
def test_other_evaluation_sets_are_refused(ranks: list[dict], train: bool) -> None:
    for rank in ranks:
        said = rank[f"evaluated/{train}"]
        assert "evaluation sets was ['text', 'code', 'math'] and is ['math', 'code', 'text']" in said
        assert "evaluation sample: text was " in rank["evaluated rows"]


@pytest.mark.parametrize("mode", ["", "/bf16", "/off"])
@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_an_evaluation_before_training_changes_nothing(ranks: list[dict], how: str, mode: str) -> None:
    assert ranks[0][how + mode] == ranks[1][how + mode] == ranks[0]["nothing" + mode]


@pytest.mark.parametrize("again", [False, True])
def test_parameters_that_ddp_does_not_reduce_are_refused(ranks: list[dict], again: bool) -> None:
    for rank in ranks:
        assert rank[f"unfrozen/{again}"].startswith("The trainable parameters changed after training began.")


def test_layers_that_are_replaced_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["changed layer"].startswith("The trainable parameters changed after training began.")


def test_optimizers_with_other_settings_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "From rank 0 to rank 1, optimizer was ['SGD', {'lr': 0.1, " in rank["optimizer"]
        assert rank["changed lr"].startswith("The optimizer of rank 1 has another lr than that of rank 0.")


def test_windows_of_different_sources_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["windows"].startswith("The ranks hold different sources in one window: rank 0 has ")
