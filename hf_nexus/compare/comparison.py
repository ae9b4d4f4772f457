"""A whole comparison: checks, tuning, runs, minima searches, and the report. Finished runs are skipped."""

import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..evaluation.statistics import import_scipy
from ..files import nearest, write_atomic
from ..hub.card import save_card
from ..hub.facts import describe_hardware, installed_versions
from ..hub.publisher import FinalFlush, Publisher
from ..hub.run_summary import SUMMARY_NAME, RunSummary
from ..mixture.loading import load_mixture
from ..mixture.stream.lanes import Lanes
from ..pretrain.advice import ENDS_EARLY, stable_steps
from ..pretrain.command_line import from_sections
from ..pretrain.fields import PretrainArguments, PretrainConfig
from ..pretrain.parsing import resolve
from ..pretrain.run import load_tokenizer
from ..terminal import is_live
from .analysis import Test
from .benchmarks import check_benchmarks, comparable, missing_tasks, score_benchmarks
from .config import ComparisonConfig
from .minima import search_minima
from .plots import plot_comparison
from .records import METRICS, RunRecord, finished_runs, in_order
from .report import console_table, write_report
from .runs import MINIMA_NAME, Run, read_questions
from .workers import Call, CallResult, call_in_workers, worker_count

if TYPE_CHECKING:
    from rich.console import Console

    from ..mixture.loading import Mixture

__all__ = ["Comparison"]

_TUNING_NAME, _DECLARED_NAME = "tuning.json", "declared.json"


@dataclass
class _Trial:
    arm: str
    settings: dict[str, Any]
    runs: list[Run]  # one for each seed of the tuning
    loss: float = math.inf  # mean validation loss at the end


class Comparison:
    """A comparison in its folder."""

    def __init__(self, config: ComparisonConfig, console: "Console"):
        self.config, self.console = config, console
        self.folder = Path(config.output_dir)
        self.failed: list[CallResult] = []  # runs, minima searches and benchmarks
        self._jobs = config.submitit
        self._tokenizer = str(self.folder / "tokenizer")
        self._trials = self._plan_trials()
        self._chosen: dict[str, dict[str, Any]] = {arm: {} for arm in config.arms}

    def check(self) -> None:
        """
        Find errors before anything runs: read all configurations, load and cache the data, and look into the folder.

        Raises:
            ValueError: an error in the configuration, a folder with other runs, several processes, or too few
                devices.
            ImportError: scipy is not installed, or a package that the configuration needs.
        """
        import_scipy()  # is installed
        check_benchmarks(self.config)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("A comparison starts its own processes, one per device. Start it as one process.")
        of_arms = self._check_settings()
        here = torch.accelerator.device_count()
        if self._jobs is not None:
            self._executor(self.config.devices_per_run)
        elif self.config.devices_per_run > max(1, here) and self._accelerated:
            raise ValueError(
                f"devices_per_run: {self.config.devices_per_run}, but this machine has {here} devices. Lower it, or "
                "set training.use_cpu for processes without devices."
            )
        for questions in self.config.question_sets.values():
            read_questions(questions)
        tokenizer = load_tokenizer(of_arms[0], None)
        self._keep_tokenizer(tokenizer)
        mixture = load_mixture(of_arms[0].mixture, tokenizer)
        if self.config.minima is not None:
            names = list(mixture.train)
            searched = set(self.config.minima.sources or names)
            if unknown := sorted(searched - set(names)):
                raise ValueError(f"minima.sources: {unknown} are not among the training sources {', '.join(names)}.")
            if lacking := sorted(searched - set(mixture.eval)):
                raise ValueError(f"minima.sources: {lacking} have no held-out rows. Give them eval_rows.")
        self._check_measured(mixture, sharded=any(arguments.training.fsdp for arguments in of_arms))
        self._declare()
        for run in self._trial_runs() or self.runs():
            run.check()
        for run in self.runs():
            run.check([MINIMA_NAME])

    def _keep_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the tokenizer of all runs, which other machines may do at the same time, or compare it."""
        if not Path(self._tokenizer).exists():
            scratch = f"{self._tokenizer}-{uuid4().hex}"
            tokenizer.save_pretrained(scratch)
            try:
                os.rename(scratch, self._tokenizer)
            except OSError:  # another machine was faster
                shutil.rmtree(scratch)
        kept = AutoTokenizer.from_pretrained(self._tokenizer, trust_remote_code=False)
        if kept.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{self._tokenizer} differs from the configuration's tokenizer. Choose another output_dir, or restore "
                "the tokenizer."
            )

    def _check_settings(self) -> list[PretrainArguments]:
        """Parse the configuration of every arm and trial, and return one of each arm: all have one model and data."""
        rows: dict[str, str] = {}
        lanes: dict[Lanes, str] = {}  # into which streams are cut, and an arm
        devices = self.config.devices_per_run
        of_arms, early = [], list[str]()
        for arm in self.config.arms:
            for trial in list(self.config.trials(arm)) or [{}]:
                settings = {**self.config.settings(arm), **trial, "output_dir": str(self.folder)}
                where = f"arms.{arm}" + f" with {trial}" * bool(trial)
                on_others = self._jobs is not None  # jobs run on other machines than this one
                arguments = resolve(from_sections(where, self.config.run_config(settings), on_others))
                _check_supported(where, arguments.training, devices)
                t = arguments.training
                if t.max_steps > 0 and (stable_steps(t, t.max_steps) or 0) < 0:
                    early.append(where)
                batch = t.per_device_train_batch_size * t.gradient_accumulation_steps
                length = f"{t.max_steps * batch:,}" if t.max_steps > 0 else f"those of {t.num_train_epochs:g} epochs"
                rows[f"{arm} {trial or ''}".strip()] = length
                workers = max(1, t.dataloader_num_workers)
                lanes.setdefault(Lanes.of_run(t.per_device_train_batch_size * devices, devices, workers), where)
            of_arms.append(arguments)
        if len(set(rows.values())) > 1:
            raise ValueError(f"arms: all must train on the same number of rows, not {rows}.")
        if len(lanes) > 1 and any(source.streaming for source in arguments.mixture.sources.values()):
            raise ValueError(
                f"arms: {' and '.join(lanes.values())} would train on other rows of streaming sources. Give all the "
                "same per_device_train_batch_size and dataloader_num_workers, or batches that 8 divides and numbers "
                "that divide 8."
            )
        if early:
            self.console.print(f"{early[0]}: {ENDS_EARLY}", style="yellow", soft_wrap=True)
        return of_arms

    def _check_measured(self, mixture: "Mixture", sharded: bool) -> None:
        """Check that the runs will have the declared metrics."""
        names, config = list(mixture.train), self.config
        if not mixture.eval.keys() & names:
            raise ValueError("data: no training source has held-out rows. Give eval_rows.")
        exists = {metric: True for metric in METRICS if not metric.endswith("/")} | {
            "ood_loss": bool(mixture.eval.keys() - names),
            "gradient_cosine": len(names) > 1 and not sharded,
            "minima_distance": len(names) > 1 and config.minima is not None,
        }
        exists |= {f"{'validation' if name in names else 'ood'}/{name}": True for name in mixture.eval}
        for name, questions in config.question_sets.items():
            exists[f"downstream/{name}/answer_loss"] = True
            exists[f"downstream/{name}/exact_match"] = questions.max_new_tokens > 0
        measured = {metric for metric, found in exists.items() if found}
        declared = [config.primary.metric, *(test.metric for test in config.family or [])]
        if config.benchmarks:  # only lm-eval knows the names of their scores
            declared = [metric for metric in declared if not metric.startswith("downstream/")]
        if unknown := sorted(set(declared) - measured):
            known = ", ".join(in_order(measured))
            raise ValueError(f"metric: {', '.join(map(repr, unknown))} is not measured. Use one of {known}.")

    def _declaration(self) -> dict[str, Any]:
        """The primary comparison, the tests of the family, arms and seeds, as plain data."""
        planned = self.config.analyse([])
        return {
            "primary": str(planned.primary),
            "equivalence_margin": planned.margin,
            "tests": planned.family,
            "arms": list(self.config.arms),
            "seeds": self.config.seeds,
        }

    def _declare(self) -> None:
        """Keep the declaration in the folder. It may change until a run has finished: no results have been seen."""
        if not finished_runs(self.folder):
            write_atomic(self.folder / _DECLARED_NAME, json.dumps(self._declaration()) + "\n")
        self._declared()

    def _declared(self) -> dict[str, Any]:
        """
        Read what was declared before the first run finished. Another primary comparison is refused, and another
        family, except for tests of arms that were added.
        """
        path, now = self.folder / _DECLARED_NAME, self._declaration()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before = {key: content[key] for key in now} | {"tests": [Test(*test) for test in content["tests"]]}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path}: it does not say what was declared before the runs. Restore it, or choose another output_dir."
            ) from error
        old = [t for t in before["tests"] if t not in now["tests"]]
        new = [t for t in now["tests"] if t not in before["tests"] and {*t[:2]} <= {*before["arms"]}]
        gone = [arm for arm in before["arms"] if arm not in now["arms"] and any(arm in t[:2] for t in old)]
        other = [key for key in ("primary", "equivalence_margin") if before[key] != now[key]]
        # The family follows from arms and primary comparison: only the cause is named.
        wrong = [f"arms: {arm} is missing" for arm in gone]
        wrong = wrong or [f"{key}: {before[key]} was declared" for key in other]
        wrong = wrong or [f"family: {t} is {how}" for ts, how in ((old, "missing"), (new, "new")) for t in ts]
        if wrong:
            raise ValueError(
                f"{'; '.join(wrong)}. {self.folder} has finished runs, and comparisons chosen after seeing results "
                "prove nothing. Restore what was declared, or choose another output_dir."
            )
        return before

    def _plan_trials(self) -> list[_Trial]:
        tuning, trials = self.config.tuning, []
        steps = {} if tuning is None or tuning.max_steps is None else {"max_steps": tuning.max_steps}
        for arm in self.config.arms:
            for number, chosen in enumerate(self.config.trials(arm)):
                assert tuning is not None
                folder = self.folder / "tuning" / arm / f"trial-{number}"
                settings = {**self.config.settings(arm), **chosen, **steps}
                runs = [
                    Run(self.config, arm, seed, settings, folder / f"seed-{seed}", self._tokenizer, trial=True)
                    for seed in tuning.seeds
                ]
                trials.append(_Trial(arm, chosen, runs))
        return trials

    def _trial_runs(self) -> list[Run]:
        return [run for trial in self._trials for run in trial.runs]

    def runs(self) -> list[Run]:
        """The runs of all arms, seed by seed. An interrupted comparison then has as many runs of each arm."""
        return [
            Run(
                self.config,
                arm,
                seed,
                {**self.config.settings(arm), **self._chosen[arm]},
                self.folder / "arms" / arm / f"seed-{seed}",
                self._tokenizer,
            )
            for seed in self.config.seeds
            for arm in self.config.arms
        ]

    def run(self) -> Path:
        """Run everything that has not finished yet, and write the report. Returns the path of `report.md`."""
        started = time.monotonic()
        self._train("tuning", self._trial_runs())
        self._choose()
        self._train("runs", self.runs())
        self._measure(self.runs())
        return self._report(time.monotonic() - started)

    def run_one(self, name: str) -> None:
        """
        Make one run, or one trial of the tuning, unless it has finished. Other machines that share the folder may make
        others at the same time.

        Raises:
            ValueError: there is no such run, or the tuning of its settings has not finished.
        """
        self._jobs = None
        trials, names = {run.name: run for run in self._trial_runs()}, [run.name for run in self.runs()]
        if name not in (*trials, *names):
            raise ValueError(f"--run: {name!r} is not a run.{nearest(name, [*trials, *names])}")
        if name in trials:
            self._train("run", [trials[name]])
            return
        self._choose()
        runs = [run for run in self.runs() if run.name == name]
        self._train("run", runs)
        self._measure(runs)

    def report(self) -> Path:
        """
        Write the report on the runs that have finished.

        Raises:
            ValueError: no run or not the tuning has finished, or the folder holds runs with other settings.
        """
        import_scipy()  # is installed
        if not finished_runs(self.folder):
            raise ValueError(f"--report: no run has finished in {self.folder}. Check output_dir, or run it first.")
        self._choose()
        return self._report()

    def _choose(self) -> None:
        """
        Choose the trial with the lowest validation loss for each arm, once all have been tried: an arm whose trial
        failed would have fewer. Check that the folder holds no runs with other settings.
        """
        for run in self._trial_runs():
            run.check()
        if missing := [run.name for run in self._trial_runs() if run.load() is None]:
            raise ValueError(
                f"tuning: {len(missing)} runs are missing, the first is {missing[0]!r}. Run them first. The folder of "
                "one that failed has its log."
            )
        for trial in self._trials:
            losses = [record.end.validation_loss for run in trial.runs if (record := run.load()) is not None]
            trial.loss = statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf
        for arm in self.config.arms if self._trials else ():
            best = min((trial for trial in self._trials if trial.arm == arm), key=lambda trial: trial.loss)
            if best.loss == math.inf:
                raise SystemExit(f"All trials of {arm} diverged; see {self.folder / 'tuning' / arm}.")
            self._chosen[arm] = best.settings
        for run in self.runs():
            run.check()

    def _tuning_table(self) -> list[dict[str, Any]]:
        return [
            {
                "arm": trial.arm,
                **trial.settings,
                "seeds": len(trial.runs),
                "validation_loss": trial.loss if math.isfinite(trial.loss) else None,
                "chosen": trial.settings == self._chosen[trial.arm],
            }
            for trial in self._trials
        ]

    def _train(self, stage: str, runs: Sequence[Run]) -> None:
        missing = [run for run in runs if run.load() is None]
        for run in missing:
            run.write()
        calls = [Call(str(run), run.train, _log(run), self.config.devices_per_run) for run in missing]
        self._call(stage, calls, done=len(runs) - len(missing))

    def _measure(self, runs: Sequence[Run]) -> None:
        """Search the minima near the ends of runs, and score the runs on the benchmarks."""
        finished = [(run, record) for run in runs if (record := run.load()) is not None]
        wanted = self.config.minima
        seeds = () if wanted is None else wanted.seeds or self.config.seeds
        arms = () if wanted is None else wanted.arms or self.config.arms
        searched = [(run, record) for run, record in finished if run.seed in seeds and run.arm in arms]
        missing = [run for run, record in searched if record.minima is None]
        searches = [Call(f"minima of {run}", partial(search_minima, run), _log(run)) for run in missing]
        self._call("minima", searches, done=len(searched) - len(missing))
        missing = [run for run, record in finished if missing_tasks(self.config, record)]
        scores = [Call(f"benchmarks of {run}", partial(score_benchmarks, run), _log(run)) for run in missing]
        self._call("benchmarks", scores, done=len(finished) - len(missing))

    def _call(self, stage: str, calls: Sequence[Call], done: int) -> None:
        """Make the calls that are missing of a stage, with a bar on a terminal."""
        if not calls:
            return
        total = done + len(calls)
        workers = min(worker_count(self.config.workers, calls[0].devices), len(calls))
        how = f"{workers} at a time" if self._jobs is None else "as jobs"
        status = f"{stage}: {done} of {total} done, {len(calls)} to do, {how}"
        self.console.print(status, style="bold", highlight=False)
        if self._jobs is None:
            results = call_in_workers(calls, workers)
        else:
            from .cluster import call_in_jobs

            results = call_in_jobs(calls, self._executor(calls[0].devices))
        with Progress(console=self.console, transient=True, disable=not is_live(self.console)) as progress:
            bar = progress.add_task(stage, total=total, completed=done)
            for number, result in enumerate(results, done + 1):
                text = f"FAILED: {result.error}" if result.error else _result(result.value, stage)
                self.console.print(f"  {number}/{total}  {result.call.name}: {text}", highlight=False)
                progress.update(bar, completed=number, description=f"{stage}: {number} of {total} done")
                if result.error is not None:
                    self.failed.append(result)
                    self.console.print(f"    log: {result.call.log}", highlight=False)

    @property
    def _accelerated(self) -> bool:
        return not self.config.run_config({})["training"].get("use_cpu", False)

    def _executor(self, devices: int) -> Any:
        try:
            from .cluster import make_executor
        except ImportError as error:
            raise ImportError("submitit: it is not installed: pip install submitit") from error
        return make_executor(self.folder / "jobs", self._jobs or {}, devices, self._accelerated)

    def _report(self, seconds: float | None = None) -> Path:
        """Write report and plots, print the main table, and put the baseline's losses on the card of each run."""
        arms = list(self.config.arms)
        runs = self.runs()
        records = [comparable(self.config, record) for run in runs if (record := run.load()) is not None]
        declared = self._declared()
        analysis = self.config.analyse(records, declared["tests"])
        named = {run.folder for run in runs}
        ignored = [
            f"{folder.parent.name}/{folder.name}" for folder in finished_runs(self.folder) if folder not in named
        ]
        analysis = replace(analysis, declared=(declared["arms"], declared["seeds"]), ignored=ignored)
        if self._trials:
            write_atomic(self.folder / _TUNING_NAME, json.dumps(self._tuning_table(), indent=1) + "\n")
        path = write_report(
            analysis,
            records,
            self.folder,
            title=f"Comparison: {', '.join(arms)}",
            details=self._details(records, seconds),
            trials=self._tuning_table(),
            plots=self._plot(records),
        )
        self.console.print(console_table(analysis, self.console.width))
        self.console.print(f"Report: {path}")
        self._update_cards()
        return path

    def _plot(self, records: Sequence[RunRecord]) -> list[Path]:
        try:
            return plot_comparison(records, self.folder, baseline=self.config.baseline) if records else []
        except Exception as error:  # the report does not depend on its plots
            self.console.print(f"Plots failed: {type(error).__name__}: {error}")
            return []

    def _details(self, records: Sequence[RunRecord], seconds: float | None) -> dict[str, Any]:
        details: dict[str, Any] = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": describe_hardware(),
            "devices per run": self.config.devices_per_run,
            "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
        }
        if seconds is not None:
            details["minutes of this command"] = f"{seconds / 60:.1f}"
        if records:
            details["tokens per run"] = f"{records[0].end.tokens:,}"
            details["minutes of training in all runs"] = f"{sum(record.seconds for record in records) / 60:.1f}"
        return details

    def _update_cards(self) -> None:
        """Compare the card of each run with that of the arm that it is declared to be compared with, and push it."""
        summarized = [run for run in self.runs() if (run.folder / SUMMARY_NAME).exists()]
        records = [(run, run.load()) for run in summarized]
        finished = {(run.arm, run.seed): run for run, record in records if record and not record.diverged}
        others = dict.fromkeys(self.config.arms, self.config.baseline)
        others |= {test.arm: test.versus for test in reversed(self.config.family or []) if test.versus is not None}
        for (arm, seed), run in finished.items():
            other = finished.get((others[arm], seed))
            before = RunSummary.load(run.folder)
            summary = before
            if arm != others[arm] and other is not None:
                try:
                    summary = before.against(RunSummary.load(other.folder), others[arm])
                    summary = replace(summary, model_name=f"{arm}, seed {seed}")
                    save_card(summary, run.folder)
                    summary.save(run.folder)
                except ValueError as error:
                    self.console.print(f"The card of {run} is not compared: {error}")
            if run.repo_id is not None:
                self._push(run, changed=summary != before)

    def _push(self, run: Run, changed: bool) -> None:
        """Push a finished run, unless it is on the Hub as it is."""
        training = self.config.run_config({})["training"]
        target = {"private": training.get("hub_private_repo"), "revision": training.get("hub_revision")}
        publisher = Publisher(str(run.repo_id), run.folder, **target)
        if changed or not publisher.status().commit:
            record = run.load()
            assert record is not None
            publisher.check()
            publisher.submit(record.end.step, "Compare with other arms")
        FinalFlush(publisher, training.get("hub_flush_timeout", 600.0)).end()


def _check_supported(where: str, training: PretrainConfig, devices: int) -> None:
    if training.fsdp and devices == 1:
        raise ValueError(f"{where}: fsdp needs several devices per run. Set devices_per_run, or remove fsdp.")
    if training.load_best_model_at_end:
        raise ValueError(
            f"{where}: load_best_model_at_end is not supported: losses belong to the last weights. Remove it."
        )
    if training.label_smoothing_factor:
        raise ValueError(
            f"{where}: label_smoothing_factor is not supported: held-out losses would be smoothed as well, and not be "
            "in nats per token. Remove it."
        )
    if training.save_only_model:
        raise ValueError(f"{where}: save_only_model is not supported: a run could not go on. Remove it.")


def _log(run: Run) -> Path:
    return run.folder / "_log.txt"  # has folders of this machine, and is not pushed


def _result(record: RunRecord, stage: str) -> str:
    if stage == "minima" and (minima := record.minima) is not None:
        converged = sum(minima.converged.values())
        return f"distance {minima.mean_distance:.4g}, {converged} of {len(minima.converged)} searches converged"
    if stage == "benchmarks":
        return ", ".join(f"{name} {value:.4g}" for name, value in record.downstream.items())
    ood = "" if record.end.ood_loss is None else f", OOD {record.end.ood_loss:.4f}"
    return f"validation {record.end.validation_loss:.4f}{ood} ({record.seconds:.0f} s)"
