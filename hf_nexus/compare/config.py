"""The configuration of a comparison: arms, seeds, tuning, minima searches, question sets, and the primary metric."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from ..files import nearest
from ..pretrain.kinds import check_sections, known_kinds
from ..pretrain.sections import SECTION_NAMES, load_config
from ..schema import documented
from ..strict import Bound, Count, Positive, Text, check, check_fields, load_yaml, read
from .analysis import Analysis, Test, Where, compare_arms
from .records import METRICS, ON_CURVE, RunRecord

__all__ = ["RESERVED", "ComparisonConfig", "DeclaredTest", "MinimaSearch", "QuestionSet", "Tuning"]

Seed = Annotated[int, Bound(least=0)]

# Training fields that the comparison sets for each run.
RESERVED = (
    "output_dir",
    "run_name",
    "seed",
    "data_seed",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
)
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@documented
@dataclass(frozen=True)
class DeclaredTest:
    """
    A comparison of two arms that is declared before any run.

    Args:
        arm (`str`):
            The arm that is compared.
        metric (`str`, *optional*, defaults to `"ood_loss"`):
            `train_loss`, `validation_loss`, `ood_loss`, `validation/<source>`, `ood/<source>`,
            `downstream/<question set>/<score>`, `gradient_cosine` or `minima_distance`.
        where (`str`, *optional*, defaults to `"end"`):
            Where the arms are compared: at the `"end"` of training, or at `"matched"` training loss (held-out losses
            only).
        versus (`str`, *optional*):
            The arm that it is compared with, in `family`; the baseline if unset.
    """

    arm: Text
    metric: Text = "ood_loss"
    where: Where = "end"
    versus: Text | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        kind, slash, name = self.metric.partition("/")
        if kind + slash not in METRICS or bool(slash) != bool(name):
            allowed = [kind + "<name>" * kind.endswith("/") for kind in METRICS]
            raise ValueError(f"metric: {self.metric!r} is not known; use one of {', '.join(allowed)}.")
        if self.where == "matched" and kind + slash not in ON_CURVE:
            raise ValueError(f"where: {self.metric!r} has no value at matched training loss. Use 'end'.")


@documented
@dataclass(frozen=True)
class Tuning:
    """
    A grid search on the validation loss that each arm makes before its runs, with the same number of trials.

    Args:
        grid (`dict[str, list]`):
            Values of training fields, of which all combinations are tried. An arm may have its own grid of as many.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds of each trial, different from those of the comparison.
        max_steps (`int`, *optional*):
            Outer steps of a trial; as many as a run if unset.
    """

    grid: dict[str, list[Any]]
    seeds: list[Seed] = field(default_factory=lambda: [0])
    max_steps: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_grid("grid", self.grid)
        _check_different("seeds", self.seeds)


@documented
@dataclass(frozen=True)
class MinimaSearch:
    """
    A search for each source's minimizer from the end of a run: AdamW on that source alone, until its held-out loss has
    not improved for `patience` evaluations.

    Args:
        sources (`list[str]`, *optional*):
            Training sources to search for; all if unset. The first three span the plane of the landscape plot.
        arms (`list[str]`, *optional*), seeds (`list[int]`, *optional*):
            Arms and seeds of the runs to search from; all if unset.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Constant learning rate.
        max_steps (`int`, *optional*, defaults to 200), eval_steps (`int`, *optional*, defaults to 10):
            Longest search, and steps between evaluations, in optimizer steps.
        patience (`int`, *optional*, defaults to 2):
            Evaluations without improvement that end a search.
        eval_rows (`int`, *optional*, defaults to 32):
            Held-out rows of each source on which all losses are measured.
        grid (`int`, *optional*, defaults to 9):
            Points on each segment, and on each side of the plane.
    """

    sources: list[Text] | None = None
    arms: list[Text] | None = None
    seeds: list[Seed] | None = None
    learning_rate: Positive = 1e-3
    max_steps: Count = 200
    eval_steps: Count = 10
    patience: Count = 2
    eval_rows: Count = 32
    grid: Annotated[int, Bound(least=3)] = 9

    def __post_init__(self) -> None:
        check_fields(self)
        for key in ("arms", "seeds"):
            if (values := getattr(self, key)) is not None:
                _check_different(key, values)
        if self.sources is not None:
            _check_different("sources", self.sources, least=2)


@documented
@dataclass(frozen=True)
class QuestionSet:
    """
    A file of questions and answers that each run is scored on at its end.

    Args:
        path (`str`):
            JSON lines with `question` and `answer`.
        prompt (`str`, *optional*):
            Text before the answer, by default `Question: {question}`, a line break and `Answer: `.
        max_rows (`int`, *optional*):
            Number of rows to use, from the first; all if unset.
        max_new_tokens (`int`, *optional*, defaults to 0):
            Longest generated answer, for the exact match; 0 measures only the loss of the given answers.
    """

    path: Text
    prompt: str = "Question: {question}\nAnswer: "
    max_rows: Count | None = None
    max_new_tokens: Annotated[int, Bound(least=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt: {self.prompt!r} does not contain {{question}}.")


@documented
@dataclass(frozen=True)
class ComparisonConfig:
    """
    Arms compared over seeds.

    Args:
        base (`str`):
            Pretraining configuration of all runs, by name or path.
        arms (`dict[str, dict]`):
            Training fields in which each arm differs, by name of the arm, and `tuning` for its own grid.
        baseline (`str`):
            The arm that the others are compared with.
        primary (`DeclaredTest`):
            The primary comparison, of an arm with the baseline. Its p-value needs no correction.
        seeds (`list[int]`):
            Seeds of the runs of each arm. A seed sets the initial weights and the order of the data.
        output_dir (`str`):
            Folder of all results. Finished runs in it are skipped.
        family (`list[DeclaredTest]`, *optional*):
            Further comparisons whose p-values are corrected together; all others are exploratory. If unset, the
            primary metric of the other arms against the baseline, and of the primary arm against each control.
        equivalence_margin (`float`, *optional*):
            Largest difference of the primary metric that does not matter. The report calls two arms equivalent only
            if a test shows that they differ by less.
        model (`dict`, *optional*), data (`dict`, *optional*), training (`dict`, *optional*):
            Fields of the base to change for all runs.
        tuning (`Tuning`, *optional*):
            Grid search for settings of each arm; no tuning if unset.
        minima (`MinimaSearch`, *optional*):
            Search for the minima near the end of each run; no search if unset.
        question_sets (`dict[str, QuestionSet]`, *optional*):
            Questions to score each run on.
        train_sample_rows (`int`, *optional*, defaults to 32):
            Rows of each training source on which the training loss is measured.
        workers (`int`, *optional*):
            Number of runs at a time; as many as there are devices for if unset, or cores without devices.
        devices_per_run (`int`, *optional*, defaults to 1):
            Devices of one run, with one process on each: under FSDP2 if the training fields of the base say so, else
            under DDP.
        benchmarks (`list[str]`, *optional*):
            Tasks of lm-eval to score each run on, as in `hf-nexus benchmark --tasks`.
        push_to (`str`, *optional*):
            Beginning of the repositories to push the runs to. With `org/study`, seed 2 of the arm `nexus` is pushed to
            `org/study-nexus-seed-2`. Nothing is pushed if unset.
        submitit (`dict`, *optional*):
            Start runs as jobs of a cluster: `timeout_min` and other parameters of `submitit.AutoExecutor`, such as
            `slurm_partition` and `nodes` (of one run). `cluster: local` starts all jobs on this machine at once.

    Raises:
        ValueError: an unknown key, a value that is not allowed, or values that contradict each other. The message
            starts with the key.

    Example:
        >>> from hf_nexus.compare.config import ComparisonConfig
        >>> ComparisonConfig.load("compare").baseline
        'adamw'
    """

    base: Text
    arms: dict[str, dict[str, Any] | None]
    baseline: Text
    primary: DeclaredTest
    seeds: list[Seed]
    output_dir: Text
    family: list[DeclaredTest] | None = None
    equivalence_margin: Positive | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    minima: MinimaSearch | None = None
    question_sets: dict[str, QuestionSet] = field(default_factory=dict)
    train_sample_rows: Count = 32
    workers: Count | None = None
    devices_per_run: Count = 1
    benchmarks: list[Text] = field(default_factory=list)
    push_to: Text | None = None
    submitit: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))  # as the Trainer does for each run
        _check_different("seeds", self.seeds)
        sections = {section: getattr(self, section) for section in SECTION_NAMES}
        check_sections(sections, known_kinds(), {**self._base.get("model", {}), **self.model})
        _check_training("training", self.training)
        self._check_arms()
        if self.tuning is not None and (both := sorted(set(self.tuning.seeds) & set(self.seeds))):
            raise ValueError(
                f"tuning.seeds: {both} are seeds of the comparison, too. Runs must not be judged on the seeds that "
                "their settings were chosen on. Choose other seeds."
            )
        if self.minima is not None:
            for key, known in (("arms", [*self.arms]), ("seeds", self.seeds)):
                if unknown := sorted({*(getattr(self.minima, key) or [])} - {*known}):
                    raise ValueError(f"minima.{key}: {unknown} are not among the {key} {known}.")

    def _check_arms(self) -> None:
        if len(self.arms) < 2:
            raise ValueError(f"arms: {self.arms!r} is not allowed; name two arms or more.")
        common = 0 if self.tuning is None else _trials(self.tuning.grid)
        for name in self.arms:
            if not _ARM_NAME.fullmatch(name):
                raise ValueError(f"arms.{name}: a name starts with a letter or digit; '_', '-' and '.' may follow.")
            _check_training(f"arms.{name}", self.settings(name))
            if (grid := self._own_grid(name)) is not None:
                _check_grid(f"arms.{name}.tuning", grid)
                if _trials(grid) != common:
                    raise ValueError(
                        f"arms.{name}.tuning: it has {_trials(grid)} trials, and the common grid has {common}. A fair "
                        "comparison gives every arm the same number."
                    )
            if both := sorted(self.settings(name).keys() & next(self.trials(name), {}).keys()):
                raise ValueError(
                    f"arms.{name}: {both} are also in its tuning grid, whose values would replace those of the arm. "
                    "Remove them from the arm, or give the arm its own `tuning` grid without them."
                )
        for key, arm in (("baseline", self.baseline), ("primary.arm", self.primary.arm)):
            if arm not in self.arms:
                raise ValueError(f"{key}: {arm!r} is not among the arms {', '.join(self.arms)}.")
        if self.primary.arm == self.baseline:
            raise ValueError(f"primary.arm: {self.baseline!r} is the baseline. Choose another arm.")
        if self.primary.versus not in (None, self.baseline):
            raise ValueError("primary.versus: the primary arm is compared with the baseline. Remove it.")
        primary, tests = self.test(self.primary), [self.test(declared) for declared in self.family or []]
        for i, test in enumerate(tests):
            if unknown := {test.arm, test.versus} - {*self.arms}:
                raise ValueError(f"family: {', '.join(unknown)} is not among the arms {', '.join(self.arms)}.")
            if test.arm == test.versus or test == primary or test in tests[:i]:
                raise ValueError(f"family: {test} is the primary comparison, a repetition, or of one arm. Remove it.")
            reverse = test._replace(arm=test.versus, versus=test.arm)
            if self.baseline == test.arm or self.primary.arm == test.versus or reverse in tests[:i]:
                raise ValueError(
                    f"family: {test} is in reverse. All arms are compared with the baseline, and the primary arm with "
                    f"the others. Write {{arm: {reverse.arm}, versus: {reverse.versus}}} once."
                )

    def test(self, declared: DeclaredTest) -> Test:
        """A declared comparison, as `compare_arms` takes it."""
        return Test(declared.arm, declared.versus or self.baseline, declared.metric, declared.where)

    def analyse(self, records: Sequence[RunRecord], family: list[Test] | None = None) -> Analysis:
        """The statistics of the runs, with the declared tests, or those of another `family`."""
        if family is None and self.family is not None:
            family = [self.test(declared) for declared in self.family]
        return compare_arms(
            records,
            self.test(self.primary),
            family=family,
            margin=self.equivalence_margin,
            arms={arm: self.run_config(self.settings(arm))["training"] for arm in self.arms},
            tuned={arm: {name for trial in self.trials(arm) for name in trial} for arm in self.arms},
            seeds=self.seeds,
        )

    def _own_grid(self, arm: str) -> dict[str, list[Any]] | None:
        return (self.arms[arm] or {}).get("tuning")

    def settings(self, arm: str) -> dict[str, Any]:
        """The training fields of an arm, without its grid."""
        return {key: value for key, value in (self.arms[arm] or {}).items() if key != "tuning"}

    def trials(self, arm: str) -> Iterator[dict[str, Any]]:
        """The training fields of each trial of an arm's tuning."""
        if self.tuning is not None:
            grid = self._own_grid(arm) or self.tuning.grid
            for values in itertools.product(*grid.values()):
                yield dict(zip(grid, values, strict=True))

    @cached_property
    def _base(self) -> dict[str, dict[str, Any]]:
        try:
            return load_config(self.base)
        except ValueError as error:
            raise ValueError(f"base: {error}") from error

    def run_config(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """
        The pretraining configuration of a run: the base without the fields in `RESERVED`, the changes for all runs,
        and training `settings`.
        """
        sections = {name: self._base.get(name, {}) | getattr(self, name) for name in SECTION_NAMES}
        # The base may describe one run: all would share its order of the data or its checkpoint, and hold its token.
        common = {key: value for key, value in sections["training"].items() if key not in RESERVED}
        return {**sections, "training": {**common, **settings}}

    @classmethod
    def load(cls, name_or_path: str, output_dir: str | None = None) -> "ComparisonConfig":
        """
        Read a comparison by name (`"compare"`) or path. `output_dir` replaces that of the file.

        Raises:
            ValueError: no such comparison, or an error in it.
        """
        given = load_yaml(name_or_path, "compare", "comparison")
        try:
            return read(cls, given if output_dir is None else {**given, "output_dir": output_dir})
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error


def _check_different(key: str, values: list[Any], least: int = 1) -> None:
    if len(values) < least or len(set(values)) < len(values):
        raise ValueError(f"{key}: {values!r} is not allowed; give {least} or more, each once.")


def _check_training(key: str, settings: Mapping[str, Any]) -> None:
    kinds = known_kinds()["training"]
    for name, value in settings.items():
        if name in RESERVED:
            raise ValueError(f"{key}.{name}: the comparison sets it for each run. Remove it.")
        if name not in kinds:
            raise ValueError(f"{key}.{name}: not a training field.{nearest(name, kinds)}")
        check(value, kinds[name], f"{key}.{name}")


def _check_grid(key: str, grid: Any) -> None:
    for name, values in check(grid, dict[str, list[Any]], key).items():
        for value in values:
            _check_training(key, {name: value})
    if not grid or not all(grid.values()):
        raise ValueError(f"{key}: {grid!r} is not allowed; give one training field or more, each with its values.")


def _trials(grid: Mapping[str, list[Any]]) -> int:
    return math.prod(map(len, grid.values()))
