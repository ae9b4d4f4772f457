"""Warnings about a plan whose numbers do not fit together."""

from fractions import Fraction

from transformers import SchedulerType

from ..terminal import format_number
from ..trainer.checks import ONE_INNER_STEP
from .fields import PretrainArguments, PretrainConfig
from .plan import RunPlan

__all__ = ["ENDS_EARLY", "stable_steps", "warnings_of"]

ENDS_EARLY = "The run ends before its schedule: lower warmup_steps and num_decay_steps (lr_scheduler_kwargs)."
# The fields that decide how many tokens a run has.
_COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")


def warnings_of(arguments: PretrainArguments, plan: RunPlan) -> list[str]:
    """
    What does not fit together: one inner step, a warmup as long as the run, and devices, batch size or steps that give
    another number of tokens than the file of the configuration on its own devices.
    """
    t, found = arguments.training, []
    if t.nexus and t.gradient_accumulation_steps == 1:
        found.append(ONE_INNER_STEP)
    if plan.steps is not None and 0 < plan.steps <= (warmup := t.get_warmup_steps(plan.steps)):
        found.append(f"The learning rate rises for {warmup} of {plan.steps} steps. Lower warmup_steps.")
    of_step, of_run = _shares(arguments, plan)
    designed = max(1, arguments.model.accelerators)
    on = f" on {plan.devices} devices instead of {designed}" if plan.devices != designed else ""
    if share := _times(of_run):
        found.append(f"The run{on} has {share} the configuration's tokens. Change max_steps to compensate.")
    if share := _times(of_step):
        found.append(
            f"A step{on} has {share} the configuration's tokens, for which the learning rate was chosen. "
            "Change gradient_accumulation_steps or per_device_train_batch_size to compensate."
        )
    return found


def stable_steps(training: PretrainConfig, steps: int) -> int | None:
    """
    Steps at the peak of a warmup-stable-decay schedule in a run of some steps, negative if the run is too short.
    `None` for another schedule.
    """
    kind, kwargs = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs
    if kind is not SchedulerType.WARMUP_STABLE_DECAY or not isinstance(kwargs, dict):
        return None
    return steps - training.get_warmup_steps(steps) - int(kwargs.get("num_decay_steps", 0))


def _shares(arguments: PretrainArguments, plan: RunPlan) -> tuple[Fraction, Fraction]:
    """The tokens of a step and of the run, divided by those of the file of the configuration on its own devices."""
    sections = arguments.sections
    training = {name: getattr(PretrainConfig, name) for name in _COUNTS} | sections.get("training", {})
    length = sections["data"].get("sequence_length", type(arguments.mixture).sequence_length)
    step = max(1, arguments.model.accelerators) * length * training[_COUNTS[0]] * training[_COUNTS[1]]
    share = Fraction(plan.tokens_per_step, step)
    both = plan.steps is not None and training["max_steps"] > 0
    return share, share * Fraction(plan.steps or 1, training["max_steps"]) if both else share


def _times(share: Fraction) -> str:
    """A share in words: a fraction if it is a short one, else four digits. Empty if these are those of 1."""
    digits = format_number(float(share), 4)
    if digits == "1":
        return ""
    return f"{digits} times" if share > 1 else f"{share if share.denominator <= 1000 else digits} of"
