"""Conclusions of a comparison in sentences, each with its numbers from the tables of the report."""

import math
from collections.abc import Iterable

from ..evaluation.statistics import Correlation
from .analysis import MIN_PAIRS, Analysis, Row
from .records import metric_label

__all__ = ["conclusions", "limitations", "p_text", "rounded"]

_LEVEL = 0.05
# Significant comparisons that are listed; the tables have all.
_LISTED = 12


def conclusions(analysis: Analysis) -> list[str]:
    """
    Paragraphs in Markdown: the primary comparison, the controls, all other comparisons, and the correlation.

    Example:
        >>> from hf_nexus.compare.analysis import compare_arms
        >>> from hf_nexus.compare.conclusions import conclusions
        >>> conclusions(compare_arms([], baseline="adamw", primary=("nexus", "ood_loss")))[0]
        '**No conclusion** on the primary comparison: no seed has the OOD loss of both nexus and adamw.'
    """
    return [
        _primary(analysis),
        *_primary_elsewhere(analysis),
        *_controls(analysis),
        *_others(analysis),
        _correlation(analysis),
        "Training loss is measured at restored weights on a fixed sample of training rows, the same for all arms. The "
        "`loss` that training logs is a path loss at displaced weights, and is not compared.",
    ]


def limitations(analysis: Analysis) -> list[str]:
    """Missing runs, values that are not finite, and minima searches that did not converge, one line each."""
    lines = [f"{arm}: no run for {_seeds(seeds)}." for arm, seeds in analysis.missing.items()]
    for arm, seed, metrics in analysis.non_finite:
        if "train_loss" in metrics:
            lines.append(f"{arm}, seed {seed}: diverged. No value of this run is in a mean or a test.")
            continue
        more = f" and {len(metrics) - 3} more" if len(metrics) > 3 else ""
        lines.append(f"{arm}, seed {seed}: not finite, and in no mean or test: {', '.join(metrics[:3])}{more}.")
    unconverged, searches = analysis.unconverged
    if unconverged:
        lines.append(
            f"{unconverged} of {searches} minima searches did not converge within `max_steps`. Their minima distances "
            "depend on `max_steps`."
        )
    return lines


def rounded(value: float, half: float | None, sign: str = "") -> str:
    """Four decimals, or more for two significant digits of `half`, half the width of the interval."""
    digits = 4 if not half else min(9, max(4, 1 - math.floor(math.log10(half))))
    return f"{value:{sign}.{digits}f}"


def p_text(p: float) -> str:
    """
    A p-value with enough digits to compare it with 0.05.

    Example:
        >>> p_text(0.0002), p_text(0.0496), p_text(0.5)
        ('p < 0.001', 'p = 0.0496', 'p = 0.500')
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.4f}" if 0.045 < p < 0.055 else f"p = {p:.3f}"


def _primary(analysis: Analysis) -> str:
    arm, metric = analysis.primary
    row = analysis.row(arm, metric)
    nothing = "**No conclusion** on the primary comparison:"
    if row is None or row.difference is None:
        return f"{nothing} no seed has the {metric_label(metric)} of both {arm} and {analysis.baseline}."
    found, measured = row.difference, _sentence(row)
    if found.n < MIN_PAIRS:
        return f"{nothing} {_count(found.n, 'paired seed')}, and a test needs {MIN_PAIRS} or more. {measured}"
    if found.p is None or found.half is None:
        return (
            f"{nothing} the difference is the same at all {found.n} seeds, which leaves no spread to test. Check that "
            f"the seed changes these runs. {measured}"
        )
    if found.p < _LEVEL:
        favour = f", {'in favour of' if found.mean < 0 else 'against'} {arm}" if _is_loss(metric) else ""
        verdict = f"This **supports a difference**{favour}."
    else:
        verdict = f"**Inconclusive**: differences below {rounded(found.half, found.half)} could not have been seen."
    return f"Primary comparison. {measured} {verdict}{_left_out(analysis)}"


def _left_out(analysis: Analysis) -> str:
    """The runs that the primary comparison lacks."""
    arms, metrics = (analysis.primary[0], analysis.baseline), {analysis.primary[1], "train_loss"}
    diverged = [
        f"{arm}, seed {seed}" for arm, seed, found in analysis.non_finite if arm in arms and metrics & {*found}
    ]
    missing = [f"{arm}, {_seeds(seeds)}" for arm, seeds in analysis.missing.items() if arm in arms]
    text = f" It holds only for runs that stay finite; left out: {'; '.join(diverged)}." if diverged else ""
    return text + (f" Planned runs are missing: {'; '.join(missing)}." if missing else "")


def _primary_elsewhere(analysis: Analysis) -> Iterable[str]:
    """The primary arm's training loss, and its primary metric at matched training loss."""
    arm, metric = analysis.primary
    train = analysis.row(arm, "train_loss") if metric != "train_loss" else None
    for row in (train, analysis.row(arm, metric, "matched")):
        if row is not None and row.difference is not None:
            yield f"{_sentence(row)} {_verdict(row, analysis)}"


def _controls(analysis: Analysis) -> Iterable[str]:
    arm, metric = analysis.primary
    row = analysis.row(arm, metric)
    if row is None or row.difference is None:
        return
    for control, kind in analysis.controls.items():
        text = [f"Control {control} ({kind})."]
        direct = analysis.row(arm, metric, versus=control)
        for compared in (analysis.row(control, metric), direct):
            if compared is not None and compared.difference is not None:
                text.append(f"{_sentence(compared)} {_verdict(compared, analysis)}")
        if row.difference.p is None or row.difference.p >= _LEVEL:
            text.append("The primary comparison is inconclusive, so there is no effect to explain yet.")
        elif direct is not None and direct.difference is not None:
            text.append(_explanation(kind, direct, row.difference.mean, analysis))
        yield " ".join(text)
    if lacking := [kind for kind in ("gamma 0", "random direction") if kind not in analysis.controls.values()]:
        yield f"No control by {' or '.join(lacking)} was run. Whether it would have the same effect is not known."


def _explanation(kind: str, direct: Row, effect: float, analysis: Analysis) -> str:
    p = analysis.p_value(direct)
    assert direct.difference is not None
    if p is None or p >= _LEVEL:
        return f"Whether {kind} explains the effect is open: the two arms do not differ significantly."
    if direct.difference.mean * effect > 0:
        return f"So {kind} alone does not explain the effect."
    return f"So {kind} alone has a larger effect than {direct.arm}."


def _others(analysis: Analysis) -> Iterable[str]:
    compared = [row for row in analysis.rows if row.difference is not None and not analysis.is_primary(row)]
    tested = [(row, p) for row in compared if (p := analysis.p_value(row)) is not None]
    found = [row for row, p in sorted(tested, key=lambda pair: pair[1]) if p < _LEVEL]
    if tested:
        text = f"{_count(len(tested), 'other comparison')} tested, with p-values corrected together by Holm's method. "
        text += f"{len(found)} {'is' if len(found) == 1 else 'are'} significant:" if found else "None is significant."
        items = [f"- {_sentence(row)}" for row in found[:_LISTED]]
        if len(found) > _LISTED:
            items.append(f"- and {len(found) - _LISTED} more, in the tables")
        yield "\n".join([text, *([""] if items else []), *items])
    few = sum(row.difference is not None and row.difference.n < MIN_PAIRS for row in compared)
    same = len(compared) - len(tested) - few
    if few:
        yield f"{_count(few, 'comparison')} not tested: fewer than {MIN_PAIRS} paired seeds."
    if same:
        yield f"{_count(same, 'comparison')} not tested: the difference is the same at every seed."


def _correlation(analysis: Analysis) -> str:
    what = f"Correlation of relative minima distance and OOD gain over {analysis.baseline}"
    arms, runs = analysis.across_arms, analysis.across_runs
    if not {"minima_distance", "ood_loss"} <= {*analysis.metrics}:
        return f"{what}: needs minima searches and OOD sources."
    if arms is None:
        return f"{what}: needs at least 3 arms that differ."
    text = f"{what}, {arms.n} arms ({analysis.baseline} at gain 0): {_coefficients(arms, with_p=True)}."
    if runs is not None:
        text += f" {runs.n} runs of the other arms: {_coefficients(runs, with_p=False)}; no p-value, since runs share "
        text += "seeds and baselines."
    return (
        f"{text} Negative values mean that closer minima go with a larger gain. The p-values are not corrected, and "
        "correlation is not causation."
    )


def _coefficients(found: Correlation, with_p: bool) -> str:
    ps = [f" ({p_text(p)})" if with_p else "" for p in (found.pearson_p, found.spearman_p)]
    return f"Pearson's r {found.pearson:+.2f}{ps[0]}, Spearman's rho {found.spearman:+.2f}{ps[1]}"


def _sentence(row: Row) -> str:
    """One comparison with its interval, p-values and pairs."""
    found = row.difference
    assert found is not None
    label = metric_label(row.metric) + " at matched training loss" * (row.where == "matched")
    change = f"is {rounded(abs(found.mean), found.half)} {'lower' if found.mean < 0 else 'higher'} than"
    details = []
    if found.low is not None and found.high is not None:
        low, high = (rounded(end, found.half, "+") for end in (found.low, found.high))
        details.append(f"95 % interval{', not corrected,' * (row.p_holm is not None)} {low} to {high}")
    if found.p is not None:
        details.append(p_text(found.p))
    if row.p_holm is not None:
        details.append(f"Holm-corrected {p_text(row.p_holm)}")
    details.append(_count(found.n, "paired seed"))
    label = label[:1].upper() + label[1:]
    return f"{label}: {row.arm} {change if found.mean else 'equals'} {row.versus} ({', '.join(details)})."


def _verdict(row: Row, analysis: Analysis) -> str:
    p, found = analysis.p_value(row), row.difference
    assert found is not None
    if p is None:
        return "Not tested: too few seeds." if found.n < MIN_PAIRS else "Not tested: the same at every seed."
    return "Significant." if p < _LEVEL else "Not significant."


def _is_loss(metric: str) -> bool:
    return metric.endswith("loss") or metric.startswith(("validation/", "ood/"))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
