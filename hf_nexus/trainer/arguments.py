"""Arguments of constructors, and training arguments, for any base class of a trainer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from .config import NexusConfig, NexusConfigMixin

__all__ = ["arguments_by_name", "changed", "with_nexus_fields"]


def with_nexus_fields(args: TrainingArguments | None) -> Any:
    """Training arguments with the Nexus fields, which have their defaults if they were missing."""
    if args is None:
        return NexusConfig(output_dir="tmp_trainer")
    if not isinstance(args, NexusConfigMixin):
        for f in fields(NexusConfigMixin):
            setattr(args, f.name, f.default)
    return args


def arguments_by_name(cls: type, mixin: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of a constructor by name. The names are those of the class after the mixin.

    Raises:
        TypeError: too many arguments, or one that is given twice.
    """
    after = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    signatures = [inspect.signature(c.__init__) for c in after if "__init__" in vars(c)]  # type: ignore[misc]
    # A constructor with *args passes them on to the next.
    signature = next(s for s in signatures if all(p.kind is not p.VAR_POSITIONAL for p in s.parameters.values()))
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if len(args) > len(names):
        raise TypeError(f"{len(args)} positional arguments were given; at most {len(names)} are possible: {names}.")
    positional = dict(zip(names, args, strict=False))
    if repeated := sorted(positional.keys() & kwargs.keys()):
        raise TypeError(f"Given by position and by name: {', '.join(repeated)}.")
    return positional | kwargs


@contextmanager
def changed(args: Any, **values: Any) -> Iterator[None]:
    """
    Training arguments, or a trainer, with other values inside the context.

    The Trainer reads `average_tokens_across_devices` in methods that take no argument for it, and pickles the whole
    object, `hub_token` included, when it saves a model. There is no other way to change either.
    """
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
