"""Muon for the matrices of a model and AdamW for all else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, Trainer
from transformers.training_args import OptimizerNames

__all__ = ["MuonWithAdamW", "check_optimizer", "create_muon_with_adamw", "muon_options"]

# What `optim_args` may say about Muon, and how it is read.
_OPTIONS: dict[str, Callable[[str], Any]] = {"muon_lr": float, "muon_momentum": float, "muon_adjust_lr_fn": str}
# The field `optim` chooses the optimizer of what is not a matrix.
_ADAMW = {OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED}


class MuonWithAdamW(Optimizer):
    """
    [`torch.optim.Muon`] and [`torch.optim.AdamW`] behind one set of parameter groups and one state, so that
    schedulers, checkpoints and wrappers see an ordinary optimizer. AdamW's groups come first.

    Args:
        matrices (`Iterable[dict]`):
            Parameter groups of 2-D weights for Muon, each with its options if they differ from `muon`.
        others (`Iterable[dict]`):
            Parameter groups for AdamW. Groups without parameters are left out, here and above.
        muon (`dict[str, Any]`), adamw (`dict[str, Any]`):
            The options of [`torch.optim.Muon`] and of [`torch.optim.AdamW`].

    Raises:
        ValueError: a parameter for Muon is not 2-D, an option is out of range, or there is no parameter at all.

    Example:
        >>> import torch
        >>> from hf_nexus.trainer.optimizers import MuonWithAdamW
        >>> layer = torch.nn.Linear(4, 4)
        >>> groups = [{"params": [layer.weight]}], [{"params": [layer.bias]}]
        >>> optimizer = MuonWithAdamW(*groups, muon={"lr": 0.02}, adamw={"lr": 1e-3})
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.02]
    """

    def __init__(
        self, matrices: Iterable[dict], others: Iterable[dict], *, muon: dict[str, Any], adamw: dict[str, Any]
    ):
        chosen = ((AdamW, others, adamw), (Muon, matrices, muon))
        filled = [(kind, [g for g in groups if len(g["params"])], options) for kind, groups, options in chosen]
        parts = [kind(groups, **options) for kind, groups, options in filled if groups]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Make the two parts anew over the present groups, which they share, and over one state."""
        kinds = [(AdamW, "betas"), (Muon, "momentum")]  # an option that only the groups of that kind have
        split = [(kind, [g for g in self.param_groups if option in g]) for kind, option in kinds]
        # Groups that have all their options already are kept as they are, the very same dicts.
        self._parts: list[Optimizer] = [kind(groups) for kind, groups in split if groups]
        for part in self._parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()  # loading a state replaces the groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def muon_options(optim_args: str | None) -> dict[str, Any]:
    """
    The options of Muon in the field `optim_args`, such as `"muon_lr=0.01,muon_momentum=0.9"`.

    Without `muon_adjust_lr_fn`, its updates are scaled to the size of AdamW's (`"match_rms_adamw"`), so that both
    share one learning rate; `"original"` is Keller Jordan's scaling, which wants one of its own.

    Raises:
        ValueError: names what is not understood.

    Example:
        >>> from hf_nexus.trainer.optimizers import muon_options
        >>> muon_options("muon_lr=0.01")
        {'adjust_lr_fn': 'match_rms_adamw', 'lr': 0.01}
    """
    options: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
    for part in (optim_args or "").replace(" ", "").split(","):
        key, _, value = part.partition("=")
        if not part:
            continue
        try:
            options[key.removeprefix("muon_")] = _OPTIONS[key](value)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"optim_args={optim_args!r} says {part!r}, which matrix_optimizer='muon' does not understand; use "
                "'muon_lr=<number>', 'muon_momentum=<number>' or 'muon_adjust_lr_fn=match_rms_adamw' (or =original), "
                "joined by commas."
            ) from error
    Muon([nn.Parameter(torch.zeros(1, 1))], **options)  # its own checks, before a model is built
    return options


def check_optimizer(trainer: Trainer) -> None:
    """
    Refuse `matrix_optimizer`, which builds on AdamW, where something else decides on the optimizer.

    Raises:
        ValueError: names the two, and which to leave out.
    """
    args: Any = trainer.args
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    other = "an optimizer given to the trainer" if given else f"optim={OptimizerNames(args.optim).value!r}"
    if args.matrix_optimizer is not None and (given or args.optim not in _ADAMW):
        raise ValueError(
            f"matrix_optimizer={args.matrix_optimizer!r} and {other} exclude each other: it builds on "
            "optim='adamw_torch' or 'adamw_torch_fused'. Leave one of the two out."
        )


def create_muon_with_adamw(trainer: Trainer, model: nn.Module) -> MuonWithAdamW:
    """
    The optimizer of `matrix_optimizer="muon"`: Muon for trainable 2-D weights of at least two rows and columns that
    are not an embedding or the output layer, the Trainer's AdamW for all else. Weight decay is split by the Trainer.

    Args:
        trainer ([`~transformers.Trainer`]):
            Its arguments give the options.
        model (`nn.Module`):
            What is trained.

    Raises:
        ValueError: the model has nothing for Muon.
    """
    args = trainer.args
    decaying, tables = set(trainer.get_decay_parameter_names(model)), _embeddings_and_heads(model)
    matrices: tuple[list[Tensor], list[Tensor]] = ([], [])  # with weight decay, and without
    others: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim == 2 and min(p.shape) > 1 and id(p) not in tables
            (matrices if is_matrix else others)[name not in decaying].append(p)
            if is_matrix and trainer.is_fsdp_enabled and len(p) < args.world_size:  # torch fails at the first step
                raise ValueError(
                    f"matrix_optimizer='muon' cannot shard {name!r} of shape {tuple(p.shape)} over {args.world_size} "
                    "ranks: torch's Muon needs a row for each. Use fewer ranks, DDP, or leave it out."
                )
    if not any(matrices):
        raise ValueError(
            "matrix_optimizer='muon' found no trainable matrix in the model (embeddings and the output layer are "
            "AdamW's); leave it out."
        )
    _, adamw = trainer.get_optimizer_cls_and_kwargs(args)
    muon = {"lr": args.learning_rate, **muon_options(args.optim_args)}
    decays = (args.weight_decay, 0.0)
    groups = [
        [{"params": p, "weight_decay": d} for p, d in zip(kind, decays, strict=True)] for kind in (matrices, others)
    ]
    return MuonWithAdamW(*groups, muon=muon, adamw=adamw)


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """Ids of the parameters that are a table of the vocabulary (or of positions), not a map between features."""
    tables: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    for module in model.modules():  # adapters wrap the model whose output layer it is
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            tables.append(head)
    return {id(p) for table in tables for p in table.parameters()}
