"""What a comparison is told: arms, seeds, what each arm may tune, and the one figure that decides."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import nearest
from ..pretrain.fields import SECTIONS, PretrainConfig
from ..pretrain.parsing import check_section, load_config
from ..strict import Count, Text, check, known_keys, parse_yaml
from .parts import RESERVED, MinimaSearch, Primary, Task, Tuning, check_grid, check_seeds

__all__ = ["ComparisonConfig", "available_comparisons"]

_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ComparisonConfig:
    """
    Arms compared over seeds, checked on creation.

    Args:
        base (`str`):
            The pretraining configuration of all runs, by name or path.
        arms (`dict[str, dict]`):
            By name: the training fields in which an arm differs, and `tuning` for a grid of its own.
        baseline (`str`):
            The arm that the others are compared with.
        primary ([`Primary`]):
            The endpoint that decides.
        seeds (`list[int]`):
            Each arm is trained once with each; a seed sets the initial weights and the order of the data.
        output_dir (`str`):
            Where everything is kept; what it holds already is not run again.
        model, data, training (`dict`, *optional*):
            Fields of the base that are changed for all runs.
        tuning ([`Tuning`], *optional*), minima ([`MinimaSearch`], *optional*), tasks (`dict[str, Task]`, *optional*):
            Left out if unset.
        train_sample_rows (`int`, *optional*, defaults to 32):
            Rows of each training source on which the training loss is measured, the same for all runs.
        workers (`int`, *optional*):
            Runs at a time; one per device if unset, or per core without any.

    Raises:
        ValueError: an unknown key, or values that contradict each other. The message starts with the key.

    Example:
        >>> from hf_nexus.compare.config import ComparisonConfig
        >>> config = ComparisonConfig.load("compare")
        >>> config.baseline
        'adamw'
    """

    base: str
    arms: dict[str, dict[str, Any]]
    baseline: str
    primary: Primary
    seeds: list[int]
    output_dir: str
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    minima: MinimaSearch | None = None
    tasks: dict[str, Task] = field(default_factory=dict)
    train_sample_rows: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        check(self.base, Text, "base")
        check(self.output_dir, Text, "output_dir")
        check_seeds("seeds", self.seeds)
        check(self.train_sample_rows, Count, "train_sample_rows")
        check(self.workers, Count | None, "workers")
        for section in SECTIONS:
            check_section(section, getattr(self, section))
        if fixed := sorted(set(RESERVED) & set(self.training)):
            raise ValueError(f"training.{fixed[0]}: the comparison decides on it for each run. Leave it out.")
        self._check_arms()
        if self.tuning is not None and (both := sorted(set(self.tuning.seeds) & set(self.seeds))):
            raise ValueError(
                f"tuning.seeds: {both} are seeds of the comparison, too. What is chosen on a seed must not be "
                "judged on it: tune on others."
            )
        if self.minima is not None and (unknown := sorted(set(self.minima.seeds or []) - set(self.seeds))):
            raise ValueError(f"minima.seeds: {unknown} are not among the seeds {self.seeds}.")

    def _check_arms(self) -> None:
        if not isinstance(self.arms, Mapping) or len(self.arms) < 2:
            raise ValueError(f"arms: {self.arms!r} must be a mapping of two or more names to training fields.")
        allowed = {f.name for f in fields(PretrainConfig)} - set(RESERVED)
        common = None if self.tuning is None else math.prod(map(len, self.tuning.grid.values()))
        for name, settings in self.arms.items():
            if not _ARM_NAME.fullmatch(str(name)):
                raise ValueError(f"arms.{name}: a name holds letters, digits, '_', '-' and '.' only.")
            if not isinstance(settings, Mapping | None) or not isinstance((settings or {}).get("tuning", {}), Mapping):
                raise ValueError(f"arms.{name}: {settings!r} must be a mapping of training fields (and `tuning`).")
            grid = (settings or {}).get("tuning", {})
            for key in {**(settings or {}), **grid}:
                if key not in allowed | {"tuning"}:
                    hint = "" if key in RESERVED else nearest(key, allowed)
                    raise ValueError(f"arms.{name}.{key}: not a training field that an arm may set.{hint}")
            if grid:
                check_grid(f"arms.{name}.tuning", grid)
                if math.prod(map(len, grid.values())) != common:
                    raise ValueError(
                        f"arms.{name}.tuning: it has {math.prod(map(len, grid.values()))} trials, and the common grid "
                        f"{common or 'none'}. Give every arm as many, or the comparison is not fair."
                    )
        for key, arm in (("baseline", self.baseline), ("primary.arm", self.primary.arm)):
            if arm not in self.arms:
                raise ValueError(f"{key}: {arm!r} is not among the arms {', '.join(self.arms)}.")
        if self.primary.arm == self.baseline:
            raise ValueError(f"primary.arm: {self.baseline!r} is the baseline itself. Name the arm of interest.")

    def settings(self, arm: str) -> dict[str, Any]:
        """The training fields of an arm, without its grid."""
        return {key: value for key, value in (self.arms[arm] or {}).items() if key != "tuning"}

    def trials(self, arm: str) -> Iterator[dict[str, Any]]:
        """The training fields of each trial of an arm's tuning."""
        if self.tuning is not None:
            grid = (self.arms[arm] or {}).get("tuning") or self.tuning.grid
            for values in itertools.product(*grid.values()):
                yield dict(zip(grid, values, strict=True))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ComparisonConfig":
        """Build from plain data, such as a parsed YAML."""
        given = known_keys(mapping, cls, "")
        if given["primary"] is None:
            raise ValueError("primary: missing; declare the arm and the figure that decide.")
        if not isinstance(given.get("tasks") or {}, Mapping):
            raise ValueError(f"tasks: {given['tasks']!r} must be a mapping of names to tasks.")
        parts = {"primary": Primary, "tuning": Tuning, "minima": MinimaSearch}
        for key, part in parts.items():
            if given.get(key) is not None:
                given[key] = part(**known_keys(given[key], part, key))
        tasks = given.get("tasks") or {}
        given["tasks"] = {name: Task(**known_keys(task, Task, f"tasks.{name}")) for name, task in tasks.items()}
        return cls(**given)

    @classmethod
    def load(cls, name_or_path: str, output_dir: str | None = None) -> "ComparisonConfig":
        """
        Read by name (`"compare"`) or path.

        Args:
            name_or_path (`str`):
                Of a comparison that comes with the package, or of a YAML file.
            output_dir (`str`, *optional*):
                In place of the one that the file names.

        Raises:
            ValueError: no such comparison, or anything wrong in it.
        """
        names = available_comparisons()
        if name_or_path in names:
            text = _folder().joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
        elif Path(name_or_path).is_file():
            text = Path(name_or_path).read_text(encoding="utf-8")
        else:
            raise ValueError(
                f"There is no comparison {name_or_path!r}.{nearest(name_or_path, names)} "
                f"Use {', '.join(names)}, or the path of a YAML."
            )
        given = parse_yaml(text, name_or_path)
        try:
            return cls.from_dict(given if output_dir is None else {**given, "output_dir": output_dir})
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error

    def run_config(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The pretraining configuration of a run: the base, what all runs change, and `settings` for training."""
        base = load_config(self.base)
        sections = {name: base.get(name, {}) | getattr(self, name) for name in SECTIONS}
        sections["training"] |= settings
        return sections


def available_comparisons() -> list[str]:
    """Names of the comparisons that come with the package."""
    return sorted(Path(file.name).stem for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("hf_nexus").joinpath("compare", "configs")
