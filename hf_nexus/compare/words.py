"""What the numbers of a comparison support, in words: nothing is said that a number in its tables does not say."""

from collections.abc import Iterable

from ..evaluation.statistics import Correlation
from .analysis import MIN_PAIRS, Analysis, Row
from .tables import decisive_p, difference_text, figure_label, is_primary, p_text, rounded

__all__ = ["gaps", "reading"]

_LEVEL = 0.05
# Single comparisons that are named in words; the rest is in the tables.
_NAMED = 12


def reading(analysis: Analysis) -> list[str]:
    """
    Paragraphs and lists in Markdown: the primary comparison first, then the others, the controls, the correlation.

    Example:
        >>> from hf_nexus.compare.analysis import compare_arms
        >>> from hf_nexus.compare.words import reading
        >>> reading(compare_arms([], baseline="adamw", primary=("nexus", "ood_loss")))[0]
        '**No conclusion** on the primary comparison, OOD loss of nexus against adamw: no seed has it for both arms.'
    """
    return [
        _primary(analysis),
        *_matched(analysis),
        *_controls(analysis),
        *_others(analysis),
        *_correlation(analysis),
        "Training loss is the loss at restored weights on one fixed sample of training rows, the same for all arms. "
        "The path loss that training logs is taken at displaced weights: it is not compared.",
    ]


def gaps(analysis: Analysis) -> list[str]:
    """What is missing or went wrong, one line each: a reader must know it before the tables."""
    lines = [f"{arm}: no run for {_seeds(seeds)}." for arm, seeds in analysis.missing.items()]
    for arm, seed, figures in analysis.non_finite:
        if "train_loss" in figures:
            lines.append(f"{arm}, seed {seed}: diverged. Nothing of this run is in a mean or a test.")
            continue
        more = f" and {len(figures) - 3} more" if len(figures) > 3 else ""
        names = ", ".join(map(figure_label, figures[:3]))
        lines.append(f"{arm}, seed {seed}: {names}{more} not finite, and in no mean or test.")
    bound, searches = analysis.unconverged
    if bound:
        lines.append(
            f"{bound} of {searches} searches for a minimizer ended at their bound, before the held-out loss had "
            "stopped improving: these minima distances depend on the bound."
        )
    return lines


def _primary(analysis: Analysis) -> str:
    arm, figure = analysis.primary
    row = analysis.row(arm, figure)
    what = f"on the primary comparison, {figure_label(figure)} of {arm} against {analysis.baseline}"
    if row is None or row.difference is None:
        return f"**No conclusion** {what}: no seed has it for both arms."
    found, said = row.difference, _says(row, analysis)
    if found.n < MIN_PAIRS:
        return (
            f"**No conclusion** {what}: {_count(found.n, 'seed has', 'seeds have')} it for both arms, and with fewer "
            f"than {MIN_PAIRS} a difference cannot be told from chance. Measured: {said}."
        )
    if found.p is None or found.half is None:
        return (
            f"**No conclusion** {what}: {said}, by the same amount at each of {found.n} seeds, so there is no spread "
            "to judge it by. Do the seeds change anything in these runs?"
        )
    limits = _limits(analysis)
    if found.p < _LEVEL:
        favour = ""
        if _is_loss(figure):
            favour = f", {'in favour of' if found.mean < 0 else 'against'} {arm}"
        return f"Primary comparison: {said}. This **supports a difference**{favour}.{limits}"
    return (
        f"Primary comparison: {said}. **No effect was found**: a difference smaller than "
        f"{rounded(found.half, found.half)} could not have been seen with these runs.{limits}"
    )


def _limits(analysis: Analysis) -> str:
    """What the primary comparison does not cover."""
    arms, figure = (analysis.primary[0], analysis.baseline), analysis.primary[1]
    diverged = [
        f"{a}, seed {s}" for a, s, wrong in analysis.non_finite if a in arms and {figure, "train_loss"} & {*wrong}
    ]
    missing = [f"{a}, {_seeds(seeds)}" for a, seeds in analysis.missing.items() if a in arms]
    text = ""
    if diverged:
        text += f" It holds only for runs that stay finite, and is without {'; '.join(diverged)}, which did not."
    if missing:
        text += f" Not all runs that were planned are in it: missing are {'; '.join(missing)}."
    return text


def _matched(analysis: Analysis) -> Iterable[str]:
    arm, figure = analysis.primary
    train, row = analysis.row(arm, "train_loss"), analysis.row(arm, figure, "matched")
    if train is not None and train.difference is not None and figure != "train_loss":
        yield f"At the end, {_says(train, analysis)}: {_verdict(train, analysis)}."
    if row is not None and row.difference is not None:
        yield f"At matched training loss, {_says(row, analysis)}: {_verdict(row, analysis)}."


def _controls(analysis: Analysis) -> Iterable[str]:
    arm, figure = analysis.primary
    row = analysis.row(arm, figure)
    if row is None or row.difference is None:
        return
    p = row.difference.p
    for control, kind in analysis.controls.items():
        itself, direct = analysis.row(control, figure), analysis.row(arm, figure, versus=control)
        text = [f"Control by {kind}, {control}."]
        for said in (itself, direct):
            if said is not None and said.difference is not None:
                text.append(f"{_capital(_says(said, analysis))}: {_verdict(said, analysis)}.")
        if p is None or p >= _LEVEL:
            text.append("There is no established effect that it could explain.")
        elif direct is not None and direct.difference is not None:
            text.append(_explains(kind, direct, row.difference.mean, analysis))
        yield " ".join(text)
    if lacking := [kind for kind in ("gamma 0", "random direction") if kind not in analysis.controls.values()]:
        yield f"Not run: a control by {' or '.join(lacking)}. Whether that would do the same is not known."


def _explains(kind: str, direct: Row, effect: float, analysis: Analysis) -> str:
    p = decisive_p(direct, analysis)
    assert direct.difference is not None
    if p is not None and p < _LEVEL:
        if direct.difference.mean * effect > 0:
            return f"So {kind} alone does not explain the effect."
        return f"So {kind} alone does more than {direct.arm}."
    return f"So it is open whether {kind} explains the effect as well: the two could not be told apart."


def _others(analysis: Analysis) -> Iterable[str]:
    compared = [row for row in analysis.rows if row.difference is not None and not is_primary(row, analysis)]
    tested = [(row, p) for row in compared if (p := decisive_p(row, analysis)) is not None]
    found = sorted((pair for pair in tested if pair[1] < _LEVEL), key=lambda pair: pair[1])
    if tested:
        text = f"Of the {len(tested)} other comparisons that could be tested, corrected together by Holm's method, "
        text += f"{len(found)} {'is' if len(found) == 1 else 'are'} significant" if found else "none is significant"
        items = [
            f"- {'At matched training loss: ' * (row.where == 'matched')}{_says(row, analysis)}" for row, _ in found
        ]
        if len(items) > _NAMED:
            items = [*items[:_NAMED], f"- and {len(items) - _NAMED} more, in the tables"]
        yield "\n".join([f"{text}{':' if found else '.'}", *([""] if items else []), *items])
    few = sum(row.difference is not None and row.difference.n < MIN_PAIRS for row in compared)
    same = len(compared) - len(tested) - few
    if few:
        yield f"Not tested, for fewer than {MIN_PAIRS} paired seeds: {_count(few, 'comparison', 'comparisons')}."
    if same:
        yield f"Not tested, because every seed gave the same difference: {_count(same, 'comparison', 'comparisons')}."


def _correlation(analysis: Analysis) -> Iterable[str]:
    arms, runs = analysis.across_arms, analysis.across_runs
    if "minima_distance" not in analysis.figures or "ood_loss" not in analysis.figures:
        yield "Whether closer minima go with lower OOD loss cannot be said: it takes minima searches and OOD sources."
        return
    if arms is None:
        yield "Whether closer minima go with lower OOD loss cannot be said: it takes at least 3 arms that differ."
        return
    text = (
        f"Relative minima distance and OOD gain over {analysis.baseline}, across {arms.n} arms (the baseline among "
        f"them at gain 0): {_correlated(arms, True)}."
    )
    if runs is not None:
        text += f" Across the {runs.n} runs of the other arms: {_correlated(runs, False)} (they share seeds and "
        text += "baselines, so no p-value)."
    yield (
        f"{text} If closer minima go with a larger gain, these are negative. They are not corrected for other "
        "comparisons, and a correlation is no cause."
    )


def _correlated(found: Correlation, with_p: bool) -> str:
    ps = [f" (p {p_text(p)})" if with_p else "" for p in (found.pearson_p, found.spearman_p)]
    return f"Pearson's r {found.pearson:+.2f}{ps[0]}, Spearman's rho {found.spearman:+.2f}{ps[1]}"


def _says(row: Row, analysis: Analysis) -> str:
    """One comparison in words, with its interval, p-values and pairs."""
    found = row.difference
    assert found is not None
    text = f"the {figure_label(row.figure)} of {row.arm} is {difference_text(found)} that of {row.versus}"
    details = []
    if found.low is not None and found.high is not None:
        low, high = (rounded(end, found.half, "+") for end in (found.low, found.high))
        details.append(f"95 % interval of the difference {low} to {high}")
    if found.p is not None:
        shown = p_text(found.p)
        details.append(f"p {shown if shown.startswith('<') else f'= {shown}'}")
    if row.p_holm is not None:
        details.append(f"corrected {p_text(row.p_holm)}")
    return f"{text} ({', '.join([*details, _count(found.n, 'paired seed', 'paired seeds')])})"


def _verdict(row: Row, analysis: Analysis) -> str:
    p, found = decisive_p(row, analysis), row.difference
    assert found is not None
    if p is None:
        return "too few seeds to test it" if found.n < MIN_PAIRS else "so at every seed, which cannot be tested"
    return "significant" if p < _LEVEL else "not significant"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _is_loss(figure: str) -> bool:
    return figure.endswith("loss") or figure.startswith(("validation/", "ood/"))


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
