"""Controls: arms that lack one ingredient of the primary arm, and differ from it in nothing else."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..pretrain.flags import described

__all__ = ["CONTROLS", "Control", "find_controls"]


class Control(NamedTuple):
    """A kind of control: a field, its value, and what remains of the primary arm with it."""

    field: str
    value: Any
    remains: str


CONTROLS = {
    "gamma 0": Control("inner_lr", 0.0, "normalization"),
    "random direction": Control("inner_direction", "random", "normalization with a perturbation in any direction"),
    "source mixing": Control("source_schedule", "mixed", "normalization with a walk over mixed data"),
    "source blocking": Control("source_schedule", "blocked", "normalization with a walk inside a single source"),
    "following gamma": Control(
        "inner_lr_schedule", "follow", "normalization with a path whose length follows the learning rate"
    ),
}
# Without a path, its direction and the schedule of its length mean nothing.
_OF_A_PATH = {"inner_direction", "inner_lr_schedule"}


def find_controls(
    settings: Mapping[str, Mapping[str, Any]], primary: str, tuned: Mapping[str, Collection[str]] = {}
) -> tuple[dict[str, str], dict[str, tuple[str, list[str]]]]:
    """
    Find the controls of the primary arm by the training fields of each arm, and those that it has `tuned`. A control
    may differ in fields that both tuned.

    Returns the kind of each control, a key of `CONTROLS`, and of arms that lack an ingredient and are no control,
    that kind and the other fields in which they differ.

    Example:
        >>> from hf_nexus.compare.controls import find_controls
        >>> arms = {"nexus": {"inner_lr": 0.2}, "gamma-0": {"inner_lr": 0}, "old": {"inner_lr": 0, "weight_decay": 0}}
        >>> find_controls(arms, "nexus")
        ({'gamma-0': 'gamma 0'}, {'old': ('gamma 0', ['weight_decay'])})
    """
    defaults = {name: field.get("default") for name, field in described("nexus").items()}
    controls: dict[str, str] = {}
    unclean: dict[str, tuple[str, list[str]]] = {}
    reference = defaults | dict(settings.get(primary, {}))
    chosen = {*tuned.get(primary, ())}
    for arm, given in settings.items():
        own, own_chosen = defaults | dict(given), {*tuned.get(arm, ())}
        differing = {name for name in {**own, **reference} if own.get(name) != reference.get(name)}
        differing = differing - (chosen & own_chosen) | (chosen ^ own_chosen)
        for kind, (name, value, _) in CONTROLS.items():
            if own["nexus"] and name in differing and own[name] == value and name not in own_chosen:
                others = differing - {name} - (_OF_A_PATH if value == 0 else set())
                if others:
                    unclean[arm] = kind, sorted(others)
                else:
                    controls[arm] = kind
                break
    return controls, unclean
