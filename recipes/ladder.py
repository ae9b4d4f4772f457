# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus[plots]"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Run the ladder of docs/results_ladder.md from its smallest rung on, and print its table: the effect of the primary arm
and of each control by model size.

    python recipes/ladder.py                      # finished runs are skipped; the same command resumes
    python recipes/ladder.py --table              # only the table, from the runs that are finished
    python recipes/ladder.py --rungs 0.1M --workers 2

All rungs train on 6 to 7 tokens per parameter, with the arms of recipes/ladder.yaml. Each has a report in its folder.
"""

import argparse
import csv
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_nexus.compare.comparison import Comparison
from hf_nexus.compare.config import ComparisonConfig
from hf_nexus.compare.records import RunRecord, finished_runs
from hf_nexus.compare.report import value_rows
from hf_nexus.evaluation.statistics import paired_difference
from hf_nexus.lock import locked
from hf_nexus.strict import load_yaml, read
from hf_nexus.terminal import new_console

FILE = Path(__file__).with_name("ladder.yaml")
# Shape of the Llama, outer steps, seeds and learning rates of each rung. Warm-up, decay and evaluations keep their
# fractions of the steps. A pilot at 0.03M used the seeds 1 to 16 and rates up to 2e-2, which all its arms chose.
# That at 0.1M used the seeds 1 to 12. Its matched losses lie in the last two thirds, which have more evaluations now.
# There the arms chose different rates. 0.1M-rate has one rate for four of them, the middle one, and other seeds: it
# separates the path from the rate. Its seeds, rate and margin were declared before its first run.
RUNGS: dict[str, Any] = {
    "0.03M": {"shape": (24, 64, 2, 2), "steps": 75, "seeds": range(17, 84), "rates": [2e-2, 4e-2, 8e-2]},
    "0.1M": {
        "shape": (48, 128, 3, 3),
        "steps": 300,
        "seeds": range(13, 101),
        "rates": [1e-2, 2e-2, 4e-2],
        "training": {"eval_steps": 10, "eval_delay": 100},
        "equivalence_margin": 0.012,
    },
    "0.1M-rate": {
        "shape": (48, 128, 3, 3),
        "steps": 300,
        "seeds": range(101, 156),
        "rates": [2e-2],
        "training": {"eval_steps": 10, "eval_delay": 100},
        "equivalence_margin": 0.012,
        "arms": ["adamw", "gamma-0", "random-0.2", "nexus-0.2"],
    },
    "0.3M": {"shape": (80, 224, 4, 5), "steps": 1000, "seeds": range(1, 6), "rates": [5e-3, 1e-2, 2e-2]},
    "1M": {"shape": (136, 384, 5, 4), "steps": 3000, "seeds": range(1, 6), "rates": [4e-3, 8e-3, 1.6e-2]},
}


def comparison(rung: str, workers: int | None) -> ComparisonConfig:
    """The comparison of a rung."""
    given = load_yaml(str(FILE), "compare", "comparison")
    (hidden, inner, layers, heads), steps = RUNGS[rung]["shape"], RUNGS[rung]["steps"]
    times = steps / given["training"]["max_steps"]
    given["output_dir"] = str(Path(given["output_dir"]).with_name(rung))
    given["seeds"] = [*RUNGS[rung]["seeds"]]
    given["model"] |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    given["model"] |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    given["arms"] = {arm: given["arms"][arm] for arm in RUNGS[rung].get("arms", given["arms"])}
    training, tuning = given["training"], given["tuning"]
    tuning["grid"] = {"learning_rate": RUNGS[rung]["rates"]}
    for fields, name in [(training, n) for n in ("max_steps", "warmup_steps", "eval_steps")] + [(tuning, "max_steps")]:
        fields[name] = round(fields[name] * times)
    decay = training["lr_scheduler_kwargs"]
    decay["num_decay_steps"] = round(decay["num_decay_steps"] * times)
    training |= RUNGS[rung].get("training", {})
    given["equivalence_margin"] = RUNGS[rung].get("equivalence_margin")
    if rung != "0.03M":
        del given["minima"]
    if len(RUNGS[rung]["rates"]) == 1:
        training["learning_rate"] = RUNGS[rung]["rates"][0]
        del given["tuning"]
    if workers is not None:
        given["workers"] = workers
    return read(ComparisonConfig, given)


def table(rungs: list[str]) -> str:
    """The difference of each pair of arms that answers a question, by rung. Its values are written as CSV."""
    columns = {"OOD loss, matched": "ood_loss", "OOD loss, end": "ood_loss", "training loss, end": "train_loss"}
    notes, lines = [], [f"| rung | arm | against | pairs | {' | '.join(columns)} |", "|" + "---|" * (4 + len(columns))]
    for rung in rungs:
        config = comparison(rung, None)
        folder = Path(config.output_dir)
        records = [RunRecord.load(run) for run in finished_runs(folder)]
        if not records:
            continue
        analysis, name = config.analyse(records), f"ladder-{rung}"
        rows = [row for row in value_rows(analysis) if row[2] in {*columns.values(), "minima_distance"}]
        values = {(a, s, m, w): value for a, s, m, w, value in rows}
        with folder.with_name(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("arm", "seed", "metric", "where", "value"), *rows])
        for arm in config.arms:
            if far := [value for of, _, metric, _, value in rows if (of, metric) == (arm, "minima_distance")]:
                notes.append(f"{name}: {arm} has a relative minima distance of {fmean(far):.2f} ({len(far)} seeds).")
        pairs = [(arm, config.baseline) for arm in config.arms if arm != config.baseline]
        for arm, versus in pairs + [(config.primary.arm, control) for control in analysis.controls]:
            both = [{s for a, s, _, _ in values if a == of} for of in (arm, versus)]
            matched = {(arm, f"matched with {versus}"), (versus, f"matched with {arm}")}
            reached = [{s for a, s, m, w in values if (a, m, w) == (of, "ood_loss", at)} for of, at in matched]
            cells, seeds = [], sorted(set.intersection(*reached))
            if lost := set.intersection(*both) - {*seeds}:
                why = "one run diverged, or does not reach the training loss of the other"
                notes.append(f"{name}: {arm} against {versus} without the seeds {sorted(lost)}: {why}.")
            if not seeds:
                continue
            for column, metric in columns.items():
                at = (f"matched with {versus}", f"matched with {arm}") if "matched" in column else ("end", "end")
                one, other = ([values[a, s, metric, w] for s in seeds] for a, w in zip((arm, versus), at, strict=True))
                found = paired_difference(one, other)
                cells.append(f"{found.mean:+.4f} ± {found.half or math.nan:.4f}")
            lines.append(f"| {name} | {arm} | {versus} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join([*lines, *notes])


def main() -> None:
    """Run the rungs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=["0.03M", "0.1M", "0.1M-rate", "0.3M"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    failed = 0
    for rung in [] if options.table else options.rungs:
        chosen = Comparison(comparison(rung, options.workers), new_console())
        with locked(chosen.folder):
            chosen.check()
            chosen.run()
        failed += len(chosen.failed)
    print(table(options.rungs))
    if failed:
        raise SystemExit(f"{failed} runs failed; the same command runs only what is missing.")


if __name__ == "__main__":
    main()
