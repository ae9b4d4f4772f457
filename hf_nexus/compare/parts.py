"""The parts of a comparison's configuration, each checked on its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from ..files import nearest
from ..pretrain.fields import PretrainConfig
from ..strict import Bound, Count, Positive, Text, check

__all__ = ["RESERVED", "MinimaSearch", "Primary", "Task", "Tuning", "check_grid", "check_seeds"]

FIGURES = ("train_loss", "validation_loss", "ood_loss", "gradient_cosine", "minima_distance")
_FIGURE_OF_ONE = ("validation/", "ood/", "downstream/")
# Decided by the comparison for each run, so that nobody may set them for an arm.
RESERVED = ("output_dir", "seed", "data_seed", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub")


@dataclass(frozen=True)
class Primary:
    """
    The endpoint that is declared before anything is run: its p-value alone needs no correction.

    Args:
        arm (`str`):
            Compared with the baseline.
        figure (`str`, *optional*, defaults to `"ood_loss"`):
            At the end of training: `train_loss`, `validation_loss`, `ood_loss`, `validation/<source>`,
            `ood/<source>`, `downstream/<task>/<score>`, `gradient_cosine` or `minima_distance`.
    """

    arm: str
    figure: str = "ood_loss"

    def __post_init__(self) -> None:
        check(self.arm, Text, "primary.arm")
        if self.figure not in FIGURES and not str(self.figure).startswith(_FIGURE_OF_ONE):
            raise ValueError(
                f"primary.figure: {self.figure!r} is not known. Use one of {', '.join(FIGURES)}, or "
                f"{', '.join(f'{prefix}<name>' for prefix in _FIGURE_OF_ONE)}."
            )


@dataclass(frozen=True)
class Tuning:
    """
    The search that every arm makes before its runs, each with as many trials, on the validation loss.

    Args:
        grid (`dict[str, list]`):
            Values of training fields; every combination is tried. An arm may bring a grid of its own, of as many
            combinations.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds of each trial; none of those of the comparison.
        max_steps (`int`, *optional*):
            Outer steps of a trial; those of a run if unset.
    """

    grid: dict[str, list[Any]]
    seeds: list[int] = field(default_factory=lambda: [0])
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_grid("tuning.grid", self.grid)
        check_seeds("tuning.seeds", self.seeds)
        check(self.max_steps, Count | None, "tuning.max_steps")


@dataclass(frozen=True)
class MinimaSearch:
    """
    The search for each source's minimizer: from the end of a run, plain AdamW on that source alone, until its held-out
    loss has not improved for `patience` evaluations, and at most `max_steps`.

    Args:
        sources (`list[str]`, *optional*):
            For which; all training sources if unset. The first three span the slice that is drawn.
        seeds (`list[int]`, *optional*):
            Of which runs; all if unset.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Constant.
        max_steps (`int`, *optional*, defaults to 200), eval_steps (`int`, *optional*, defaults to 10), patience
        (`int`, *optional*, defaults to 2):
            Of the search, in optimizer steps and evaluations.
        eval_rows (`int`, *optional*, defaults to 32):
            Held-out rows of each source on which all losses of the search are measured.
        grid (`int`, *optional*, defaults to 9):
            Points along each segment, and along each side of the slice.
    """

    sources: list[str] | None = None
    seeds: list[int] | None = None
    learning_rate: float = 1e-3
    max_steps: int = 200
    eval_steps: int = 10
    patience: int = 2
    eval_rows: int = 32
    grid: int = 9

    def __post_init__(self) -> None:
        check(self.learning_rate, Positive, "minima.learning_rate")
        for name in ("max_steps", "eval_steps", "patience", "eval_rows"):
            check(getattr(self, name), Count, f"minima.{name}")
        check(self.grid, Annotated[int, Bound(least=3)], "minima.grid")
        if self.seeds is not None:
            check_seeds("minima.seeds", self.seeds)
        if self.sources is not None and (not isinstance(self.sources, list) or len(set(self.sources)) < 2):
            raise ValueError(f"minima.sources: {self.sources!r} must be a list of two different sources or more.")


@dataclass(frozen=True)
class Task:
    """
    A file of questions and answers that each run is scored on at its end.

    Args:
        path (`str`):
            JSON lines with `question` and `answer`.
        prompt (`str`, *optional*, defaults to `"Question: {question}\\nAnswer: "`):
            What precedes the answer.
        max_rows (`int`, *optional*):
            The first so many rows.
        max_new_tokens (`int`, *optional*, defaults to 0):
            How long an answer may be that is generated and compared; 0 generates none, and only the loss of the given
            answer is measured.
    """

    path: str
    prompt: str = "Question: {question}\nAnswer: "
    max_rows: int | None = None
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        check(self.path, Text, "tasks.path")
        check(self.max_new_tokens, Annotated[int, Bound(least=0)], "tasks.max_new_tokens")
        check(self.max_rows, Count | None, "tasks.max_rows")
        if "{question}" not in self.prompt:
            raise ValueError(f"tasks.prompt: {self.prompt!r} does not contain {{question}}.")


def check_seeds(key: str, seeds: Any) -> None:
    """Raise `ValueError` unless `seeds` is a list of different whole numbers."""
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"{key}: {seeds!r} must be a list of different whole numbers.")
    for seed in seeds:
        check(seed, Annotated[int, Bound(least=0)], key)


def check_grid(key: str, grid: Any) -> None:
    """Raise `ValueError` unless `grid` maps training fields to lists of values."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"{key}: {grid!r} must be a mapping of training fields to lists of values.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}.{name}: {values!r} must be a list of values.")
        allowed = {f.name for f in fields(PretrainConfig)} - set(RESERVED)
        if name not in allowed:
            hint = "" if name in RESERVED else nearest(name, allowed)
            raise ValueError(f"{key}.{name}: not a training field that can be tuned.{hint}")
