"""Conclusions of a comparison in sentences, each with its numbers from the tables of the report."""

import math
from collections.abc import Iterable

from ..evaluation.statistics import ALPHA, POWER, detectable, pairs_needed
from .analysis import MIN_PAIRS, Analysis, Row, Where
from .controls import CONTROLS
from .records import metric_label

__all__ = ["conclusions", "limitations", "p_text", "plain_words", "rounded"]

# Exploratory comparisons with a low p-value that are listed; the tables have all.
_LISTED = 12
# Interpolation may move a difference at matched training loss by this fraction of half its interval. Beyond, the
# evaluations are too sparse.
_INTERPOLATION = 0.2
# How a p-value is named, by the role of its comparison.
_KINDS = {"primary": "", "family": "Holm-corrected ", "exploratory": "exploratory, not corrected, "}
# How much of the primary difference a control has.
_ALL = "gives the effect, to within {margin:g}"
_SOME = "gives a part of the effect or all of it"
_PART = "gives a part of the effect, and not all of it"
_NOT_ALL = "does not give the whole effect, and whether it gives a part is open"
_NONE = "does not give the effect"
_MORE = "has a larger effect than {arm}"
_OPEN = "gives perhaps all of the effect, and perhaps nothing"
_NOT_KNOWN = "has an effect that is not known"


def conclusions(analysis: Analysis) -> list[str]:
    """
    Paragraphs in Markdown: the primary comparison, the controls, all other comparisons, and the correlation.

    Example:
        >>> from hf_nexus.compare.analysis import Test, compare_arms
        >>> from hf_nexus.compare.conclusions import conclusions
        >>> conclusions(compare_arms([], Test("nexus", "adamw", "ood_loss", "end")))[0]
        '**No conclusion** on the primary comparison: no seed has the OOD loss of both nexus and adamw.'
    """
    return [
        _primary(analysis),
        *_primary_elsewhere(analysis),
        *_controls(analysis),
        *_others(analysis),
        _correlation(analysis),
        f'Differences "that could not have been seen" are those that a paired t-test with as many seeds and this '
        f"spread finds in less than {100 * POWER:.0f} % of all studies (two-sided, alpha {ALPHA}, in the declared "
        "family divided by its size).",
        "Training loss is measured at restored weights on a fixed sample of training rows, the same for all arms. The "
        "`loss` that training logs is a path loss at displaced weights, and is not compared.",
    ]


def plain_words(analysis: Analysis) -> str:
    """
    The question and its answer, for a reader who knows no statistics.

    Example:
        >>> from hf_nexus.compare.analysis import Test, compare_arms
        >>> from hf_nexus.compare.conclusions import plain_words
        >>> plain_words(compare_arms([], Test("nexus", "adamw", "ood_loss", "end"))).partition(".")[0]
        'Each of the 2 arms is one way to train the same model'
    """
    (arm, _, metric, where), row = analysis.primary, analysis.primary_row
    found = row.difference if row is not None else None
    label = _label(metric, where)
    text = (
        f"Each of the {len(analysis.arms)} arms is one way to train the same model. An arm is trained several times, "
        f"each time from another random start (a seed), because a single run may be better by luck. The question was "
        f"chosen before the runs: how does the {label} of {arm} differ from that of {analysis.baseline}? "
    )
    text += "A loss measures how badly a model predicts text: lower is better. " * _is_loss(metric)
    text += "OOD stands for text of kinds that no arm was trained on. " * (metric == "ood_loss")
    text += "The arms are compared where they fit their training text equally well. " * (where == "matched")
    if found is not None and found.p is None and found.n >= MIN_PAIRS:
        return f"{text}The difference is {rounded(found.mean, None)} at every seed, which leaves nothing to test."
    if row is None or found is None or found.p is None or found.deviation is None:
        return text + "There are too few finished runs for an answer."
    change = f"{rounded(abs(found.mean), found.half)} {'lower' if found.mean < 0 else 'higher'}"
    text += f"On average over {_count(found.n, 'seed')}, it is {change}. "
    if found.p < ALPHA:
        text += (
            "Luck alone rarely gives so clear a difference (in at most 5 of 100 studies without any effect), so it is "
            "probably real. "
        )
    if _alike(row):
        text += f"The true difference is probably smaller than {analysis.margin:g}, which does not matter. "
    elif found.p >= ALPHA:
        unseen = _unseen(row, analysis)
        text += (
            "Luck alone could explain this, so the question stays open. That is not the same as no difference: so few "
            f"seeds reliably show only differences above {rounded(unseen, unseen)}. To see one half as large, about "
            f"{pairs_needed(unseen / 2, found.deviation)} seeds are needed. "
        )
    return f"{text.rstrip()}{_left_out(analysis)} {_plain_controls(analysis)}"


def _plain_controls(analysis: Analysis) -> str:
    """What the controls show of a difference that matters, in one sentence."""
    arm, row = analysis.primary.arm, analysis.primary_row
    if not analysis.controls:
        return f"No arm lacks just one ingredient of {arm}, so nothing shows which of them has an effect."
    text = f"Other arms lack one ingredient of {arm} each"
    if row is None or not _differs(row) or _alike(row):
        return f"{text}. No difference that matters was found, which they could explain."
    return f"{text}, and show what the rest does: {'; '.join(_share(analysis, each) for each in analysis.controls)}."


def limitations(analysis: Analysis) -> list[str]:
    """
    Missing runs, changes after the first results, values that are not finite, and minima searches that did not
    converge, one line each.
    """
    lines = [f"{arm}: no run for {_seeds(seeds)}." for arm, seeds in analysis.missing.items()]
    arms, seeds = analysis.declared or (analysis.arms, analysis.seeds)
    if added := [arm for arm in analysis.arms if arm not in arms]:
        lines.append(f"{', '.join(added)}: added after the first results, so no comparison with it is in the family.")
    if {*seeds} != {*analysis.seeds}:
        lines.append(
            f"Declared before the first results: {_seeds(seeds)}; now: {_seeds(analysis.seeds)}. No p-value allows "
            "for seeds that are added or removed after results were seen."
        )
    if analysis.ignored:
        lines.append(
            f"Finished runs that the configuration no longer names are in no number: {', '.join(analysis.ignored)}."
        )
    for arm, seed, metrics in analysis.non_finite:
        if "train_loss" in metrics:
            lines.append(f"{arm}, seed {seed}: diverged. No value of this run is in a mean or a test.")
            continue
        more = f" and {len(metrics) - 3} more" if len(metrics) > 3 else ""
        lines.append(f"{arm}, seed {seed}: not finite, and in no mean or test: {', '.join(metrics[:3])}{more}.")
    for arm, (_, names) in analysis.unclean.items():
        fields = " and ".join(names)
        lines.append(f"{arm}: no control of {analysis.primary.arm}, since they differ in {fields} as well.")
    unconverged, searches = analysis.unconverged
    if unconverged:
        lines.append(
            f"{unconverged} of {searches} minima searches did not converge within `max_steps`. Their minima distances "
            "depend on `max_steps`."
        )
    for row in analysis.rows:
        half = row.difference.half or 0.0 if row.difference is not None else math.inf
        if row.metric == analysis.primary.metric and row.interpolation > _INTERPOLATION * half:
            lines.append(
                f"{row.arm} against {row.versus}: the evaluations are too sparse around the matched training loss. "
                f"Interpolation may move the difference of the {metric_label(row.metric)} by up to "
                f"{rounded(row.interpolation, row.interpolation)}. Lower `eval_steps`."
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
    (arm, _, metric, where), row = analysis.primary, analysis.primary_row
    nothing = "**No conclusion** on the primary comparison:"
    if row is None or row.difference is None:
        return f"{nothing} no seed has the {_label(metric, where)} of both {arm} and {analysis.baseline}."
    found, measured = row.difference, _sentence(row)
    if found.n < MIN_PAIRS:
        return f"{nothing} {_count(found.n, 'paired seed')}, and a test needs {MIN_PAIRS} or more. {measured}"
    if found.p is None:
        return (
            f"{nothing} the difference is the same at all {found.n} seeds, which leaves no spread to test. Check that "
            f"the seed changes these runs. {measured}"
        )
    return f"Primary comparison. {measured} {_verdict(row, analysis)}{_left_out(analysis)}"


def _left_out(analysis: Analysis) -> str:
    """The runs that the primary comparison lacks."""
    arms, metrics = analysis.primary[:2], {analysis.primary.metric, "train_loss"}
    diverged = [
        f"{arm}, seed {seed}" for arm, seed, found in analysis.non_finite if arm in arms and metrics & {*found}
    ]
    missing = [f"{arm}, {_seeds(seeds)}" for arm, seeds in analysis.missing.items() if arm in arms]
    text = f" It holds only for runs that stay finite; left out: {'; '.join(diverged)}." if diverged else ""
    text += f" Planned runs are missing: {'; '.join(missing)}." if missing else ""
    changed = analysis.declared is not None and {*analysis.declared[1]} != {*analysis.seeds}
    return text + " The seeds are not those that were declared: see the limitations." * changed


def _primary_elsewhere(analysis: Analysis) -> Iterable[str]:
    """The primary arm's training loss, and its primary metric at matched training loss or at the end."""
    arm, _, metric, where = analysis.primary
    train = analysis.row(arm, "train_loss") if metric != "train_loss" else None
    for row in (train, analysis.row(arm, metric, "end" if where == "matched" else "matched")):
        if row is not None and row.difference is not None:
            yield f"{_sentence(row)} {_verdict(row, analysis)}"


def _controls(analysis: Analysis) -> Iterable[str]:
    (arm, _, metric, where), row = analysis.primary, analysis.primary_row
    if row is None or row.difference is None:
        return
    for control, kind in analysis.controls.items():
        text = [f"Control {control} ({kind}) shows the effect that {CONTROLS[kind].remains} has alone."]
        rows = (analysis.row(control, metric, where), analysis.row(arm, metric, where, versus=control))
        compared = [each for each in rows if each is not None and each.difference is not None]
        text += [f"{_sentence(each)} {_verdict(each, analysis)}" for each in compared]
        if not compared:
            text.append("It has no runs to compare.")
        elif not _differs(row):
            text.append("The primary comparison shows no difference that this control could explain.")
        elif _alike(row):
            text.append("The primary comparison shows no difference that matters, which this control could explain.")
        else:
            text.append(f"So {_share(analysis, control)}.")
        yield " ".join(text)
    needed = ("gamma 0", "random direction", "source mixing")
    if lacking := [kind for kind in needed if kind not in (*analysis.controls.values(), analysis.baseline_kind)]:
        kinds = " or ".join(", ".join(lacking).rsplit(", ", 1))
        line = f"No control by {kinds} was run. Whether it would have the same effect is not known."
        unclean = ", ".join(arm for arm, (kind, _) in analysis.unclean.items() if kind in lacking)
        yield line + f" The limitations say what disqualifies {unclean}." * bool(unclean)


def _share(analysis: Analysis, control: str) -> str:
    """How much of the primary difference a control has, by its differences to the baseline and to the primary arm."""
    (arm, _, metric, where), row = analysis.primary, analysis.primary_row
    own, direct = analysis.row(control, metric, where), analysis.row(arm, metric, where, versus=control)
    assert row is not None and row.difference is not None
    effect, share = row.difference.mean, _OPEN
    if own is None or own.difference is None or direct is None or direct.difference is None:
        share = _NOT_KNOWN
    elif _alike(direct) and not _alike(own):  # the margin may be as wide as most of the effect
        share = _ALL
    elif _differs(direct) and direct.difference.mean * effect < 0:
        share = _MORE
    elif _differs(own):
        share = _NONE if own.difference.mean * effect < 0 else _PART if _differs(direct) else _SOME
    elif _differs(direct):
        share = _NONE if _alike(own) else _NOT_ALL
    return f"{CONTROLS[analysis.controls[control]].remains} alone {share.format(margin=analysis.margin, arm=arm)}"


def _others(analysis: Analysis) -> Iterable[str]:
    """The size of the declared family, and the exploratory comparisons with a low p-value."""
    compared = [row for row in analysis.rows if row.difference is not None]
    if declared := len(analysis.family):
        tested = sum(row.role == "family" and row.p is not None for row in compared)
        text = f"Declared family: {_count(declared, 'comparison')}, with p-values corrected together by Holm's method."
        yield text + f" Not tested, and counted: {declared - tested}." * (tested < declared)
    exploratory = [row for row in compared if row.role == "exploratory"]
    explored = [(row, row.p) for row in exploratory if row.p is not None]
    found = [row for row, p in sorted(explored, key=lambda pair: pair[1]) if p < ALPHA]
    if explored:
        text = f"{_count(len(explored), 'exploratory comparison')}, whose p-values are not corrected: "
        text += f"{len(found)} below {ALPHA}, and chance alone would give about {ALPHA * len(explored):.1f}."
        items = [f"- {_sentence(row)}" for row in found[:_LISTED]]
        if len(found) > _LISTED:
            items.append(f"- and {len(found) - _LISTED} more, in the tables")
        yield "\n".join([text, *([""] if items else []), *items])
    few = sum(row.difference is not None and row.difference.n < MIN_PAIRS for row in compared)
    same = sum(row.difference is not None and row.difference.p is None for row in compared) - few
    if few:
        yield f"{_count(few, 'comparison')} not tested: fewer than {MIN_PAIRS} paired seeds."
    if same:
        yield f"{_count(same, 'comparison')} not tested: the difference is the same at every seed."


def _correlation(analysis: Analysis) -> str:
    what = f"Correlation of relative minima distance and OOD gain over {analysis.baseline}"
    arms = analysis.across_arms
    if not {"minima_distance", "ood_loss"} <= {*analysis.metrics}:
        return f"{what}: needs minima searches and OOD sources."
    if arms is None:
        return f"{what}: needs at least 3 arms that differ."
    return (
        f"{what}, {arms.n} arms: Pearson's r {arms.pearson:+.2f} "
        f"({p_text(arms.pearson_p)}), Spearman's rho {arms.spearman:+.2f} ({p_text(arms.spearman_p)}). Negative "
        "values mean that closer minima go with a larger gain. The p-values are not corrected, and correlation is not "
        "causation."
    )


def _sentence(row: Row) -> str:
    """One comparison with its interval, p-values and pairs."""
    found = row.difference
    assert found is not None
    label = _label(row.metric, row.where)
    change = f"is {rounded(abs(found.mean), found.half)} {'lower' if found.mean < 0 else 'higher'} than"
    details = []
    if found.low is not None and found.high is not None:
        low, high = (rounded(end, found.half, "+") for end in (found.low, found.high))
        details.append(f"95 % interval{', not corrected,' * (row.role == 'family')} {low} to {high}")
    if row.p is not None:
        details.append(_KINDS[row.role] + p_text(row.p))
    details.append(_count(found.n, "paired seed"))
    label = label[:1].upper() + label[1:]
    return f"{label}: {row.arm} {change if found.mean else 'equals'} {row.versus} ({', '.join(details)})."


def _verdict(row: Row, analysis: Analysis) -> str:
    found, p = row.difference, row.p
    assert found is not None
    if p is None:
        return "Not tested: too few seeds." if found.n < MIN_PAIRS else "Not tested: the same at every seed."
    if row.p_equivalent is not None and row.p_equivalent < ALPHA:
        tests = f"{analysis.margin:g} (two one-sided t-tests, {_KINDS[row.role]}{p_text(row.p_equivalent)})."
        if row.role == "exploratory":
            return f"This hints that they differ by less than {tests}"
        other = " The difference is small, and not 0." * (p < ALPHA)
        return f"**Equivalent**: they differ by less than {tests}{other}"
    if p >= ALPHA:
        unseen = _unseen(row, analysis)
        return f"**Inconclusive**: differences below {rounded(unseen, unseen)} could not have been seen."
    if row.role == "exploratory":
        return "This is only a hint."
    favour = f", {'in favour of' if found.mean < 0 else 'against'} {row.arm}" if _is_loss(row.metric) else ""
    return f"This **supports a difference**{favour}."


def _differs(row: Row) -> bool:
    """Whether a difference was found, by the p-value that decides. An exploratory comparison only hints at it."""
    return row.role != "exploratory" and row.p is not None and row.p < ALPHA


def _alike(row: Row) -> bool:
    """Whether the difference was shown to be below the margin; an exploratory comparison only hints at it."""
    return row.role != "exploratory" and row.p_equivalent is not None and row.p_equivalent < ALPHA


def _unseen(row: Row, analysis: Analysis) -> float:
    """The smallest difference that such a test finds with sufficient power."""
    found = row.difference
    assert found is not None and found.deviation is not None
    tests = len(analysis.family) if row.role == "family" else 1
    return detectable(found.deviation, found.n, ALPHA / tests)


def _label(metric: str, where: Where) -> str:
    return metric_label(metric) + " at matched training loss" * (where == "matched")


def _is_loss(metric: str) -> bool:
    return metric.endswith("loss") or metric.startswith(("validation/", "ood/"))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
