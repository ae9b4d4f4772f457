"""The plots of a training run: their curves, and the logs they can be drawn from."""

import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.axes
import matplotlib.image
import pytest

from hf_nexus.plots import run
from hf_nexus.plots.run import plot_run

SOURCES = ("code", "math")


def make_log(steps=(0, 10, 20), train=SOURCES, ood=("cpp",)):
    log = []
    for step in steps:
        entry = {f"loss/{name}": 4.0 - step / 20 for name in train} | {f"tokens/{name}": step for name in train}
        log.append(entry | {"loss": 4.0, "path_cosine": 0.1 + step / 100, "inner_lr": 0.05, "step": step})
        scores = {f"eval_{name}_loss": 5.0 - step / 20 + i for i, name in enumerate((*train, *ood))}
        log.append(scores | {"eval_loss": 5.5 - step / 20, "eval_ood_loss": 7.0 - step / 20, "step": step})
    return log


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(log)` maps the label of each curve, or its color, to (x, y, line style, line width). Writes no file."""
    curves = {}
    plot = matplotlib.axes.Axes.plot

    def record(axes, x, y, **style):
        label = style.get("label", style["color"]).split("  ")[-1]
        curves[label] = (list(x), list(y), style.get("linestyle", "-"), style["linewidth"])
        return plot(axes, x, y, **style)

    def draw(log, sources=SOURCES):
        curves.clear()
        assert plot_run(log, sources, "never")
        return dict(curves)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    monkeypatch.setattr(run, "save_plot", lambda figure, path: path)
    return draw


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05  # not blank


@pytest.mark.parametrize("several", [True, False])
def test_other_metrics_that_end_in_loss_are_no_sets(drawn, several):
    """The Trainer logs a runtime for each set, and TRL the auxiliary loss of experts."""
    log = make_log() if several else [{"step": step, "eval_loss": 4.0 - step / 20} for step in (0, 10, 20)]
    for entry in log:
        sets = [match[1] for key in entry if (match := re.fullmatch(r"eval_(.+)_loss", key)) and match[1] != "ood"]
        names = [f"_{name}" for name in sets] or [""]
        if "eval_loss" in entry:
            entry |= {f"eval{name}_{key}": 1.0 for name in names for key in ("runtime", "aux_loss")}
    curves = drawn(log)
    assert not [label for label in curves if "aux" in label]
    assert ("mean" in curves) == several and ("held out" in curves) != several


def test_every_set_is_drawn_and_ood_differs_from_training(drawn):
    curves = drawn(make_log())
    assert curves["code"][:2] == ([0, 10, 20], [5.0, 4.5, 4.0])
    assert curves["math"][1] == [6.0, 5.5, 5.0]
    assert curves["cpp"][1] == [7.0, 6.5, 6.0]
    assert curves["mean"][1] == [5.5, 5.0, 4.5]
    assert curves["OOD mean"][1] == [7.0, 6.5, 6.0]
    dashed = {name for name, (_, _, style, _) in curves.items() if style == run._LONG}
    assert dashed == {"cpp", "OOD mean"}
    assert curves["training (path loss)"][:3] == ([0, 10, 20], [4.0, 4.0, 4.0], run._SHORT)
    assert curves["mean"][3] > 2 * curves["code"][3] and curves["OOD mean"][3] > 2 * curves["cpp"][3]
    assert curves["black"][1] == pytest.approx([0.1, 0.2, 0.3])  # the path cosine
    assert "#D55E00" not in curves  # a constant inner learning rate is not drawn


def test_inner_lr_is_drawn_when_it_changes(drawn):
    curves = drawn([{"step": step, "inner_lr": step / 10, "path_cosine": 0.1} for step in range(3)])
    assert [0.0, 0.1, 0.2] in [values for _, values, _, _ in curves.values()]


def test_without_evaluation_path_losses_are_drawn_and_labeled(drawn, monkeypatch):
    labels = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_ylabel", lambda axes, text, **style: labels.append(text))
    assert drawn([entry for entry in make_log() if "loss" in entry])["code"][1] == [4.0, 3.5, 3.0]
    assert "path loss" in labels[0]
    drawn(make_log())
    assert labels[2] == "held-out loss (nats per token)"


def test_a_plain_loss_is_no_path_loss(drawn, monkeypatch):
    labels = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_ylabel", lambda axes, text, **style: labels.append(text))
    log = [{key: value for key, value in entry.items() if key != "path_cosine"} for entry in make_log()]
    assert "training" in drawn(log) and "code" in drawn([entry for entry in log if "loss" in entry])
    run._training(log, SOURCES, False)
    assert labels == ["held-out loss (nats per token)", "loss in training (nats per token)", "held-out loss"]


def test_only_sets_beside_a_set_of_a_source_are_ood(drawn):
    log = [{"step": step, "eval_code_loss": 2.0, "eval_law_loss": 3.0} for step in (0, 1)]
    for sources in ([], ["text"]):
        assert all(style == "-" for _, _, style, _ in drawn(log, sources).values())
    curves = drawn(log, ["code", "text"])
    assert curves["code"][2] == "-" and curves["law"][2] != "-"


def test_the_last_entry_of_a_step_counts_and_steps_are_sorted(drawn):
    log = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (10, 2.0), (10, 1.5), (5, 2.5))]
    assert drawn(log)["held out"][:2] == ([0, 5, 10], [3.0, 2.5, 1.5])


def test_a_value_that_is_not_finite_leaves_a_gap(drawn):
    values = drawn([{"step": s, "eval_a_loss": v} for s, v in enumerate((3.0, math.inf, 1.0))])["a"][1]
    assert values[0] == 3.0 and math.isnan(values[1]) and values[2] == 1.0


@pytest.mark.parametrize(
    "log",
    [
        [{"step": 0, "eval_loss": 3.0}],
        [{"step": 3, "path_cosine": 0.2}],
        [{k: v for k, v in entry.items() if k != "path_cosine"} for entry in make_log()],
        [*make_log(), {"step": 30, "eval_code_loss": math.nan, "eval_loss": math.inf, "path_cosine": math.nan}],
        [{"step": 0, "eval_a$\\no{$_loss": 1.0, "eval__hidden_loss": 1.0, "eval_a^_{_loss": 1.0, "eval_x%_loss": 2.0}],
        make_log(train=[f"source {i}" for i in range(20)], ood=["x" * 200]),
    ],
    ids=["one value", "one cosine", "no path cosine", "not finite", "odd names", "many sources"],
)
@pytest.mark.filterwarnings("error")
def test_logs_of_every_kind_can_be_drawn(tmp_path, log):
    (plot,) = plot_run(log, SOURCES, tmp_path / "new")
    assert_png(plot)


@pytest.mark.parametrize("count", [5, 20])
def test_the_legend_is_right_of_the_curves_and_inside_the_plot(monkeypatch, count):
    figures = []
    monkeypatch.setattr(run, "save_plot", lambda figure, path: figures.append(figure))
    sources = [f"{i} a fairly long name of a source" for i in range(count)]
    plot_run(make_log(train=sources), sources, "never")
    figure = figures[0]
    figure.get_layout_engine().execute(figure)
    box, axes = figure.axes[0].get_legend().get_window_extent(), figure.axes[0]
    assert axes.get_window_extent().x1 < box.x0 and box.x1 <= figure.bbox.x1
    assert figure.axes[1].get_window_extent().y1 < box.y0 and box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > figure.bbox.width / 2.2  # the curves keep most of the width


@pytest.mark.parametrize("log", [[], [{"step": 1, "train_runtime": 3.0}], [{"step": 1, "eval_loss": math.nan}]])
def test_a_log_without_numbers_draws_nothing(tmp_path, log):
    assert plot_run(log, SOURCES, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_cosines_are_drawn_only_if_the_log_has_finite_ones(tmp_path):
    log = [{"step": 1, "cosine/a-b/c": 0.5}, {"step": 2, "cosine/a-b/c": math.nan}, {"step": 2, "cosine/x/y": 0.1}]
    folder = tmp_path / "new"
    assert plot_run([{"step": 1, "loss/a": 1.0}], ["a-b", "c"], folder) == [] and not folder.exists()
    assert plot_run(log[1:2], ["a", "b-c"], folder) == []
    assert plot_run(log[:2], ["a-b", "c", "d"], folder) == [folder / "gradient_cosines.png"]
    assert_png(folder / "gradient_cosines.png")


def test_the_matrix_shows_each_pair_its_own_cosine(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(run, "draw_matrix", lambda axes, names, rows, **style: shown.extend(rows))
    plot_run([{"step": 1, "cosine/a-b/c": 0.5, "cosine/a/b-c": -0.5}], ["a-b", "c", "a", "b-c"], tmp_path)
    assert [shown[0][1], shown[2][3]] == [0.5, -0.5] and math.isnan(shown[0][2])


def test_pyplot_is_never_imported_and_matplotlib_late(tmp_path):
    code = (
        "import sys, hf_nexus.plots.run as p; assert 'matplotlib' not in sys.modules;"
        "log = [{'step': 1, 'eval_loss': 2.0, 'cosine/a/b': 0.5}];"
        f"assert len(p.plot_run(log, ['a', 'b'], {str(tmp_path)!r})) == 2;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
