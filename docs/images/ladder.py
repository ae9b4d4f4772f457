"""
Plot `ladder.png`: effects on the OOD loss by the size of the model, from the losses in `docs/studies`.

    python docs/images/ladder.py
"""

import csv
from pathlib import Path

from hf_nexus.evaluation.statistics import Estimate, paired_difference
from hf_nexus.plots.style import COLORS, MARKERS, new_plot, save_plot, tidy

STUDIES = Path(__file__).parents[1] / "studies"
RUNGS = {"0.03M": "0.03M", "0.1M": "0.1M", "0.1M-rate": "0.1M, one rate", "0.3M": "0.3M"}
PAIRS = {
    "Nexus 0.2 minus AdamW (primary)": ("nexus-0.2", "adamw"),
    "gamma 0 minus AdamW (no path)": ("gamma-0", "adamw"),
    "random directions minus AdamW": ("random-0.2", "adamw"),
    "Nexus 0.2 minus gamma 0 (the path)": ("nexus-0.2", "gamma-0"),
}
REPORTED = -0.012  # by the paper, at 3B


def effect(rung: str, arm: str, versus: str) -> Estimate:
    """The difference in OOD loss at matched training loss, paired by the seeds that both arms have."""
    with (STUDIES / f"ladder-{rung}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "ood_loss"]
    losses = {(row["arm"], row["where"], row["seed"]): float(row["value"]) for row in rows}
    sides = [(arm, f"matched with {versus}"), (versus, f"matched with {arm}")]
    seeds = [seed for seed in sorted({row["seed"] for row in rows}) if all((*side, seed) in losses for side in sides)]
    return paired_difference(*([losses[*side, seed] for seed in seeds] for side in sides))


def main() -> None:
    figure = new_plot(7.2, 4.3)
    axes = figure.subplots()
    seeds = {rung: effect(rung, "nexus-0.2", "adamw").n for rung in RUNGS}
    for i, (label, (arm, versus)) in enumerate(PAIRS.items()):
        found = [effect(rung, arm, versus) for rung in RUNGS]
        fewer = [
            f"{each.n} seeds at {RUNGS[rung]}" for rung, each in zip(RUNGS, found, strict=True) if each.n < seeds[rung]
        ]
        label = f"{label}, {', '.join(fewer)}" if fewer else label
        places = [place + 0.15 * (i - 1.5) for place in range(len(RUNGS))]
        halves = [each.half or 0.0 for each in found]
        style = {"color": COLORS[i], "marker": MARKERS[i], "linestyle": "none", "capsize": 3}
        axes.errorbar(places, [each.mean for each in found], halves, label=label, **style)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(REPORTED, color="0.4", linewidth=1, linestyle="--", label=f"reported by the paper at 3B ({REPORTED})")
    axes.set_xticks(range(len(RUNGS)), [f"{RUNGS[rung]}\n{n} seeds" for rung, n in seeds.items()])
    title = "Effect on the OOD loss by size, at matched training loss (lower is better):\n"
    title += "mean and 95 % interval of differences paired by seed, not corrected"
    tidy(axes, title, "parameters", "difference, nats per token")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    print(save_plot(figure, Path(__file__).with_suffix(".png")))


if __name__ == "__main__":
    main()
