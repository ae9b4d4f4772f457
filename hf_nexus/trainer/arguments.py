"""What a trainer's constructor was given, in a form that does not depend on the class it is mixed into."""

import inspect
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from .config import NexusConfig, NexusConfigMixin

__all__ = ["arguments_by_name", "with_nexus_fields"]


def with_nexus_fields(args: TrainingArguments | None) -> Any:
    """Training arguments that certainly have the Nexus fields: with the defaults where they had none."""
    if args is None:
        return NexusConfig(output_dir="tmp_trainer")
    if not isinstance(args, NexusConfigMixin):
        for f in fields(NexusConfigMixin):
            setattr(args, f.name, f.default)
    return args


def arguments_by_name(cls: type, mixin: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of a trainer's constructor as keywords, whatever their order in the class it is made of.

    Args:
        cls (`type`), mixin (`type`):
            The trainer's class, and the mixin that asks.
        args (`tuple`), kwargs (`dict`):
            What the constructor was given.

    Raises:
        TypeError: too many arguments, or one that was given twice.
    """
    after = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    signatures = [inspect.signature(c.__init__) for c in after if "__init__" in vars(c)]  # type: ignore[misc]
    # One with *args passes on what it is given.
    signature = next(s for s in signatures if all(p.kind is not p.VAR_POSITIONAL for p in s.parameters.values()))
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if len(args) > len(names):
        raise TypeError(f"{len(args)} positional arguments were given; at most {len(names)} are possible: {names}.")
    positional = dict(zip(names, args, strict=False))
    if repeated := sorted(positional.keys() & kwargs.keys()):
        raise TypeError(f"Given by position and by name: {', '.join(repeated)}.")
    return positional | kwargs
