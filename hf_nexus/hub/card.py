"""Model cards: what a run was, in a README that the Hub accepts and that a user may go on writing in."""

import json
import math
import os
import re
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_check import check_card, is_repo_id, split_card
from .run_summary import ROLES, Evaluation, MixtureRow, RunSummary

__all__ = ["Evaluation", "MixtureRow", "RunSummary", "check_card", "run_card", "save_card"]

BEGIN = "<!-- hf-nexus: generated from here on; write above this line or below the closing one, and it is kept -->"
END = "<!-- hf-nexus: end of the generated part -->"
# Stock cards carry this comment until someone has edited them, so a text that still has it is nobody's work.
_STOCK = "This model card has been generated automatically according to the information the Trainer had access to"
_TASK = "Held-out language modelling"  # the task name by which our own model-index entries are known again
_ORIGINS = ("pretraining", "continued-pretraining")  # tags: from scratch, from a base model
# Left out of the hyperparameters: credentials, and folders of the machine that trained.
_PRIVATE = re.compile(r"(.*_)?(hub|api|access|auth)_token|.*_dir|resume_from_checkpoint")


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
        >>> save_card(run, "/tmp/tiny").name
        'README.md'

        ```
    """
    path = Path(folder, "README.md")
    card = run_card(run, path.read_text(encoding="utf-8-sig") if path.exists() else None)
    check_card(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("README.md.tmp")
    scratch.write_text(str(card), encoding="utf-8", newline="\n")
    scratch.replace(path)  # in one piece: an interrupted write must not cost the user's text
    return path


def _metadata(run: RunSummary) -> dict[str, Any]:
    """The front matter that the run determines; non-finite results are left out, the Hub takes JSON numbers only."""
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=_TASK,
            dataset_type=row.dataset or row.name,
            dataset_name=row.name,
            dataset_config=row.name,  # keeps sets apart that come from one dataset
            dataset_split="held-out",
            dataset_args={"role": row.role},
            metric_type=metric,
            metric_value=value,
        )
        for row in run.evaluations
        for metric, value in (("loss", float(row.last_loss)), ("perplexity", row.perplexity))
        if math.isfinite(value)
    ]
    origin = _ORIGINS[run.base_model is not None]
    return ModelCardData(
        model_name=run.model_name if results else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=run.license and run.license.lower(),
        license_name=run.license_name,
        license_link=run.license_link,
        language=run.languages or None,
        base_model=run.base_model if run.base_model and is_repo_id(run.base_model) else None,
        datasets=list(dict.fromkeys(run.datasets)) or None,
        metrics=["perplexity"] if results else None,
        tags=["hf_nexus", "nexus", "arxiv:2604.09258", "generated_from_trainer", origin, *run.tags],
        eval_results=results or None,
    ).to_dict()


def _merge(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Adds to the run's metadata what a user or another tool had put into the old one."""
    merged = dict(new)
    # What the run knows for certain must not survive from an earlier one, least of all a base model.
    owned = ["base_model", "datasets", "model-index"] + ["license_name", "license_link"] * ("license" in new)
    for key, value in old.items():
        if key not in owned:
            merged.setdefault(key, value)
    old_tags = [old["tags"]] if isinstance(old.get("tags"), str) else old.get("tags") or []
    merged["tags"] = list(dict.fromkeys([*new["tags"], *(tag for tag in old_tags if tag not in _ORIGINS)]))
    try:
        results = [result for model in old.get("model-index") or [] for result in model["results"]]
        foreign = [result for result in results if result["task"].get("name") != _TASK]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The existing card's `model-index` is malformed ({error!r}): mend it or delete it."
        ) from error
    if foreign:
        ours = new["model-index"][0]["results"] if "model-index" in new else []
        name = new["model-index"][0]["name"] if "model-index" in new else old["model-index"][0]["name"]
        merged["model-index"] = [{"name": name, "results": ours + foreign}]
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
    jinja.filters |= {"cell": _cell, "number": _number, "code": _code, "escaped": _escaped}
    template = jinja.from_string(Path(__file__).with_name("card_template.md").read_text(encoding="utf-8"))
    environment = {
        "Hardware": run.hardware,
        "Training time": run.seconds if run.seconds is None else timedelta(seconds=round(run.seconds)),
        "Tokens per second": run.tokens_per_second and _number(run.tokens_per_second),
        "Code revision": run.commit and _code(run.commit),
        **run.versions,
    }
    base_model = run.base_model
    if base_model is not None and not is_repo_id(base_model):
        base_model = PurePath(base_model).name  # where a folder lay on the machine that trained is nobody's business
    text = template.render(
        run=run,
        nexus=run.nexus,
        k=run.nexus["gradient_accumulation_steps"],
        length="at most " * (run.nexus.get("inner_lr_schedule") == "follow") + str(run.nexus["inner_lr"]),
        base_model=base_model,
        tokens=sum(row.tokens for row in run.mixture),
        roles=ROLES,
        changed=_public(run.changed_hyperparameters),
        hyperparameters=_public(run.hyperparameters),
        environment={name: value for name, value in environment.items() if value is not None},
        version=run.versions.get("hf-nexus"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not _PRIVATE.fullmatch(name)}


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


def _escaped(value: str) -> str:
    """A text between the double quotes of a Python literal."""
    return json.dumps(value, ensure_ascii=False)[1:-1]
