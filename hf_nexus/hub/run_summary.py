"""Facts about a run as plain data, from which its model card is rendered."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..files import read_plain, without_folders, write_atomic
from ..mixture.stages import Stage
from ..strict import Bound, check_fields
from .results import ROLES, BenchmarkScore, HeldOutLoss

__all__ = ["LANGUAGE_MODEL", "SUMMARY_NAME", "MixtureRow", "RunSummary"]

SUMMARY_NAME = "run_summary.json"
LANGUAGE_MODEL = "AutoModelForCausalLM"  # loads models that generate text
_Count = Annotated[int, Bound(least=0, most=1e18)]
# Keys that are not published, at any depth of the hyperparameters: credentials, and folders of the training machine.
_PRIVATE = re.compile(
    r"token|(.*_)?(hub|api|access|auth)_token|.*(secret|passw|credential|authorization|api_?key|access_?key).*|.*_dir"
    r"|resume_from_checkpoint",
    re.I,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class MixtureRow:
    """One training source."""

    source: str
    weight: float | None  # configured share of the tokens, over all stages; None if decided during training
    share: float  # realised share of the tokens
    epochs: float | None  # passes over the training rows; None for a stream of unknown size
    tokens: _Count  # trained tokens or rows, see `RunSummary.unit`
    license: str | None = None  # of the data, as free text
    dataset: str | None = None  # origin of the data: a Hub id, `builtin/<name>` or a file name


# A fact has a default, for summaries that were saved without it. In place of `RunSummary`, one of each training source
# is a field of `MixtureRow` (`trainer/card.py`, `_mixture_rows`), one of each evaluation set of `HeldOutLoss` in
# `hub/results.py`. The last value of a logged key needs only `trainer/card.py` (`_NUMBERS`). No page lists the facts.
# All training arguments are in `hyperparameters` already, and need neither `RunSummary` nor `trainer/card.py`. A fact
# also needs,
# - if a trainer must tell it: `trainer/card.py` (`RunFacts`), `trainer/mixin.py` (`run_facts`). Its arguments do not
#   have what the Trainer computes when it starts, such as the steps of a run of epochs: its `state` has;
# - if a planned run has it: `model_cards/render.py` (`plan`). The other cards in `model_cards/` keep what their runs
#   saved;
# - if the model, the machine or the code tells it: `hub/facts.py`;
# - if training must measure it: `trainer/meter.py` (`update_totals`, where all ranks meet; `state` and `begin`, and
#   `docs/checkpoints.md`, if it is of all sessions), `tests/trainer/test_meter.py`; if the loading of data must:
#   `mixture/loading.py` (`Mixture`), `mixture/packing.py` (`pack_documents`; packed rows may come from a cache) and
#   their tests;
# - if the front matter shows it: `hub/card.py` (`_metadata`).
@dataclass
class RunSummary:
    """
    Facts about a run, as plain data.

    Raises:
        ValueError: settings are missing, names are repeated, a role is unknown, or a planned run has results.
    """

    model_name: str  # title of the card and name in the model-index
    model_type: str  # `config.model_type`, such as "llama"
    parameters: _Count  # including those of an adapter
    # The Nexus settings. `nexus`, `inner_lr`, `inner_direction` and `gradient_accumulation_steps` are required.
    nexus: dict[str, Any]
    # Whether the run is only planned. Tokens, shares and epochs are then computed, and there are no results.
    planned: bool = False
    mixture: list[MixtureRow] = field(default_factory=list)
    unit: Literal["tokens", "rows"] = "tokens"  # what the mixture counts: "rows" for models without a label per token
    stages: list[Stage] = field(default_factory=list)
    evaluations: list[HeldOutLoss] = field(default_factory=list)
    # Whether `evaluations` are means over tokens. Those of preferences are over pairs, and smoothed losses are others.
    per_token: bool = True
    best_step: int | None = None  # outer step of the checkpoint whose weights were loaded at the end as the best
    arm: str | None = None  # name of the arm that `arm_loss` and `arm_value` come from, see `against`
    benchmarks: list[BenchmarkScore] = field(default_factory=list)
    # All training arguments, and those that differ from their defaults, without tokens and local folders.
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    changed_hyperparameters: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)  # last logged metrics, such as `path_cosine`
    repo_id: str | None = None  # the repository that the example loads; None for the folder of the card
    prompt: str = "The"  # text that the example continues, or answers
    chat: bool = False  # whether the model was trained on messages, which the example sends by the chat template
    # Hub id or path of the model that was trained further. None if the model was trained from scratch, or if the base
    # model of an adapter has no name. Of an absolute path, only the name is kept.
    base_model: str | None = None
    adapter: str | None = None  # kind of the adapter that was trained, such as "LoRA"
    trainable_parameters: _Count | None = None  # None if all were trained
    license: str | None = None  # of the model, by the Hub's identifiers; "other" needs a name
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)  # ISO 639 codes, "code" or "multilingual"
    datasets: list[str] = field(default_factory=list)  # Hub ids of the training data
    tags: list[str] = field(default_factory=list)  # in addition to those of every card
    limitations: list[str] = field(default_factory=list)  # as well
    hardware: str | None = None
    commit: str | None = None  # of the training code
    seconds: Annotated[float, Bound(least=0, most=1e12)] | None = None
    tokens_per_second: float | None = None
    versions: dict[str, str] = field(default_factory=dict)  # by distribution name
    plot: str | None = None  # name of a file in the folder of the card
    cosine_plot: str | None = None  # as well
    cosine_rows: int | None = None  # rows of each source whose gradients it compares
    pipeline_tag: str | None = "text-generation"  # the Hub's name of the model's task; None if it is not known
    auto_class: str | None = LANGUAGE_MODEL  # class of transformers that loads the model; None: no example on the card

    def __post_init__(self) -> None:
        self.hyperparameters = without_folders(_without_secrets(self.hyperparameters))
        self.changed_hyperparameters = without_folders(_without_secrets(self.changed_hyperparameters))
        # "./" marks a local folder, whose name alone could be taken for the id of a repository.
        if self.base_model and (name := without_folders(self.base_model)) != self.base_model:
            self.base_model = f"./{name}"
        needed = {"nexus", "inner_lr", "inner_direction", "gradient_accumulation_steps"}
        if missing := sorted(needed - set(self.nexus)):
            raise ValueError(
                f"`nexus` lacks {missing}, got {sorted(self.nexus)}. Pass these fields of the NexusConfig."
            )
        names = [row.name for row in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError(f"`evaluations` must have different names, got {names}. Rename the repeated ones.")
        if unknown := {row.role for row in self.evaluations} - set(ROLES):
            raise ValueError(f"`evaluations` have the roles {sorted(unknown)}. Use one of {list(ROLES)}.")
        if wrong := [name for name in (self.plot, self.cosine_plot) if name and Path(name).name != name]:
            raise ValueError(f"A plot is {wrong[0]!r}. Pass the name of a file in the folder of the card.")
        if self.auto_class is not None and not self.auto_class.isidentifier():
            raise ValueError(
                f"auto_class={self.auto_class!r} is not a class. Use the name of a class of transformers."
            )
        if self.planned and (self.evaluations or self.benchmarks):
            raise ValueError(
                "A planned run has no `evaluations` or `benchmarks`. Leave them out or set planned=False."
            )

    @property
    def is_language_model(self) -> bool:
        """Whether the model generates text."""
        return self.auto_class == LANGUAGE_MODEL

    @property
    def has_perplexity(self) -> bool:
        """Whether losses are in nats per token and have a perplexity."""
        return self.is_language_model and self.per_token

    @property
    def tokens(self) -> int:
        """Trained tokens or rows of all sources."""
        return sum(row.tokens for row in self.mixture)

    def against(self, other: "RunSummary", name: str) -> "RunSummary":
        """
        Copy of this summary with the losses and scores of another arm, which the card calls `name`.

        Raises:
            ValueError: the numbers of tokens differ by more than 1 %, or the runs have no common evaluation set.
        """
        losses = {row.name: row.last_loss for row in other.evaluations}
        if not losses.keys() & {row.name for row in self.evaluations}:
            raise ValueError(
                f"{name} and {self.model_name} have no common evaluation set: {name} has {sorted(losses)}."
            )
        if abs(self.tokens - other.tokens) > 0.01 * self.tokens:
            raise ValueError(
                f"{self.model_name} was trained on {self.tokens:,} {self.unit} and {name} on {other.tokens:,}. "
                "Compare runs with equal numbers."
            )
        if self._macro_weights() != other._macro_weights():
            losses.pop("macro", None)  # another mean of the same losses
        values = {score.setting: score.value for score in other.benchmarks}
        return replace(
            self,
            arm=name,
            evaluations=[replace(row, arm_loss=losses.get(row.name)) for row in self.evaluations],
            benchmarks=[replace(score, arm_value=values.get(score.setting)) for score in self.benchmarks],
        )

    def _macro_weights(self) -> dict[str, Any]:
        return {**self.stages[-1].weights} if self.stages else {row.source: row.weight for row in self.mixture}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run_summary.json`, from which the card can be rendered again, into a folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)
        return write_atomic(Path(folder, SUMMARY_NAME), text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RunSummary":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder has no summary.
            ValueError: the file is not a summary.
        """
        path = Path(folder, SUMMARY_NAME)
        try:
            text = read_plain(path)
            found = cls._build(json.loads(text, parse_constant=lambda nan: 0.0))  # a loss may be NaN
            for part in (found, *found.mixture, *found.evaluations, *found.benchmarks):
                check_fields(part)
            return cls._build(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(f"{path} is not the summary of a run: {what}. Restore the file of the run.") from error

    @classmethod
    def _build(cls, fields: dict[str, Any]) -> "RunSummary":
        rows: dict[str, Callable[..., Any]]
        rows = {"mixture": MixtureRow, "evaluations": HeldOutLoss, "benchmarks": BenchmarkScore, "stages": Stage}
        return cls(**fields | {name: [kind(**row) for row in fields[name]] for name, kind in rows.items()})


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if not _PRIVATE.fullmatch(str(key))}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return _TOKEN.sub("<hidden>", value) if isinstance(value, str) else value
