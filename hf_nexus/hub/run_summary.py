"""What a model card needs to know of a run, as plain data: this room knows nothing of trainers."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ROLES", "Evaluation", "MixtureRow", "RunSummary"]

ROLES = {"train": "training source", "ood": "OOD source, never trained on", "macro": "mean over sources"}


@dataclass(frozen=True)
class MixtureRow:
    """One training source as the card lists it.

    Args:
        source (`str`): Name of the source.
        weight (`float`): Share of the tokens that was asked for.
        share (`float`): Share of the tokens that was realised.
        epochs (`float`): Passes over the source's training rows.
        tokens (`int`): Tokens trained on.
        license (`str`, *optional*): Licence of the data, in any wording.
        dataset (`str`, *optional*): Where the data comes from: a Hub id, `builtin/<name>`, ...

    Example:
        ```python
        >>> MixtureRow("code", weight=0.5, share=0.498, epochs=1.2, tokens=1_000_000, license="PSF-2.0").source
        'code'

        ```
    """

    source: str
    weight: float
    share: float
    epochs: float
    tokens: int
    license: str | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """First and last held-out loss of one set, at restored weights.

    Args:
        name (`str`): Name of the set, unique within a run.
        role (`"train"`, `"ood"` or `"macro"`): A training source's held-out rows, an OOD source, or a mean of several.
        first_loss (`float`, *optional*): Loss before training or at the first evaluation, nats per token.
        last_loss (`float`): Loss at the end, nats per token.
        dataset (`str`, *optional*): Hub id of the data.

    Example:
        ```python
        >>> Evaluation("code", "train", first_loss=8.3, last_loss=0.0).perplexity
        1.0

        ```
    """

    name: str
    role: Literal["train", "ood", "macro"]
    first_loss: float | None
    last_loss: float
    dataset: str | None = None

    @property
    def perplexity(self) -> float:
        """`exp(last_loss)`; infinite where a float cannot hold it."""
        return math.exp(self.last_loss) if self.last_loss < 709 or math.isnan(self.last_loss) else math.inf


@dataclass
class RunSummary:
    """What a card says about a run: plain data, so that whoever trained can fill it in.

    Args:
        model_name (`str`): Title of the card and name in the model-index.
        model_type (`str`): `config.model_type`, such as `"llama"`.
        parameters (`int`): Number of parameters.
        nexus (`dict[str, Any]`): The Nexus settings as they were used; `nexus`, `inner_lr`, `inner_direction` and
            `gradient_accumulation_steps` must be among them.
        mixture (`list[MixtureRow]`, *optional*): The training sources.
        evaluations (`list[Evaluation]`, *optional*): Held-out losses.
        hyperparameters, changed_hyperparameters (`dict[str, Any]`, *optional*): All training arguments, and those that
            differ from their defaults. Tokens and local folders are left out of the card.
        numbers (`dict[str, float]`, *optional*): Last logged values, such as `path_cosine`.
        repo_id, prompt (`str`, *optional*): What the example loads (the folder itself if `None`) and continues.
        base_model (`str`, *optional*): Hub id of the model that was trained further; `None` means from scratch. Of a
            path only the last part is named, outside of the metadata.
        license, license_name, license_link (`str`, *optional*): Of the model, by the Hub's identifiers; `"other"`
            needs a name.
        languages (`list[str]`, *optional*): ISO 639 codes, `"code"` or `"multilingual"`.
        datasets (`list[str]`, *optional*): Hub ids only.
        tags, limitations (`list[str]`, *optional*): In addition to those that every card has.
        hardware, commit (`str`, *optional*): Machine, and revision of the training code.
        seconds, tokens_per_second (`float`, *optional*): Training time and throughput.
        versions (`dict[str, str]`, *optional*): Of the packages by distribution name; `hf-nexus` is cited.
        plot (`str`, *optional*): File name of the curves, beside the card.

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
    mixture: list[MixtureRow] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    changed_hyperparameters: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    repo_id: str | None = None
    prompt: str = "The"
    base_model: str | None = None
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

    def __post_init__(self) -> None:
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
