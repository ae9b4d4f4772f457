"""
Run the ladder of docs/results.md from its smallest rung on, and print its table: the effect of the primary arm and of
each control by model size.

    python recipes/ladder.py                      # finished runs are skipped; the same command resumes
    python recipes/ladder.py --table              # only the table, from the runs that are finished
    python recipes/ladder.py --rungs 0.1M --workers 2

All rungs train on 7.2 tokens per parameter, with the arms of recipes/ladder.yaml. Each has a report in its folder.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_nexus.compare.comparison import Comparison
from hf_nexus.compare.config import ComparisonConfig
from hf_nexus.lock import locked
from hf_nexus.strict import load_yaml, read

FILE = Path(__file__).with_name("ladder.yaml")
# Shape of the Llama, outer steps, and seeds of each rung above the first. Warm-up, decay and evaluations keep their
# fractions of the steps.
RUNGS: dict[str, Any] = {
    "0.03M": {"shape": (24, 64, 2, 2), "steps": 75, "seeds": 16},
    "0.1M": {"shape": (48, 128, 3, 3), "steps": 300, "seeds": 12},
    "0.3M": {"shape": (80, 224, 4, 5), "steps": 1000, "seeds": 8},
    "1M": {"shape": (136, 384, 5, 8), "steps": 3000, "seeds": 5},
}


def comparison(rung: str, workers: int | None) -> ComparisonConfig:
    """The comparison of a rung."""
    given = load_yaml(str(FILE), "compare", "comparison")
    (hidden, inner, layers, heads), steps = RUNGS[rung]["shape"], RUNGS[rung]["steps"]
    times = steps / given["training"]["max_steps"]
    given["output_dir"] = str(Path(given["output_dir"]).with_name(rung))
    given["seeds"] = list(range(1, RUNGS[rung]["seeds"] + 1))
    given["model"] |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    given["model"] |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    training, tuning = given["training"], given["tuning"]
    for fields, name in [(training, n) for n in ("max_steps", "warmup_steps", "eval_steps")] + [(tuning, "max_steps")]:
        fields[name] = round(fields[name] * times)
    decay = training["lr_scheduler_kwargs"]
    decay["num_decay_steps"] = round(decay["num_decay_steps"] * times)
    if workers is not None:
        given["workers"] = workers
    return read(ComparisonConfig, given)


def table(rungs: list[str]) -> str:
    """The difference of each pair of arms that answers a question, by rung."""
    lines = ["| parameters | arm | against | pairs | OOD loss, matched | OOD loss, end | training loss, end |"]
    lines.append("|---|---|---|---|---|---|---|")
    for rung in rungs:
        config = comparison(rung, None)
        records = [record for run in Comparison(config, Console(quiet=True)).runs() if (record := run.record())]
        if not records:
            continue
        arm, analysis = config.primary.arm, config.analyse(records)
        pairs = [(other, config.baseline) for other in config.arms if other != config.baseline]
        for one, other in pairs + [(arm, control) for control in analysis.controls]:
            rows = [
                next((r for r in analysis.rows if (r.arm, r.versus, r.metric, r.where) == (one, other, *key)), None)
                for key in (("ood_loss", "matched"), ("ood_loss", "end"), ("train_loss", "end"))
            ]
            found = [row.difference for row in rows if row is not None and row.difference is not None]
            cells = [f"{d.mean:+.4f} ± {d.half:.4f}" if d.half is not None else f"{d.mean:+.4f}" for d in found]
            lines.append(f"| {rung} | {one} | {other} | {found[0].n if found else 0} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rungs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=["0.03M", "0.1M"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    for rung in options.rungs:
        chosen = Comparison(comparison(rung, options.workers), Console())
        if not options.table:
            with locked(chosen.folder):
                chosen.check()
                chosen.run()
    print(table(options.rungs))


if __name__ == "__main__":
    main()
