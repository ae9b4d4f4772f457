"""Arguments of constructors, and training arguments, for any base class of a trainer."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from .config import NexusConfigMixin

__all__ = ["adopt", "arguments_by_name", "changed", "own_arguments", "samples_sources"]


def own_arguments(args: Any, converted: bool = False) -> Any:
    """
    The arguments of a trainer, which it may change: a copy with the Nexus fields, which have their defaults if they
    were missing. With `nexus=False` nothing changes, and the given object is kept unless the base class converts it.
    """
    if isinstance(args, NexusConfigMixin) and not args.nexus and not converted:
        return args
    own: Any = TrainingArguments(output_dir="tmp_trainer") if args is None else copy.copy(args)
    if not isinstance(own, NexusConfigMixin):
        for f in fields(NexusConfigMixin):
            setattr(own, f.name, f.default)
    # The Trainer writes into its `gradient_accumulation_kwargs`.
    own.accelerator_config = copy.deepcopy(own.accelerator_config)
    return own


def adopt(own: Any, args: TrainingArguments) -> None:
    """Give `own` the class and the values of the arguments that a base class has made. Their Nexus fields stay."""
    if own is not args:
        own.__class__ = type(args)
        vars(own).update(vars(args))


def _parameters(cls: type, mixin: type) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor of the class after the mixin. One with *args passes them on to the next class."""
    found: dict[str, inspect.Parameter] = {}
    for c in cls.__mro__[cls.__mro__.index(mixin) + 1 :]:
        if "__init__" in vars(c):
            own = list(inspect.signature(c.__init__).parameters.values())[1:]  # type: ignore[misc]
            found |= {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            if all(p.kind is not p.VAR_POSITIONAL for p in own):
                break
    return found


def samples_sources(cls: type, mixin: type) -> bool:
    """Whether the class after the mixin takes a dict of training sets itself, as in sentence-transformers."""
    train_dataset = _parameters(cls, mixin).get("train_dataset")
    return train_dataset is not None and "dict" in str(train_dataset.annotation).lower()


def arguments_by_name(cls: type, mixin: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of a constructor by name. The names are those of the class after the mixin.

    Raises:
        TypeError: too many arguments, or one that is given twice.
    """
    names = [p.name for p in _parameters(cls, mixin).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
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

    The Trainer reads attributes in methods that take no argument for them (`average_tokens_across_devices`, for
    example), and pickles the whole object, `hub_token` included, when it saves a model. There is no other way.
    """
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
