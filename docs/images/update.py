"""
Plot `update.png`: gradient accumulation and a Nexus window on two sources, from the same point.

    python docs/images/update.py

The loss of each source is a quadratic function of two parameters. `hf_nexus.Nexus` takes the steps.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_nexus import Nexus
from hf_nexus.plots.style import COLORS, new_plot, save_plot

K, INNER_LR = 6, 0.35  # number and length of the inner steps, much longer than in training
START = torch.tensor([2.0, 1.6])
X, Y = (-1.6, 3.6), (-1.6, 1.9)  # limits of the plot
# Minimum and curvature of each source.
SOURCES = {
    "text": (torch.tensor([-0.4, -1.0]), torch.tensor([[6.0, 0.5], [0.5, 1.25]])),
    "code": (torch.tensor([1.3, -0.4]), torch.tensor([[0.5, 0.2], [0.2, 2.4]])),
}


def loss(source: str, theta: Tensor) -> Tensor:
    """Loss of points of shape (..., 2)."""
    minimum, curvature = SOURCES[source]
    offset = theta - minimum
    return 0.5 * ((offset @ curvature) * offset).sum(-1)


def gradient(source: str, theta: Tensor) -> Tensor:
    point = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(source, point), point)[0]


def walk() -> list[Tensor]:
    """Return the path theta_0 ... theta_k, each of shape (2,)."""
    theta = torch.nn.Parameter(START.clone())
    nexus, path = Nexus([theta], inner_lr=INNER_LR), [START]
    with nexus.window():
        for m in range(K):
            theta.grad = gradient(list(SOURCES)[m % 2], theta.detach())
            nexus.inner_step()
            path.append(theta.detach().clone())
    assert torch.equal(theta.detach(), START)
    return path


def main() -> None:
    figure = new_plot(7.2, 4.9)
    axes = figure.subplots()
    x, y = np.meshgrid(np.linspace(*X, 200), np.linspace(*Y, 200))
    grid = torch.tensor(np.stack([x, y], -1), dtype=torch.float32)
    colors = dict(zip(SOURCES, COLORS, strict=False))
    for name, (minimum, _) in SOURCES.items():
        levels = [0.12, 0.5, 1.2, 2.3, 4.0, 7.0, 12.0]
        axes.contour(x, y, loss(name, grid), levels=levels, colors=colors[name], linewidths=0.7, alpha=0.5)
        axes.plot(*minimum, marker="*", color=colors[name], markersize=11, linestyle="none")
        below = {"xytext": (0, -15), "textcoords": "offset points", "fontsize": 9, "ha": "center"}
        axes.annotate(f"minimum of {name}", minimum, color=colors[name], **below)

    def arrow(start: Tensor, end: Tensor, **style: Any) -> None:
        shape = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13} | style
        axes.annotate("", end, start, arrowprops=shape, zorder=4)

    path = walk()
    end, length = path[-1], (path[-1] - START).norm()
    mean = torch.stack([gradient(name, START) for name in SOURCES]).mean(0)
    accumulated = START - mean / mean.norm() * length
    arrow(START, accumulated, color="0.45", linewidth=2.6)
    arrow(START, end, color="black", linewidth=2.6)
    for m, (before, after) in enumerate(pairwise(path)):
        arrow(before, after, color=colors[list(SOURCES)[m % 2]], linewidth=1.6)
    axes.plot(*START, "o", color="black", markersize=6, zorder=5)
    axes.annotate(r"$\theta_0$", START, (-15, 3), textcoords="offset points", fontsize=12)
    labels = {
        "textcoords": "offset points",
        "fontsize": 9,
        "bbox": {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    }
    axes.annotate(
        "gradient accumulation:\nthe mean gradient at $\\theta_0$", accumulated, (-8, 2), ha="right", **labels
    )
    axes.annotate("Nexus: the displacement\nafter k inner steps", (START + end) / 2, (12, -16), **labels)
    axes.annotate("inner steps,\neach on one source", path[6], (-10, -8), ha="right", **labels)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=X, ylim=Y)
    axes.set_title("The direction that AdamW receives", fontsize=11)
    print(save_plot(figure, Path(__file__).with_suffix(".png")))


if __name__ == "__main__":
    main()
