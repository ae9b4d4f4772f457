"""
Plot `update.png`: gradient accumulation and a Nexus window on two sources, from the same point.

    python docs/images/update.py

The loss of each source is a quadratic function of two parameters. `hf_nexus.Nexus` takes the steps.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_nexus import Nexus
from hf_nexus.plots.style import COLORS, new_plot, save_plot

K, INNER_LR = 4, 0.5  # number and length of the inner steps, much longer than in training
START = torch.tensor([-1.3, 1.3])
# Minimum and curvature of each source.
SOURCES = {
    "text": (torch.tensor([0.3, -1.1]), torch.tensor([[2.4, 0.2], [0.2, 0.5]])),
    "code": (torch.tensor([1.4, -0.1]), torch.tensor([[0.5, 0.2], [0.2, 2.4]])),
}


def loss(source: str, theta: Tensor) -> Tensor:
    """Loss of points of shape (..., 2)."""
    minimum, curvature = SOURCES[source]
    offset = theta - minimum
    return 0.5 * ((offset @ curvature) * offset).sum(-1)


def gradient(source: str, theta: Tensor) -> Tensor:
    point = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(source, point), point)[0]


def walk() -> tuple[list[Tensor], Tensor]:
    """Return the path theta_0 ... theta_k (each of shape (2,)) and the pseudo-gradient (2,)."""
    theta = torch.nn.Parameter(START.clone())
    nexus, path = Nexus([theta], inner_lr=INNER_LR), [START]
    with nexus.window():
        for m in range(K):
            theta.grad = gradient(list(SOURCES)[m % 2], theta.detach())
            nexus.inner_step()
            path.append(theta.detach().clone())
    assert torch.equal(theta.detach(), START)
    return path, theta.grad.clone()


def main() -> None:
    figure = new_plot(9.2, 4.1)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    x, y = np.meshgrid(np.linspace(-2.1, 2.5, 200), np.linspace(-1.9, 1.75, 200))
    grid = torch.tensor(np.stack([x, y], -1), dtype=torch.float32)
    for axes in panels:
        for color, (name, (minimum, _)) in zip(COLORS, SOURCES.items(), strict=False):
            levels = [0.12, 0.5, 1.2, 2.3, 4.0]
            axes.contour(x, y, loss(name, grid), levels=levels, colors=color, linewidths=0.7, alpha=0.6)
            axes.plot(*minimum, marker="*", color=color, markersize=11, linestyle="none")
            below = {"xytext": (-34, -15), "textcoords": "offset points", "fontsize": 8, "color": color}
            axes.annotate(f"minimum of {name}", minimum, **below)
        axes.plot(*START, "o", color="black", markersize=6, zorder=5)
        axes.annotate(r"$\theta_0$", START, (-15, 2), textcoords="offset points", fontsize=11)
        axes.set(xticks=[], yticks=[], aspect="equal")

    def arrow(axes, start: Tensor, step: Tensor, color: str, width: float = 1.8) -> None:
        style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", start + step, start, arrowprops=style, zorder=4)

    left, right = panels
    gradients = {name: gradient(name, START) for name in SOURCES}
    mean = torch.stack(list(gradients.values())).mean(0)
    scale = 1.5 / mean.norm()
    for color, g in zip(COLORS, gradients.values(), strict=False):
        arrow(left, START, -g * scale / 2, color)
    arrow(left, START, -mean * scale, "black", 2.6)
    left.set_title("gradient accumulation: the mean of the gradients at one point", fontsize=9.5)

    path, pseudo_gradient = walk()
    for m in range(K):
        arrow(right, path[m], path[m + 1] - path[m], COLORS[m % 2])
        right.plot(*path[m + 1], "o", color=COLORS[m % 2], markersize=3.5)
    arrow(right, START, -pseudo_gradient * 1.5 / pseudo_gradient.norm(), "black", 2.6)
    right.set_title("Nexus: the displacement of k normalized steps, source by source", fontsize=9.5)
    note = "thick: the descent direction handed to AdamW.   The right path is walked back before the step."
    figure.supxlabel(note, fontsize=9)
    print(save_plot(figure, Path(__file__).with_suffix(".png")))


if __name__ == "__main__":
    main()
