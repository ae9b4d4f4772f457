"""A comparison from its configuration to its report: tuning, runs, minima. What is done already is not done again."""

import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from ..mixture.loading import load_mixture
from ..pretrain.run import load_tokenizer
from .checks import check_settings, keep_declared
from .config import ComparisonConfig
from .minima import search_minima
from .outcome import write_outcome
from .pool import Job, Outcome, run_jobs, worker_count
from .records import RunRecord
from .runs import Run, read_rows, train_sample

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Comparison", "compare"]

_TUNING_NAME = "tuning.json"


@dataclass
class _Trial:
    """A combination of a grid, and what it came to."""

    arm: str
    settings: dict[str, Any]
    losses: list[float]  # validation loss at the end, per seed of the tuning

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses) if all(map(math.isfinite, self.losses)) else math.inf


class Comparison:
    """
    The state of a comparison in its folder.

    Args:
        config ([`ComparisonConfig`]):
            What to compare.
        console (`rich.console.Console`):
            For a line per run.
    """

    def __init__(self, config: ComparisonConfig, console: "Console"):
        self.config, self.console = config, console
        self.folder = Path(config.output_dir)
        self.workers = worker_count(config.workers)
        self.failed: list[Outcome] = []
        self.trials: list[_Trial] = []
        self.chosen: dict[str, dict[str, Any]] = {arm: {} for arm in config.arms}

    # ---- What there is to do ----

    def check(self) -> None:
        """
        Find what is wrong before anything runs: every configuration is read, and the data loaded and cached.

        Raises:
            ValueError: a mistake in the configuration, a folder that holds other runs, or several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("A comparison is one process, which spreads its runs over the devices: start it alone.")
        arguments = check_settings(self.config, self.folder)
        for task in self.config.tasks.values():
            read_rows(task)
        tokenizer = load_tokenizer(arguments, None)
        if Path(self._tokenizer).exists():
            if AutoTokenizer.from_pretrained(self._tokenizer).get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{self._tokenizer} is another tokenizer than the configuration's: its runs differ.")
        else:
            tokenizer.save_pretrained(self._tokenizer)
        mixture = load_mixture(arguments.mixture, tokenizer)
        train_sample(mixture, self.config.train_sample_rows)
        names = list(mixture.train)
        searched = set(self.config.minima.sources or names) if self.config.minima is not None else set()
        if lost := searched - set(names):
            raise ValueError(f"minima.sources: {sorted(lost)} are not among the training sources {', '.join(names)}.")
        if lost := searched - set(mixture.eval):
            raise ValueError(f"minima.sources: {sorted(lost)} have no held-out rows. Give them eval_rows.")
        keep_declared(self.config, self.folder)
        for run in self._trial_runs() or self.runs():
            run.record()
        for run in self.runs():
            run.refuse_other_minima()

    @property
    def _tokenizer(self) -> str:
        return str(self.folder / "tokenizer")

    def _trial_runs(self) -> list[Run]:
        if self.config.tuning is None:
            return []
        tuning, steps = self.config.tuning, {}
        if tuning.max_steps is not None:
            steps = {"max_steps": tuning.max_steps}
        runs = []
        for arm in self.config.arms:
            for number, trial in enumerate(self.config.trials(arm)):
                for seed in tuning.seeds:
                    folder = self.folder / "tuning" / arm / f"trial-{number}" / f"seed-{seed}"
                    settings = {**self.config.settings(arm), **trial, **steps}
                    runs.append(Run(self.config, arm, seed, settings, folder, self._tokenizer, trial=True))
        return runs

    def runs(self) -> list[Run]:
        """The runs of the comparison, seed by seed, so that whatever is there is balanced over the arms."""
        return [
            Run(
                self.config,
                arm,
                seed,
                {**self.config.settings(arm), **self.chosen[arm]},
                self.folder / "arms" / arm / f"seed-{seed}",
                self._tokenizer,
            )
            for seed in self.config.seeds
            for arm in self.config.arms
        ]

    # ---- The stages ----

    def tune(self) -> None:
        """Choose for every arm the combination of its grid whose validation loss is lowest."""
        runs = self._trial_runs()
        if not runs:
            return
        self._execute("tuning", [Job(str(run), run.execute, _log(run)) for run in runs if run.record() is None])
        for arm in self.config.arms:
            for number, settings in enumerate(self.config.trials(arm)):
                own = [run for run in runs if run.arm == arm and run.folder.parent.name == f"trial-{number}"]
                records = [run.record() for run in own]
                losses = [math.inf if record is None else record.end.validation_loss for record in records]
                self.trials.append(_Trial(arm, settings, losses))
            best = min((trial for trial in self.trials if trial.arm == arm), key=lambda trial: trial.mean)
            if best.mean == math.inf:
                raise SystemExit(f"No trial of {arm} came to an end; see {self.folder / 'tuning' / arm}.")
            self.chosen[arm] = best.settings
        (self.folder / _TUNING_NAME).write_text(json.dumps(self.tuning_table(), indent=1) + "\n", encoding="utf-8")

    def tuning_table(self) -> list[dict[str, Any]]:
        """Each trial: its arm, settings, mean validation loss, and whether it was chosen."""
        return [
            {
                "arm": trial.arm,
                **trial.settings,
                "validation_loss": trial.mean if math.isfinite(trial.mean) else None,
                "chosen": trial.settings == self.chosen[trial.arm],
            }
            for trial in self.trials
        ]

    def run(self) -> None:
        """Train every arm under every seed."""
        self._execute("runs", [Job(str(run), run.execute, _log(run)) for run in self.runs() if run.record() is None])

    def search(self) -> None:
        """Search the minima of the runs for which the configuration asks."""
        wanted = self.config.minima
        if wanted is None:
            return
        jobs = []
        for run in self.runs():
            record = run.record()
            if record is not None and record.minima is None and run.seed in (wanted.seeds or self.config.seeds):
                jobs.append(Job(f"minima of {run}", partial(search_minima, run), _log(run)))
        self._execute("minima", jobs)

    def report(self, seconds: float) -> Path:
        """Write tables, pictures and words into the folder, and print the main table."""
        trials = self.tuning_table()
        return write_outcome(self.config, self.runs(), trials, self.workers, seconds, self.console)

    def _execute(self, what: str, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        self.console.print(f"[bold]{what}: {len(jobs)} to do, {min(self.workers, len(jobs))} at a time[/bold]")
        for number, outcome in enumerate(run_jobs(jobs, self.workers), 1):
            words = _in_words(outcome.result) if outcome.error is None else f"FAILED: {outcome.error}"
            self.console.print(f"  {number}/{len(jobs)}  {outcome.job.name}: {words}", highlight=False)
            if outcome.error is not None:
                self.failed.append(outcome)
                self.console.print(f"    its output is in {outcome.job.log}", highlight=False)


def compare(comparison: Comparison) -> Path:
    """
    Do everything that is missing, and write the report.

    Returns:
        `Path`: `report.md`.
    """
    began = time.monotonic()
    comparison.tune()
    comparison.run()
    comparison.search()
    return comparison.report(time.monotonic() - began)


def _log(run: Run) -> Path:
    return run.folder / "log.txt"


def _in_words(record: RunRecord) -> str:
    end = record.end
    if record.minima is not None:
        found = record.minima
        reached = sum(found.converged.values())
        return f"distance {found.mean_distance:.4g}, {reached} of {len(found.converged)} searches converged"
    ood = "" if end.ood_loss is None else f", OOD {end.ood_loss:.4f}"
    return f"validation {end.validation_loss:.4f}{ood} ({record.seconds:.0f} s)"
