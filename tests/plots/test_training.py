"""The picture of a run: what is drawn, and which logs it can be drawn from."""

import math
import subprocess
import sys
from pathlib import Path

import matplotlib.axes
import matplotlib.image
import pytest

from hf_nexus.plots.training import plot_run


def make_log(steps=(0, 10, 20), train=("code", "math"), ood=("cpp",)):
    log = []
    for step in steps:
        entry = {f"loss/{name}": 4.0 - step / 20 for name in train} | {f"tokens/{name}": step for name in train}
        log.append(entry | {"loss": 4.0, "path_cosine": 0.1 + step / 100, "inner_lr": 0.05, "step": step})
        scores = {f"eval_{name}_loss": 5.0 - step / 20 + i for i, name in enumerate((*train, *ood))}
        log.append(scores | {"eval_loss": 5.5 - step / 20, "eval_ood_loss": 7.0 - step / 20, "step": step})
    return log


@pytest.fixture
def drawn(monkeypatch):
    """Records every curve as {label: (x, y, line style, line width)}; unlabelled ones under their colour."""
    curves = {}
    plot = matplotlib.axes.Axes.plot

    def record(axes, x, y, **style):
        label = style.get("label", style["color"]).split("  ")[-1]
        curves[label] = (list(x), list(y), style.get("linestyle", "-"), style["linewidth"])
        return plot(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    return curves


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05  # not blank


def test_draws_every_set_and_tells_training_from_ood(tmp_path, drawn):
    assert_png(plot_run(make_log(), tmp_path / "new" / "run.png"))
    assert drawn["code"][:2] == ([0, 10, 20], [5.0, 4.5, 4.0])
    assert drawn["math"][1] == [6.0, 5.5, 5.0]
    assert drawn["cpp"][1] == [7.0, 6.5, 6.0]
    assert drawn["mean"][1] == [5.5, 5.0, 4.5]
    assert drawn["OOD mean"][1] == [7.0, 6.5, 6.0]
    assert {name: style for name, (_, _, style, _) in drawn.items() if style != "-"}.keys() == {"cpp", "OOD mean"}
    assert drawn["mean"][3] > 2 * drawn["code"][3] and drawn["OOD mean"][3] > 2 * drawn["cpp"][3]
    assert drawn["black"][1] == pytest.approx([0.1, 0.2, 0.3])  # the path cosine; a constant inner lr is not drawn


def test_inner_lr_is_drawn_when_it_changes(tmp_path, drawn):
    log = [{"step": step, "inner_lr": step / 10, "path_cosine": 0.1} for step in range(3)]
    plot_run(log, tmp_path / "run.png")
    assert [0.0, 0.1, 0.2] in [values for _, values, _, _ in drawn.values()]


def test_without_evaluation_the_path_losses_are_drawn_and_named_so(tmp_path, drawn, monkeypatch):
    labels = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_ylabel", lambda axes, text, **style: labels.append(text))
    plot_run([entry for entry in make_log() if "loss" in entry], tmp_path / "run.png")
    assert drawn["code"][1] == [4.0, 3.5, 3.0] and "path loss" in labels[0]
    plot_run(make_log(), tmp_path / "run.png")
    assert "held-out loss" in labels[2]


def test_a_set_is_no_ood_source_when_none_is_named_after_a_source(tmp_path, drawn):
    plot_run(
        [{"step": 1, "tokens/a": 1, "eval_x_loss": 1.0, "eval_y_loss": 2.0, "eval_loss": 1.5}], tmp_path / "p.png"
    )
    assert all(style == "-" for _, _, style, _ in drawn.values())


def test_sources_can_be_named_for_a_log_that_does_not_name_them(tmp_path, drawn):
    log = [{"step": step, "eval_code_loss": 2.0, "eval_law_loss": 3.0} for step in (0, 1)]
    plot_run(log, tmp_path / "unnamed.png")
    assert drawn["law"][2] == "-"
    plot_run(log, tmp_path / "named.png", ["code", "text"])
    assert drawn["code"][2] == "-" and drawn["law"][2] != "-"


def test_later_entries_of_a_step_win_and_steps_are_sorted(tmp_path, drawn):
    log = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (10, 2.0), (10, 1.5), (5, 2.5))]
    plot_run(log, tmp_path / "run.png")
    assert drawn["held out"][:2] == ([0, 5, 10], [3.0, 2.5, 1.5])


@pytest.mark.parametrize(
    "log",
    [
        make_log(steps=(0,)),
        [{"step": 0, "eval_loss": 3.0}],
        [{"step": 3, "path_cosine": 0.2}],
        [{k: v for k, v in entry.items() if k != "path_cosine"} for entry in make_log()],
        [*make_log(), {"step": 30, "eval_code_loss": math.nan, "eval_loss": math.inf, "path_cosine": math.nan}],
        [{"step": 0, "eval_a$\\no{$_loss": 1.0, "eval__hidden_loss": 1.0, "eval_a^_{_loss": 1.0, "eval_x%_loss": 2.0}],
        make_log(train=[f"source {i}" for i in range(20)], ood=["x" * 200]),
    ],
    ids=["one step", "one value", "one cosine", "no path cosine", "not finite", "odd names", "many sources"],
)
@pytest.mark.filterwarnings("error")
def test_logs_of_every_kind_can_be_drawn(tmp_path, log):
    assert_png(plot_run(log, tmp_path / "run.png"))


@pytest.mark.parametrize("sources", [5, 20])
def test_the_legend_lies_beside_the_curves_and_inside_the_picture(tmp_path, monkeypatch, sources):
    legends = []
    legend = matplotlib.axes.Axes.legend
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda axes, **kw: legends.append(legend(axes, **kw)))
    plot_run(make_log(train=[f"{i} a fairly long name of a source" for i in range(sources)]), tmp_path / "run.png")
    box, axes, figure = legends[0].get_window_extent(), legends[0].axes, legends[0].get_figure()
    assert axes.get_window_extent().x1 < box.x0 and box.x1 <= figure.bbox.x1
    assert figure.axes[1].get_window_extent().y1 < box.y0 and box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > figure.bbox.width / 2.2  # the curves keep most of the room


def test_a_gap_stays_a_gap(tmp_path, drawn):
    plot_run([{"step": s, "eval_a_loss": v} for s, v in enumerate((3.0, math.inf, 1.0))], tmp_path / "run.png")
    assert drawn["a"][1][0] == 3.0 and math.isnan(drawn["a"][1][1]) and drawn["a"][1][2] == 1.0


@pytest.mark.parametrize("log", [[], [{"step": 1, "train_runtime": 3.0}], [{"step": 1, "eval_loss": math.nan}]])
def test_nothing_to_draw_is_an_error_with_the_fix(tmp_path, log):
    with pytest.raises(ValueError, match=rf"has {len(log)} entries.*logging_steps"):
        plot_run(log, tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def test_pyplot_is_never_imported_and_matplotlib_only_when_drawing(tmp_path):
    code = (
        "import sys, hf_nexus.plots.training as p; assert 'matplotlib' not in sys.modules;"
        f"p.plot_run([{{'step': 1, 'eval_loss': 2.0}}], {str(tmp_path / 'run.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
