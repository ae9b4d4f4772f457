"""Muon for the matrices of a model and AdamW for the other parameters, as one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

__all__ = ["MuonWithAdamW", "create_matrix_optimizer", "muon_options"]

# The options of Muon in `optim_args`, and their types.
_OPTIONS: dict[str, Callable[[str], Any]] = {"muon_lr": float, "muon_momentum": float, "muon_adjust_lr_fn": str}


class MuonWithAdamW(Optimizer):
    """
    [`torch.optim.Muon`] and [`torch.optim.AdamW`] behind one set of parameter groups and one state.
    Schedulers, checkpoints and wrappers see an ordinary optimizer. AdamW's groups come first.

    `matrices` are the parameter groups of 2-D weights for Muon, and `others` those for AdamW. Each has its options if
    they differ from `muon` and `adamw`. Groups without parameters are left out.

    Raises:
        ValueError: a parameter for Muon is not 2-D, an option is out of range, or there is no parameter at all.
    """

    def __init__(
        self, matrices: Iterable[dict], others: Iterable[dict], *, muon: dict[str, Any], adamw: dict[str, Any]
    ):
        chosen = ((AdamW, others, adamw), (Muon, matrices, muon))
        filled = [(kind, [g for g in groups if len(g["params"])], options) for kind, groups, options in chosen]
        optimizers = [kind(groups, **options) for kind, groups, options in filled if groups]
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Build both optimizers over the present groups, which they share, and over one state."""
        kinds = [(AdamW, "betas"), (Muon, "momentum")]  # an option that only the groups of that kind have
        split = [(kind, [g for g in self.param_groups if option in g]) for kind, option in kinds]
        # Groups that have all options already are kept: the same dicts.
        self._optimizers: list[Optimizer] = [kind(groups) for kind, groups in split if groups]
        for optimizer in self._optimizers:
            optimizer.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group for AdamW. Options that it lacks are those of the first such group."""
        if "_optimizers" in vars(self):
            first = next((g for g in self.param_groups if "betas" in g), AdamW([torch.zeros(1)]).defaults)
            param_group = {**{name: value for name, value in first.items() if name != "params"}, **param_group}
        super().add_param_group(param_group)
        if "_optimizers" in vars(self):
            self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()  # loading a state replaces the groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss


def muon_options(optim_args: str | None) -> dict[str, Any]:
    """
    The options of Muon in the field `optim_args`, such as `"muon_lr=0.01,muon_momentum=0.9"`.

    Without `muon_adjust_lr_fn`, its updates are scaled to the size of AdamW's (`"match_rms_adamw"`), and both
    share one learning rate. `"original"` is Keller Jordan's scaling, which needs another learning rate.

    Raises:
        ValueError: names the option that is not understood.
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
                f"optim_args={optim_args!r}: {part!r} is no option of matrix_optimizer='muon'. Use "
                "'muon_lr=<number>', 'muon_momentum=<number>' or 'muon_adjust_lr_fn=match_rms_adamw' (or =original), "
                "joined by commas."
            ) from error
    Muon([nn.Parameter(torch.zeros(1, 1))], **options)  # checks the values before a model is built
    return options


# Another value of `matrix_optimizer` shares the class above, which knows AdamW's groups by `betas`. `trainer/mixin.py`
# calls this function for each value. It also needs,
# - if torch lacks the algorithm: a module with it, and its test;
# - if it can be sharded (what computes each element alone can): runs like those of Muon,
#   `tests/trainer/distributed/fsdp_worker.py` (`muon`), `tests/trainer/distributed/test_fsdp.py`; if not, an error:
#   `trainer/checks.py` (`check_fsdp`), `tests/trainer/test_checks.py`, `docs/distributed.md`;
# - if its state is larger than AdamW's: `pretrain/memory.py`, `pretrain/plan.py` (`checkpoint_copy`),
#   `pretrain/console.py` (`_run_rows`, `_memory_table`), `tests/pretrain/test_memory.py`,
#   `tests/pretrain/test_plan.py`, `docs/cost.md`, `docs/checkpoints.md`;
# - if it needs a package: `pretrain/checks.py` (`_try_optimizer`), `pyproject.toml`, `make lock`.
def create_matrix_optimizer(
    model: nn.Module, args: Any, adamw: dict[str, Any], decaying: Iterable[str], shards: int = 1
) -> MuonWithAdamW:
    """
    The optimizer of `matrix_optimizer="muon"`: Muon for trainable 2-D weights of at least two rows and columns that
    are not part of an embedding or of the head, AdamW for the other parameters.

    `adamw` has the options of AdamW, without `optim_args`, and `decaying` the names of the parameters with weight
    decay. `shards` is the number of ranks over which the model will be sharded.

    Raises:
        ValueError: there is no matrix for Muon, or one with fewer rows than there are ranks to shard it.
    """
    decaying, tables = set(decaying), _embeddings_and_heads(model)
    matrices: tuple[list[Tensor], list[Tensor]] = ([], [])  # with weight decay, and without
    others: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim == 2 and min(p.shape) > 1 and id(p) not in tables
            (matrices if is_matrix else others)[name not in decaying].append(p)
            if is_matrix and len(p) < shards:  # torch fails at the first step
                raise ValueError(
                    f"matrix_optimizer='muon' cannot shard {name!r} of shape {tuple(p.shape)} over {shards} "
                    "ranks: torch's Muon needs a row for each rank. Use fewer ranks, DDP, or leave it out."
                )
    if not any(matrices):
        raise ValueError(
            "matrix_optimizer='muon' found no trainable matrix in the model (AdamW has embeddings and the head). "
            "Leave it out."
        )
    muon = {"lr": args.learning_rate, **muon_options(args.optim_args)}
    decays = (args.weight_decay, 0.0)
    groups = [
        [{"params": p, "weight_decay": d} for part, d in zip(kind, decays, strict=True) for p in _by_mesh(part)]
        for kind in (matrices, others)
    ]
    return MuonWithAdamW(*groups, muon=muon, adamw=adamw)


def _by_mesh(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters of one device mesh each, because a fused kernel takes no others. The Trainer splits its groups so."""
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        found[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    return list(found.values())


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """Ids of the parameters of embeddings, their adapters, and heads."""
    found: set[int] = set()
    for module in model.modules():  # adapters wrap the model that has the head
        if isinstance(module, nn.Embedding) or isinstance(getattr(module, "base_layer", None), nn.Embedding):
            found |= _ids(module)
        if isinstance(module, PreTrainedModel):
            found |= _ids(module) - _ids(module.base_model)  # no head if the model is its own base
            if (head := module.get_output_embeddings()) is not None:
                found |= _ids(head)
    return found


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}
