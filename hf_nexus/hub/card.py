"""Model cards: a README about a run, valid for the Hub, in which the text of users is kept."""

import hashlib
import html
import json
import math
import os
import re
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..files import printable, read_plain, write_atomic
from ..strict import dump_yaml
from .check import check_card, is_repo_id, split_card
from .results import ROLES, merge_index, model_index
from .run_summary import RunSummary

__all__ = ["merge_cards", "run_card", "save_card", "user_text_digest"]

BEGIN = "<!-- hf-nexus: start of the generated part. Your text above this line and below the last one is kept. -->"
END = "<!-- hf-nexus: end of the generated part -->"
# Users delete this comment of a stock card when they edit it.
_STOCK = "This model card has been generated automatically according to the information the Trainer had access to"
# What Markdown reads as formatting, a link, HTML or an entity, and as a heading, list or rule at the start of a text.
_SYNTAX = re.compile(r"[\\`*|~$<>\[\]]|(?<![^\W_])_|_(?![^\W_])|(?<=\s)#+$|&(?=#?\w+;)|(?<=\])\(")
_BLOCK = re.compile(r"^(\d{0,9})([#+=.)-])(?=[\s#+=-]|$)")
_URL = re.compile(r"://|(?<![^\W_])www\.|[\w.+-]@[\w-]", re.I)  # Markdown makes links of these, unless they are code
_ORIGINS = ("pretraining", "continued-pretraining", "fine-tuning")  # tags: from scratch, from a base model, adapter


def run_card(run: RunSummary, existing: str | None = None) -> ModelCard:
    """
    Render the card of a run, whose `str` is the README.

    The work of users in the `existing` README is kept: text above and below the generated part, their metadata keys
    and tags, the licence and language unless the run has its own, and the model-index entries of other tools. An
    unedited stock card of the Trainer is replaced.

    Raises:
        ValueError: `existing` has invalid metadata, or damaged comments around the generated part.
    """
    metadata, text = _split(existing or "")
    return ModelCard(_join(_merge(_metadata(run), metadata), f"\n\n{_body(run)}\n\n", *_user_text(text)))


def merge_cards(card: str, published: str, take_text: bool) -> str:
    """
    Add to a card of a run what users wrote into the `published` one: their metadata, and their text in place of that
    of `card` if `take_text`. If one of both has no generated part, `card` is returned.

    Raises:
        ValueError: one of both is damaged.
    """
    (metadata, text), (their_metadata, their_text) = _split(card), _split(published)
    if BEGIN not in text or BEGIN not in their_text:
        return card
    user_text, generated = _user_text(their_text if take_text else text), text.partition(BEGIN)[2].partition(END)[0]
    return _join(_merge(metadata, their_metadata), generated, *user_text)


def user_text_digest(card: str) -> str | None:
    """A hash of the text of users on a card, `""` if they wrote none, `None` if it has no undamaged generated part."""
    try:
        _, text = _split(card)
        written = "\n".join(_user_text(text))
    except ValueError:
        return None
    if BEGIN not in text:
        return None
    return hashlib.sha256(written.encode()).hexdigest() if written.strip() else ""


def save_card(run: RunSummary, folder: str | os.PathLike[str]) -> Path:
    """Render, check and write `README.md` in `folder`. The work of users in an existing file is kept.

    Raises:
        ValueError: from [`run_card`] or [`check_card`]. The existing file is then unchanged.
    """
    path = Path(folder, "README.md")
    card = run_card(run, read_plain(path) if path.exists() else None)
    check_card(card)
    return write_atomic(path, str(card))


def _split(card: str) -> tuple[dict[str, Any], str]:
    return split_card(card.replace("\r\n", "\n"))


def _join(metadata: dict[str, Any], generated: str, above: str, below: str) -> str:
    body = "\n\n".join(filter(None, [above, f"{BEGIN}{generated}{END}", below]))
    return f"---\n{dump_yaml(metadata)}---\n\n{body}\n"


def _metadata(run: RunSummary) -> dict[str, Any]:
    """Metadata that follow from the run."""
    results = model_index(run.evaluations, run.benchmarks, run.pipeline_tag, run.has_perplexity)
    origin = "fine-tuning" if run.adapter else _ORIGINS[run.base_model is not None]
    base_model = run.base_model if run.base_model and is_repo_id(run.base_model) else None
    metrics = [score.metric for score in run.benchmarks]
    if run.evaluations and run.has_perplexity:
        metrics.insert(0, "perplexity")
    data = ModelCardData(
        model_name=run.model_name if results else None,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag=run.pipeline_tag,
        license=run.license and run.license.lower(),
        license_name=run.license_name,
        license_link=run.license_link,
        language=run.languages or None,
        base_model=base_model,
        base_model_relation="adapter" if base_model and run.adapter else None,
        datasets=list(dict.fromkeys(run.datasets)) or None,
        metrics=list(dict.fromkeys(metrics)) or None,
        tags=["hf_nexus", "nexus", "arxiv:2604.09258", "generated_from_trainer", origin, *run.tags],
        eval_results=results or None,
    )
    return _on_one_line(data.to_dict())


def _on_one_line(value: Any) -> Any:
    """Metadata whose texts have neither line breaks nor invisible characters."""
    if isinstance(value, dict):
        return {key: _on_one_line(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_one_line(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _merge(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the run, and of the old ones what a user or another tool added."""
    merged = dict(new)
    # Facts about the run, which must not stay from an earlier run.
    owned = ["base_model", "base_model_relation", "datasets", "model-index"]
    owned += ["license_name", "license_link"] * ("license" in new)
    for key, value in old.items():
        if key not in owned:
            merged.setdefault(key, value)
    old_tags = [old["tags"]] if isinstance(old.get("tags"), str) else old.get("tags") or []
    kept = [tag for tag in old_tags if tag not in _ORIGINS and not str(tag).startswith("base_model:")]
    merged["tags"] = list(dict.fromkeys([*new.get("tags", []), *kept]))
    if index := merge_index(new.get("model-index", []), old.get("model-index")):
        merged["model-index"] = index
    return merged


def _user_text(text: str) -> tuple[str, str]:
    """Text above and below the generated part. Without a generated part, all text is below."""
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        return "", "" if _STOCK in " ".join(text.split()) else text.strip()
    above, begin, rest = text.partition(BEGIN)
    generated, end, below = rest.partition(END)
    if not (begin and end) or BEGIN in generated or BEGIN in below or END in below or END in above:
        raise ValueError(
            f"The README must contain the lines {BEGIN!r} and {END!r} once each, in this order. Restore them, or "
            "delete both to keep the whole text."
        )
    return above.strip(), below.strip()


@cache
def _template() -> Any:
    import jinja2

    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    jinja.filters |= {"cell": _cell, "code": _code, "code_cell": _code_cell, "escaped": _escaped, "line": printable}
    jinja.filters |= {"number": _number, "count": _count, "loss": _loss, "percent": _percent}
    jinja.filters |= {"yaml": _yaml, "setting": _setting}
    return jinja.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))


def _body(run: RunSummary) -> str:
    """Generated Markdown, without the comments around it."""
    environment = {
        "Hardware": run.hardware and _cell(run.hardware),
        "Training time": _duration(run.seconds),
        f"{run.unit.capitalize()} per second": run.tokens_per_second and _number(run.tokens_per_second),
        "Commit of `hf_nexus`": run.commit and _code(run.commit),
        **{_cell(name): _cell(version) for name, version in run.versions.items()},
    }
    base_model = run.base_model
    if base_model is not None and not is_repo_id(base_model):
        base_model = PurePath(base_model).name  # the folders of the training machine are private
    roles = dict(ROLES)
    if base_model is not None or run.adapter:  # the training data of the base model is unknown
        roles["ood"] = "OOD source, not trained on in this run"
    text = _template().render(
        run=run,
        k=run.nexus["gradient_accumulation_steps"],
        length="at most " * (run.nexus.get("inner_lr_schedule") == "follow") + str(run.nexus["inner_lr"]),
        base_model=base_model,
        kind="language model" if run.is_language_model else f"{run.pipeline_tag or ''} model".strip(),
        stages=_stage_columns(run),
        roles=roles,
        environment={name: value for name, value in environment.items() if value is not None},
        version=run.versions.get("hf-nexus"),
    )
    # A comment in the text of a run could look like the end of the generated part.
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("<!--", "&lt;!--")


def _stage_columns(run: RunSummary) -> dict[str, dict[str, float]]:
    """Mixture weights of each stage, by its title `"0 to 80 %"`; empty for a single stage."""
    ends = [f"{100 * stage.until:g}" for stage in run.stages]
    titles = [f"{start} to {end} %" for start, end in pairwise(["0", *ends])]
    return dict(zip(titles, (stage.weights for stage in run.stages), strict=True)) if len(titles) > 1 else {}


def _cell(value: object) -> str:
    """Any text as Markdown that shows this text on one line, for cells, headings and list items."""
    if value is None:
        return "-"
    text = printable(value)
    if _URL.search(text):
        return _code_cell(text)
    text = _SYNTAX.sub(lambda found: html.escape(found[0]) if found[0] in "<>&" else f"\\{found[0]}", text)
    return _BLOCK.sub(r"\1\\\2", text)


def _code(value: object) -> str:
    return "`" + printable(value).replace("`", "'") + "`"


def _code_cell(value: object) -> str:
    # A backslash before a bar would be read as one escaped backslash, and the bar as the end of the cell.
    return _code(value).replace("\\|", "\\ |").replace("|", r"\|")


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits by default, and all digits before the point below a billion."""
    if value is None or not math.isfinite(value):
        return _cell(value)
    return f"{round(value):,}" if isinstance(value, int) or 999.5 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _duration(seconds: float | None) -> timedelta | None:
    """Whole seconds, or `None` if they are not known: a damaged summary can hold NaN."""
    return None if seconds is None or not math.isfinite(seconds) else timedelta(seconds=round(seconds))


def _yaml(settings: dict[str, Any]) -> str:
    """Settings that have a value, as lines of YAML inside a block of code, which no value ends."""
    lines = [f"{_flow(name)}: {_flow(value)}" for name, value in settings.items() if value is not None]
    return "\n".join(lines).replace("```", "'''")


def _flow(value: object) -> str:
    """Plain data as YAML on one line."""
    return printable(dump_yaml(value, one_line=True).removesuffix("...\n"))


def _setting(value: object) -> str:
    if isinstance(value, dict):  # shares, such as those of sources by their sizes
        value = {key: float(f"{share:.4g}") if isinstance(share, float) else share for key, share in value.items()}
    return _cell(_flow(value).strip("{}"))


def _count(value: int) -> str:
    """Three significant digits from a million on; smaller counts exactly."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g} {word}"
    return f"{value:,}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _escaped(value: str) -> str:
    """Text between the double quotes of a Python literal, in which no comment of Markdown begins."""
    text = json.dumps(value, ensure_ascii=False)[1:-1].replace("<", r"\x3c")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
