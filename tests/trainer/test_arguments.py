"""Arguments of constructors and training arguments."""

import pytest
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_nexus import NexusConfig, NexusTrainer, NexusTrainerMixin
from hf_nexus.trainer.arguments import arguments_by_name, changed, own_arguments
from tests.support.tiny import Rows, tiny_llama


def test_positional_arguments_get_the_names_of_the_base_class() -> None:
    assert arguments_by_name(NexusTrainer, NexusTrainerMixin, ("m", "a"), {"train_dataset": 1}) == {
        "model": "m",
        "args": "a",
        "train_dataset": 1,
    }


def test_an_argument_that_is_given_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="by position and by name: model"):
        arguments_by_name(NexusTrainer, NexusTrainerMixin, ("m",), {"model": "m"})


def test_names_are_looked_up_past_constructors_with_star_args() -> None:
    class Passing(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Own(NexusTrainerMixin, Passing):
        pass

    assert arguments_by_name(Own, NexusTrainerMixin, ("m",), {}) == {"model": "m"}


def test_other_training_arguments_get_the_default_fields(tmp_path) -> None:
    args = own_arguments(Seq2SeqTrainingArguments(output_dir=str(tmp_path)))
    assert args.inner_lr == NexusConfig(output_dir=str(tmp_path)).inner_lr


@pytest.mark.parametrize("config", [NexusConfig, TrainingArguments])
def test_trainers_of_the_same_arguments_have_the_same_k(tmp_path, config):
    """The Trainer takes `num_steps` from a dict of the arguments and writes 1 there."""
    accumulation = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    args = config(str(tmp_path), accelerator_config=accumulation, use_cpu=True, report_to="none")
    for _ in range(2):
        assert NexusTrainer(tiny_llama(), args, train_dataset=Rows(8, 0)).args.gradient_accumulation_steps == 4
    assert accumulation["gradient_accumulation_kwargs"] == {"num_steps": 4}


def test_changed_arguments_are_restored_after_an_error(tmp_path) -> None:
    args = NexusConfig(output_dir=str(tmp_path), hub_token="secret")
    with pytest.raises(KeyboardInterrupt), changed(args, hub_token=None):
        assert args.hub_token is None
        raise KeyboardInterrupt
    assert args.hub_token == "secret"


def test_own_arguments_come_before_those_that_star_args_pass_on() -> None:
    class Weighted(Trainer):
        def __init__(self, alpha, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Own(NexusTrainerMixin, Weighted):
        pass

    assert arguments_by_name(Own, NexusTrainerMixin, (0.5, "m"), {"args": 1}) == {
        "alpha": 0.5,
        "model": "m",
        "args": 1,
    }
