"""What a model card needs to know of a run, as plain data: this room knows nothing of trainers."""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .results import ROLES, BenchmarkScore, Evaluation

__all__ = ["LANGUAGE_MODEL", "SUMMARY_NAME", "MixtureRow", "RunSummary"]

SUMMARY_NAME = "run_summary.json"
LANGUAGE_MODEL = "AutoModelForCausalLM"  # what loads the models whose loss is one in nats per token of a text
# Neither in a card nor in a saved summary: credentials, and folders of the machine that trained.
_PRIVATE = re.compile(r"(.*_)?(hub|api|access|auth)_token|.*_dir|resume_from_checkpoint")


@dataclass(frozen=True)
class MixtureRow:
    """One training source as the card lists it.

    Args:
        source (`str`): Name of the source.
        weight (`float`, *optional*): Share of the tokens that was asked for, over all stages; `None` where weights
            were decided while training.
        share (`float`): Share of the tokens that was realised.
        epochs (`float`, *optional*): Passes over the source's training rows; `None` for a stream of unknown size.
        tokens (`int`): Tokens trained on, or rows where the run counted those; see `RunSummary.unit`.
        license (`str`, *optional*): Licence of the data, in any wording.
        dataset (`str`, *optional*): Where the data comes from: a Hub id, `builtin/<name>`, ...

    Example:
        ```python
        >>> MixtureRow("code", weight=0.5, share=0.498, epochs=1.2, tokens=1_000_000, license="PSF-2.0").source
        'code'

        ```
    """

    source: str
    weight: float | None
    share: float
    epochs: float | None
    tokens: int
    license: str | None = None
    dataset: str | None = None


@dataclass
class RunSummary:
    """What a card says about a run: plain data, so that whoever trained can fill it in.

    Args:
        model_name (`str`): Title of the card and name in the model-index.
        model_type (`str`): `config.model_type`, such as `"llama"`.
        parameters (`int`): Number of parameters, those of an adapter included.
        nexus (`dict[str, Any]`): The Nexus settings as they were used; `nexus`, `inner_lr`, `inner_direction` and
            `gradient_accumulation_steps` must be among them.
        planned (`bool`, *optional*, defaults to `False`): The run has not taken place: what the card says of tokens,
            shares and epochs is what it would come to, and results are not allowed.
        mixture (`list[MixtureRow]`, *optional*): The training sources.
        unit (`str`, *optional*, defaults to `"tokens"`): What the mixture is counted in: tokens that carried loss, or
            `"rows"` of a model whose labels are not one per token.
        stages (`list[tuple[float, dict[str, float]]]`, *optional*): `(until, shares)` of each stage, by fraction of
            training, where the weights changed.
        evaluations (`list[Evaluation]`, *optional*): Held-out losses.
        arm (`str`, *optional*): What `arm_loss` of the evaluations comes from; see `against`.
        benchmarks (`list[BenchmarkScore]`, *optional*): Scores on tasks.
        hyperparameters, changed_hyperparameters (`dict[str, Any]`, *optional*): All training arguments, and those that
            differ from their defaults. Tokens and local folders are left out.
        numbers (`dict[str, float]`, *optional*): Last logged values, such as `path_cosine`.
        repo_id, prompt (`str`, *optional*): What the example loads (the folder itself if `None`) and continues.
        base_model (`str`, *optional*): Hub id of the model that was trained further; `None` means from scratch, or of
            an adapter that its base model has no name. Of a path only the last part is named, outside of the metadata.
        adapter (`str`, *optional*): Kind of an adapter that was trained on the base model, such as `"LoRA"`.
        trainable_parameters (`int`, *optional*): How many were trained, if not all.
        license, license_name, license_link (`str`, *optional*): Of the model, by the Hub's identifiers; `"other"`
            needs a name.
        languages (`list[str]`, *optional*): ISO 639 codes, `"code"` or `"multilingual"`.
        datasets (`list[str]`, *optional*): Hub ids only.
        tags, limitations (`list[str]`, *optional*): In addition to those that every card has.
        hardware, commit (`str`, *optional*): Machine, and revision of the training code.
        seconds, tokens_per_second (`float`, *optional*): Training time and throughput.
        versions (`dict[str, str]`, *optional*): Of the packages by distribution name; `hf-nexus` is cited.
        plot, cosine_plot (`str`, *optional*): File names of the curves and of the gradient cosines, beside the card.
        task (`str`, *optional*, defaults to `"text-generation"`): What the model is for, by the Hub's name of the
            pipeline; `None` if that is not known.
        auto_class (`str`, *optional*, defaults to `"AutoModelForCausalLM"`): The class of transformers that loads the
            model; `None` if there is none, and the card then has no example.

    Raises:
        ValueError: Settings that are missing, repeated names, unknown roles, or results of a planned run.

    Example:
        ```python
        >>> settings = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient"}
        >>> run = RunSummary("tiny", "llama", 1_000_000, settings | {"gradient_accumulation_steps": 4})
        >>> run.base_model is None  # from scratch
        True

        ```
    """

    model_name: str
    model_type: str
    parameters: int
    nexus: dict[str, Any]
    planned: bool = False
    mixture: list[MixtureRow] = field(default_factory=list)
    unit: str = "tokens"
    stages: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    arm: str | None = None
    benchmarks: list[BenchmarkScore] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    changed_hyperparameters: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    repo_id: str | None = None
    prompt: str = "The"
    base_model: str | None = None
    adapter: str | None = None
    trainable_parameters: int | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    limitations: list[str] = field(default_factory=list)
    hardware: str | None = None
    commit: str | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    plot: str | None = None
    cosine_plot: str | None = None
    task: str | None = "text-generation"
    auto_class: str | None = LANGUAGE_MODEL

    def __post_init__(self) -> None:
        self.hyperparameters = _public(self.hyperparameters)
        self.changed_hyperparameters = _public(self.changed_hyperparameters)
        needed = {"nexus", "inner_lr", "inner_direction", "gradient_accumulation_steps"}
        if missing := sorted(needed - set(self.nexus)):
            raise ValueError(
                f"`nexus` lacks {missing}, got {sorted(self.nexus)}: pass these fields of the NexusConfig."
            )
        names = [row.name for row in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`evaluations` must have different names, got {names}: rename or drop the repeated ones."
            )
        if unknown := {row.role for row in self.evaluations} - set(ROLES):
            raise ValueError(f"`evaluations` have the roles {sorted(unknown)}: use one of {list(ROLES)}.")
        if self.planned and (self.evaluations or self.benchmarks):
            raise ValueError("A planned run has no `evaluations` or `benchmarks`: leave them out, or planned=False.")

    @property
    def is_language_model(self) -> bool:
        """Whether losses are in nats per token, and perplexities mean something."""
        return self.auto_class == LANGUAGE_MODEL

    @property
    def tokens(self) -> int:
        """Tokens of all sources, or rows."""
        return sum(row.tokens for row in self.mixture)

    def against(self, other: "RunSummary", name: str) -> "RunSummary":
        """This summary with the losses of another run beside its own.

        Args:
            other (`RunSummary`): The arm compared against, trained on as many tokens.
            name (`str`): What the card calls it, such as `"plain accumulation"`.

        Raises:
            ValueError: The runs differ by more than 1 % in tokens, or share no evaluation set.

        Example:
            ```python
            >>> settings = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient"}
            >>> run = RunSummary("a", "llama", 10, settings | {"gradient_accumulation_steps": 4})
            >>> run.evaluations = [Evaluation("code", "ood", None, 2.0)]
            >>> run.against(run, "itself").evaluations[0].arm_loss
            2.0

            ```
        """
        losses = {row.name: row.last_loss for row in other.evaluations}
        if not losses.keys() & {row.name for row in self.evaluations}:
            raise ValueError(f"{name} shares no evaluation set with {self.model_name}: it has {sorted(losses)}.")
        if abs(self.tokens - other.tokens) > 0.01 * self.tokens:
            raise ValueError(
                f"{self.model_name} was trained on {self.tokens:,} {self.unit} and {name} on {other.tokens:,}: "
                "compare runs of equally many."
            )
        return replace(
            self, arm=name, evaluations=[replace(row, arm_loss=losses.get(row.name)) for row in self.evaluations]
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `run_summary.json` into `folder`, from which the card can be rendered again."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)
        return write_atomic(Path(folder, SUMMARY_NAME), text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RunSummary":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: `folder` holds no summary.
            ValueError: The file is something else; the message names it.
        """
        path = Path(folder, SUMMARY_NAME)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["mixture"] = [MixtureRow(**row) for row in fields["mixture"]]
            fields["evaluations"] = [Evaluation(**row) for row in fields["evaluations"]]
            fields["benchmarks"] = [BenchmarkScore(**row) for row in fields["benchmarks"]]
            fields["stages"] = [(until, shares) for until, shares in fields["stages"]]
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not the summary of a run: {what}. Put back what the run wrote.") from error


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not _PRIVATE.fullmatch(name)}
