"""Model cards: what a run was, in a README that the Hub accepts and that a user may go on writing in."""

import json
import math
import os
import re
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..files import write_atomic
from .check import check_card, is_repo_id, split_card
from .results import ROLES, BenchmarkScore, Evaluation, merge_index, model_index
from .run_summary import MixtureRow, RunSummary

__all__ = ["BenchmarkScore", "Evaluation", "MixtureRow", "RunSummary", "check_card", "run_card", "save_card"]

BEGIN = "<!-- hf-nexus: generated from here on; write above this line or below the closing one, and it is kept -->"
END = "<!-- hf-nexus: end of the generated part -->"
# Stock cards carry this comment until someone has edited them, so a text that still has it is nobody's work.
_STOCK = "This model card has been generated automatically according to the information the Trainer had access to"
_ORIGINS = ("pretraining", "continued-pretraining", "fine-tuning")  # tags: from scratch, of a base model, an adapter


def run_card(run: RunSummary, existing: str | None = None) -> ModelCard:
    """Renders the card of a run.

    What a user wrote into an existing card stays: text above and below the generated part, metadata under keys that
    we do not write, tags, a licence or language where the run names none, and model-index entries of other tools. A
    stock Trainer card that nobody has edited is replaced.

    Args:
        run (`RunSummary`): The run.
        existing (`str`, *optional*): The README to be brought up to date.

    Returns:
        `huggingface_hub.ModelCard`: The card; `str(card)` is the README.

    Raises:
        ValueError: If `existing` has broken metadata, or the comments that delimit the generated part are damaged.

    Example:
        ```python
        >>> settings = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient"}
        >>> run = RunSummary("tiny", "llama", 1_000_000, settings | {"gradient_accumulation_steps": 4})
        >>> "My words." in str(run_card(run, existing=f"{run_card(run)}My words."))
        True

        ```
    """
    metadata, text = split_card((existing or "").replace("\r\n", "\n"))
    above, below = _user_text(text)
    merged = _merge(_metadata(run), metadata)
    parts = [above, f"{BEGIN}\n\n{_body(run)}\n\n{END}", below]
    body = "\n\n".join(part for part in parts if part)
    head = yaml.dump(merged, sort_keys=False, allow_unicode=True)
    return ModelCard(f"---\n{head}---\n\n{body}\n")


def save_card(run: RunSummary, folder: str | os.PathLike[str]) -> Path:
    """Renders, checks and writes `README.md` into `folder`, keeping what users wrote into the one that is there.

    Raises:
        ValueError: From `run_card` and `check_card`; the existing file is then untouched.

    Example:
        ```python
        >>> settings = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient"}
        >>> run = RunSummary("tiny", "llama", 1_000_000, settings | {"gradient_accumulation_steps": 4})
        >>> from tempfile import mkdtemp
        >>> save_card(run, mkdtemp()).name
        'README.md'

        ```
    """
    path = Path(folder, "README.md")
    card = run_card(run, path.read_text(encoding="utf-8-sig") if path.exists() else None)
    check_card(card)
    return write_atomic(path, str(card))


def _metadata(run: RunSummary) -> dict[str, Any]:
    """The front matter that the run determines."""
    results = model_index(run.evaluations, run.benchmarks, run.task, run.is_language_model)
    origin = "fine-tuning" if run.adapter else _ORIGINS[run.base_model is not None]
    base_model = run.base_model if run.base_model and is_repo_id(run.base_model) else None
    metrics = [score.metric for score in run.benchmarks]
    if run.evaluations and run.is_language_model:
        metrics.insert(0, "perplexity")
    return ModelCardData(
        model_name=run.model_name if results else None,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag=run.task,
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
    ).to_dict()


def _merge(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Adds to the run's metadata what a user or another tool had put into the old one."""
    merged = dict(new)
    # What the run knows for certain must not survive from an earlier one, least of all a base model.
    owned = ["base_model", "base_model_relation", "datasets", "model-index"]
    owned += ["license_name", "license_link"] * ("license" in new)
    for key, value in old.items():
        if key not in owned:
            merged.setdefault(key, value)
    old_tags = [old["tags"]] if isinstance(old.get("tags"), str) else old.get("tags") or []
    merged["tags"] = list(dict.fromkeys([*new["tags"], *(tag for tag in old_tags if tag not in _ORIGINS)]))
    if index := merge_index(new.get("model-index", []), old.get("model-index")):
        merged["model-index"] = index
    return merged


def _user_text(text: str) -> tuple[str, str]:
    """The text above and below the generated part; all of a text without one goes below."""
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        return "", "" if _STOCK in " ".join(text.split()) else text.strip()
    above, begin, rest = text.partition(BEGIN)
    generated, end, below = rest.partition(END)
    if not (begin and end) or BEGIN in generated or BEGIN in below or END in below or END in above:
        raise ValueError(
            "The existing card's generated part cannot be told from its own text: the README must hold the lines "
            f"{BEGIN!r} and {END!r} once each, in this order. Restore them, or delete both to keep the whole text."
        )
    return above.strip(), below.strip()


def _body(run: RunSummary) -> str:
    """The generated Markdown, without the comments around it."""
    import jinja2

    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    jinja.filters |= {"cell": _cell, "number": _number, "signed": _signed, "code": _code, "escaped": _escaped}
    template = jinja.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))
    environment = {
        "Hardware": run.hardware,
        "Training time": run.seconds if run.seconds is None else timedelta(seconds=round(run.seconds)),
        f"{run.unit.capitalize()} per second": run.tokens_per_second and _number(run.tokens_per_second),
        "Commit of `hf_nexus`": run.commit and _code(run.commit),
        **run.versions,
    }
    base_model = run.base_model
    if base_model is not None and not is_repo_id(base_model):
        base_model = PurePath(base_model).name  # where a folder lay on the machine that trained is nobody's business
    roles = dict(ROLES)
    if base_model is not None or run.adapter:  # nobody knows what the base model was trained on
        roles["ood"] = "OOD source, not trained on in this run"
    text = template.render(
        run=run,
        nexus=run.nexus,
        k=run.nexus["gradient_accumulation_steps"],
        length="at most " * (run.nexus.get("inner_lr_schedule") == "follow") + str(run.nexus["inner_lr"]),
        base_model=base_model,
        kind="language model" if run.is_language_model else f"{run.task or ''} model".strip(),
        stages=_stage_columns(run),
        roles=roles,
        environment={name: value for name, value in environment.items() if value is not None},
        version=run.versions.get("hf-nexus"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _stage_columns(run: RunSummary) -> dict[str, dict[str, float]]:
    """Shares by the part of training that a stage takes, `"0 to 80 %"`; nothing for one stage."""
    ends = [f"{100 * until:g}" for until, _ in run.stages]
    starts = ["0", *ends]
    shares = [shares for _, shares in run.stages]
    columns = {f"{a} to {b} %": s for a, b, s in zip(starts, ends, shares, strict=False)}
    return columns if len(columns) > 1 else {}


def _cell(value: object) -> str:
    """A value inside a Markdown table, on one line."""
    return "-" if value is None else " ".join(str(value).split()).replace("|", r"\|")


def _code(value: object) -> str:
    return "`" + " ".join(str(value).split()).replace("`", "'") + "`"


def _number(value: object) -> str:
    """Four decimals; four digits of an exponential form where those would say nothing."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _cell(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value) else f"{value:.4e}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _escaped(value: str) -> str:
    """A text between the double quotes of a Python literal."""
    return json.dumps(value, ensure_ascii=False)[1:-1]
