"""The plots of a comparison show the values of the records, for records of every kind."""

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from hf_nexus.compare import plots
from hf_nexus.compare.plots import plot_comparison
from hf_nexus.compare.records import LossPoint, Minima, RunRecord
from hf_nexus.evaluation.statistics import mean

SOURCES = ("code", "math", "web")


def make_minima(random_: random.Random, sources: Sequence[str], spread: float) -> Minima:
    """Quadratic bowls around points on a plane, `spread` apart."""
    at = {name: (spread * random_.gauss(0, 1), spread * random_.gauss(0, 1)) for name in sources}
    pairs = list(combinations(sources, 2))

    def loss(x: float, y: float, name: str) -> float:
        a, b = at[name]
        return 2.5 + 0.02 * ((x - a) ** 2 + 1.7 * (y - b) ** 2) + 0.02 * math.sin(x) * math.sin(y)

    def along(a: str, b: str, t: float) -> float:
        x, y = (at[a][i] * (1 - t) + at[b][i] * t for i in (0, 1))
        return (loss(x, y, a) + loss(x, y, b)) / 2 + 0.05 * math.sin(math.pi * t)

    positions = [t / 10 for t in range(11)]
    segments = [(a, b, [along(a, b, t) for t in positions]) for a, b in pairs]
    barriers = [
        (a, b, max(v - v_s[0] - t * (v_s[-1] - v_s[0]) for t, v in zip(positions, v_s, strict=True)))
        for a, b, v_s in segments
    ]
    three = list(sources[:3])
    points = [list(at[name]) for name in three] + [[0.0, 0.0]]
    lows, highs = [min(p[i] for p in points) for i in (0, 1)], [max(p[i] for p in points) for i in (0, 1)]
    grid = [[low - 1 + (high - low + 2) * k / 16 for k in range(17)] for low, high in zip(lows, highs, strict=True)]
    plane = {"sources": three, "x": grid[0], "y": grid[1], "points": points}
    plane["loss"] = [[sum(loss(x, y, name) for name in three) / 3 for x in grid[0]] for y in grid[1]]
    return Minima(
        steps=dict.fromkeys(sources, 100), converged=dict.fromkeys(sources, True),
        start_loss=dict.fromkeys(sources, 2.7), end_loss=dict.fromkeys(sources, 2.5), parameter_norm=40.0,
        to_start={name: math.hypot(*at[name]) for name in sources},
        pairwise=[(a, b, math.dist(at[a], at[b])) for a, b in pairs],
        positions=positions, segments=segments, barriers=barriers, plane=plane if len(sources) > 2 else None,
    )  # fmt: skip


def make_run(
    arm: str, seed: int, gain: float = 0.0, *, sources: Sequence[str] = SOURCES, ood: Sequence[str] = ("cpp", "law"),
    points: int = 21, nan_from: int | None = None, minima: bool = True,
) -> RunRecord:  # fmt: skip
    noise = random.Random(f"{arm} {seed}")
    shared = random.Random(seed)
    offset = shared.gauss(0, 0.01)
    run = RunRecord(arm, seed)
    for k in range(points):
        step, time = 100 * k, k / max(1, points - 1)
        base = 2.4 + 6.6 * math.exp(-7 * time) + 0.35 * (1 - time) + offset
        base = math.nan if nan_from is not None and k >= nan_from else base + noise.gauss(0, 0.0015)
        train = {name: base + 0.3 * i + noise.gauss(0, 0.001) for i, name in enumerate(sources)}
        held = {name: value + 0.03 + noise.gauss(0, 0.002) - 0.1 * gain * time for name, value in train.items()}
        out = {
            n: base + 0.9 + 0.4 * i - gain * time * (1 - 0.3 * i) + noise.gauss(0, 0.004) for i, n in enumerate(ood)
        }
        means = [sum(losses.values()) / len(losses) if losses else None for losses in (train, held, out)]
        run.curve.append(LossPoint(step, step * 8192, train, held, out, *means))
    for step in range(0, 100 * points, 400):
        values = [(a, b, 0.5 - 0.2 * step / 2000 + gain + noise.gauss(0, 0.03)) for a, b in combinations(sources, 2)]
        run.cosines.append((step, values))
    if gain:
        steps = range(0, 100 * points, 10)
        run.path.extend({"step": s, "path_cosine": 0.3 - s / 20000 + gain + noise.gauss(0, 0.04)} for s in steps)
    if minima:
        run.minima = make_minima(shared, sources, 3.0 - 20 * gain + 0.1 * noise.random())
    return run


def make_records(arms: Mapping[str, float], seeds: Sequence[int] = (1, 2, 3), **kwargs) -> list[RunRecord]:
    return [make_run(arm, seed, gain, **kwargs) for arm, gain in arms.items() for seed in seeds]


ARMS = {"adamw": 0.0, "normalized": 0.002, "nexus-0.05": 0.03}
ALL = [
    "ood_against_train.png", "losses.png", "cosines.png", "minima_distance.png", "landscape.png",
    "distance_against_ood.png",
]  # fmt: skip


Draw = Callable[[Sequence[RunRecord]], dict[str, Figure]]


@pytest.fixture(scope="module")
def draw() -> Draw:
    """`draw(records)` gives the plots by file name; they are not rendered, which takes most of the time."""

    def draw(records: Sequence[RunRecord]) -> dict[str, Figure]:
        drawn: dict[str, Figure] = {}

        def keep(figure: Figure, path: Path) -> Path:
            drawn[path.name] = figure
            return path

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "save_plot", keep)
            assert plot_comparison(records, "folder", baseline="adamw") == [Path("folder", name) for name in drawn]
        return drawn

    return draw


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    """Three arms at three seeds; one run of the baseline has no minima."""
    records = make_records(ARMS)
    records[1].minima = None
    return records


@pytest.fixture(scope="module")
def drawn(draw: Draw, records: list[RunRecord]) -> dict[str, Figure]:
    return draw(records)


def lines(axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def holds(found, x, y) -> bool:
    """Whether one of the lines found runs through these points, and no others."""
    return any(len(a) == len(x) and a == pytest.approx(x) and b == pytest.approx(y, nan_ok=True) for a, b in found)


def mean_of(records: Sequence[RunRecord], arm: str, field: str) -> list[float]:
    runs = [[getattr(point, field) for point in run.curve] for run in records if run.arm == arm]
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


@pytest.mark.filterwarnings("error")
def test_every_plot_is_a_png_and_not_blank(tmp_path):
    written = plot_comparison(make_records(ARMS, (1, 2), ood=("law",)), tmp_path / "new", baseline="adamw")
    assert [path.relative_to(tmp_path / "new").as_posix() for path in written] == ALL
    for path in written:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 400 and pixels.std() > 0.05


def test_plots_without_data_are_not_drawn(draw):
    def without(**fields):
        return [replace(record, **fields) for record in make_records(ARMS, (1,))]

    assert list(draw(without(curve=[]))) == ["cosines.png", "minima_distance.png", "landscape.png"]
    assert list(draw(without(cosines=[], path=[], minima=None))) == ALL[:2]
    assert list(draw(without(curve=[], cosines=[], path=[], minima=None))) == []
    two_sources = make_records(ARMS, (1,), sources=("code", "math"), ood=())
    assert list(draw(two_sources)) == ["losses.png", "cosines.png", "minima_distance.png"]


def test_an_unknown_baseline_is_an_error_that_names_the_arms(tmp_path):
    with pytest.raises(ValueError, match=r"'adam'; the records are of \['adamw', 'nexus-0.05'\]"):
        plot_comparison(make_records({"adamw": 0.0, "nexus-0.05": 0.1}, (1,)), tmp_path, baseline="adam")


def test_ood_against_training_loss_zooms_to_every_end(records, drawn):
    (late,) = drawn["ood_against_train.png"].axes
    (left, right), (bottom, top) = late.get_xlim(), late.get_ylim()
    for arm in ARMS:
        x, y = mean_of(records, arm, "train_loss"), mean_of(records, arm, "ood_loss")
        assert holds(lines(late), x, y)
        assert left < x[-1] < right < x[0] and bottom < y[-1] < top < y[0]
    for run in records:
        assert holds(lines(late), [p.train_loss for p in run.curve], [p.ood_loss for p in run.curve])


def test_an_arm_off_the_scale_is_named_and_hides_no_other(draw):
    drawn = draw(make_records(ARMS | {"broken": -3.0}))
    late = drawn["ood_against_train.png"].axes[0]
    assert late.get_ylim()[1] - late.get_ylim()[0] < 0.3
    texts = [text.get_text() for axes in drawn["ood_against_train.png"].axes for text in axes.texts]
    assert len(texts) == 1 and texts[0].startswith("off scale, with the difference to the baseline: broken (+")
    assert drawn["losses.png"].axes[3].get_ylim()[1] < 0.3
    assert "broken (+" in drawn["losses.png"].axes[3].texts[0].get_text()
    distances = drawn["distance_against_ood.png"].axes[0]
    assert distances.get_ylim()[0] > -0.3 and distances.texts[0].get_text() == texts[0]


def test_an_arm_has_no_difference_to_a_diverged_baseline(draw):
    records = make_records(ARMS | {"broken": -3.0})
    records[0] = make_run("adamw", 1, nan_from=5)
    (late,) = draw(records)["ood_against_train.png"].axes
    assert [text.get_text() for text in late.texts] == ["off scale: broken"]


def test_losses_show_differences_at_the_same_seed(draw):
    records = [run for run in make_records(ARMS) if (run.arm, run.seed) != ("nexus-0.05", 2)]
    panels = [axes for axes in draw(records)["losses.png"].axes if axes.axison]
    titles = [axes.get_title(loc="left") for axes in panels[::2]]
    sources = [f"validation loss on {name}" for name in SOURCES]
    assert titles == ["validation loss", "OOD loss", *sources, "OOD loss on cpp", "OOD loss on law"]
    steps = [point.step for point in records[0].curve]
    assert holds(lines(panels[2]), steps, mean_of(records, "nexus-0.05", "ood_loss"))
    by = {(run.arm, run.seed): [point.ood_loss for point in run.curve] for run in records}
    pairs = [zip(by["nexus-0.05", seed], by["adamw", seed], strict=True) for seed in (1, 3)]
    gaps = list(zip(*[[ours - theirs for ours, theirs in pair] for pair in pairs], strict=True))
    assert holds(lines(panels[3]), steps, [sum(gap) / 2 for gap in gaps])
    bars = [bar.get_segments()[0][:, 1] for bar in panels[3].collections if type(bar).__name__ == "LineCollection"]
    found = mean(gaps[-1])
    assert any(list(bar) == pytest.approx([found.low, found.high]) for bar in bars)


def test_a_diverged_run_leaves_a_gap_and_is_in_the_legend(draw):
    diverged = make_run("nexus", 2, nan_from=9)
    drawn = draw([make_run("adamw", 1), make_run("nexus", 1, 0.02), make_run("adamw", 2), diverged])
    means = [y for x, y in lines(drawn["losses.png"].axes[0]) if len(x) == 21]
    assert [sum(map(math.isnan, y)) for y in means] == [0, 12]
    labels = [text.get_text().strip() for text in drawn["losses.png"].legends[0].get_texts()]
    assert labels == ["adamw (2 seeds)", "nexus (2 seeds, 1 diverged)"]


def test_cosines_are_means_over_pairs_and_seeds(records, drawn):
    gradients, path = drawn["cosines.png"].axes
    runs = [[sum(v for *_, v in pairs) / len(pairs) for _, pairs in run.cosines] for run in records[:3]]
    means = [sum(values) / 3 for values in zip(*runs, strict=True)]
    assert holds(lines(gradients), [step for step, _ in records[0].cosines], means)
    assert "moving mean of 11 logged values" in path.get_title(loc="left")
    steps, values = max(lines(path), key=lambda line: len(line[0]))
    runs = [[row["path_cosine"] for row in run.path[20:31]] for run in records if run.arm == "normalized"]
    assert values[25] == pytest.approx(sum(map(sum, runs)) / 33) and steps[25] == 250
    assert len(lines(path)) == 3  # zero, and the two arms that log one


def test_smoothing_keeps_gaps_and_does_not_widen_them():
    spread = plots._spread([dict(enumerate([1.0, 2.0, math.nan, 4.0, 6.0]))])
    assert plots._smoothed(spread, 3)[1] == pytest.approx([1.5, 1.5, math.nan, 5.0, 5.0], nan_ok=True)


def test_distances_are_means_over_runs_on_one_scale(records, drawn):
    *panels, _ = drawn["minima_distance.png"].axes
    assert len(panels) == len(ARMS) and len({axes.images[0].get_clim() for axes in panels}) == 1
    values = [100 * run.minima.pairwise[0][2] / 40.0 for run in (records[0], records[2])]
    matrix = panels[0].images[0].get_array()
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(sum(values) / 2)
    assert f"{sum(values) / 2:.1f}" in [text.get_text() for text in panels[0].texts]
    assert "2 seeds" in panels[0].get_title(loc="left") and "3 seeds" in panels[1].get_title(loc="left")


def test_the_landscape_marks_and_names_the_minimizers(records, drawn):
    figure = drawn["landscape.png"]
    figure.draw_without_rendering()
    plane, minima = figure.axes[0], records[0].minima
    assert [[x[0], y[0]] for x, y in lines(plane)] == minima.plane["points"]
    named = zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True)
    marks = {text.get_text().strip(): handle.get_marker() for text, handle in named}
    assert list(marks) == [*SOURCES, "end of run"]
    assert list(marks.values()) == [line.get_marker() for line in plane.lines] and len({*marks.values()}) == 4
    segments = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("loss on segments"))
    assert all(holds(lines(segments), minima.positions, losses) for _, _, losses in minima.segments)
    assert f"barrier {minima.barriers[0][2]:.3g}" in segments.get_legend().get_texts()[0].get_text()


def test_distance_against_gain_marks_each_arm_and_each_run(records, drawn):
    found = lines(drawn["distance_against_ood.png"].axes[0])
    runs = [run for run in records if run.arm == "nexus-0.05"]
    x = [100 * run.minima.relative_distance for run in runs]
    y = [base.end.ood_loss - run.end.ood_loss for base, run in zip(records, runs, strict=False)]
    assert holds(found, x, y) and holds(found, [sum(x) / 3], [sum(y) / 3])


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(make_records({"adamw": 0.0}, (1,), points=1), marks=pytest.mark.slow),
        pytest.param(make_records(ARMS, (1,), points=1, sources=("one",)), marks=pytest.mark.slow),
        pytest.param([make_run("adamw", 1), make_run("nexus", 2, 0.02)], marks=pytest.mark.slow),
        pytest.param(make_records(ARMS, (1,), nan_from=0), marks=pytest.mark.slow),
        [make_run("adamw", 1, nan_from=5), make_run("_a$b^{", 1, 0.02, sources=("_x", "$y", "z%{"))],
        pytest.param(
            make_records({"adamw": 0.0} | {f"{i} arm of a fairly long name {i}": 0.01 * i for i in range(8)}, (1,)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one point", "one source", "no common seed", "all diverged", "odd names", "many arms"],
)
@pytest.mark.filterwarnings("error")
def test_records_of_every_kind_can_be_drawn(draw, records):
    drawn = draw(records)
    assert drawn
    for figure in drawn.values():
        figure.draw_without_rendering()


def test_matplotlib_is_imported_when_drawing_and_pyplot_never(tmp_path):
    code = (
        "import sys; from hf_nexus.compare.plots import plot_comparison;"
        "from hf_nexus.compare.records import LossPoint, RunRecord;"
        "assert 'matplotlib' not in sys.modules; losses = {'a': 1.0};"
        "run = RunRecord('adamw', 1, curve=[LossPoint(1, 1, losses, losses, {}, 1.0, 1.0, None)]);"
        f"assert plot_comparison([run], {str(tmp_path)!r}, baseline='adamw');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("values", [[0.1] * 3, [0.1]])
def test_equal_values_and_a_single_run_have_no_interval(values):
    assert 0.0 <= plots._half(plots._spread({0: value} for value in values)) < 1e-15


def test_each_plot_says_what_it_shows_and_what_is_better(drawn):
    titles = {name: figure.get_suptitle() for name, figure in drawn.items()}
    assert titles.keys() == {*ALL} and all(titles.values())
    better = re.compile("better|closer|agree")
    for name, figure in drawn.items():
        texts = [titles[name], *(axes.get_title(loc="left") for axes in figure.axes)]
        assert any(better.search(text) for text in texts) and not any("range" in text for text in texts)
