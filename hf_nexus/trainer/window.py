"""One outer step: its micro-batches, their counts, and the path that Nexus walks over them."""

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_pt_utils import find_batch_size

from ..mixture.stream.reader import SourceError
from ..mixture.tags import MicroBatchTag, StreamState, pop_tag
from ..nexus import Nexus
from .checks import check_trained, check_windows, warn_of_buffers, warn_of_short_steps
from .distributed import PathGroups, Shards, compress, gather, reduce_over, reshard, share_buffers, sum_over_ranks

__all__ = ["Walker", "Window", "countable", "has_token_labels", "inner_lr_scale", "optimizer_settings"]

# The label that a segmentation model of transformers ignores, in its configuration. Other models ignore -100.
_IGNORED = ("semantic_loss_ignore_index", "loss_ignore_index")


def has_token_labels(inputs: Any) -> bool:
    """Whether a batch has one label per token: integers of shape (B, T)."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    return isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()


def countable(inputs: Any, model: Any) -> Any:
    """A batch with -100 in place of the label that the model ignores: the Trainer counts all others as loss tokens."""
    config = getattr(model, "config", None)
    ignored = [label for name in _IGNORED if (label := getattr(config, name, None)) is not None]
    if not ignored or not has_token_labels(inputs):
        return inputs
    labels = inputs["labels"].long()  # masks of images may be bytes
    return {**inputs, "labels": labels.masked_fill(labels == ignored[0], -100)}


def optimizer_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group, without tensors: reading one would wait for the device."""
    kinds = int | float | str | tuple
    return [{key: value for key, value in of.items() if isinstance(value, kinds)} for of in optimizer.param_groups]


@dataclass
class Window:
    """The micro-batches of one outer step on this rank: k of them, or fewer at the end of the data."""

    rows: list[Mapping[str, int]] = field(default_factory=list)  # of each micro-batch, by source
    mixed: bool = False  # whether a micro-batch may hold several sources, and others on each rank
    optimizer: list[dict[str, Any]] = field(default_factory=list)  # its settings, by `optimizer_settings`
    states: list[StreamState] = field(default_factory=list)  # positions of the streams after the micro-batches
    error: SourceError | None = None  # why no more micro-batches could be read
    unit: str = "rows"  # of losses per source; "tokens" where labels are one per token
    tokens: Tensor | None = None  # loss tokens on this rank, (k,)
    items: Tensor | None = None  # divisors of the losses, (k,): loss tokens, or their mean over the ranks
    same: Tensor | None = None  # whether the hashes of all ranks' sources and settings agree (0-d), if compared
    inputs: list[Any] = field(default_factory=list)  # what `training_step` was called with so far
    flops: dict[int, int] = field(default_factory=dict)  # of a micro-batch, by the elements of its main input

    def take(self, batches: Iterable[Any], tagged: bool) -> Iterator[Any]:
        """Yield micro-batches until one cannot be read, and note their tags. With `tagged`, a tag is required."""
        try:
            for batch in batches:
                tag = pop_tag(batch)
                if tag is None and tagged:
                    raise ValueError(
                        "A micro-batch does not say which source it holds: the training data loader is not the "
                        "mixture's, or drops the tag. Leave get_train_dataloader() and get_batch_samples() to "
                        "NexusTrainer, or pass train_dataset as one plain dataset."
                    )
                if tag is None:
                    tag = MicroBatchTag({"": find_batch_size(batch) or 1})
                assert self.mixed or len(tag.rows) == 1, "a micro-batch holds several sources"
                self.rows.append(tag.rows)
                self.states += tag.states
                yield batch
        except SourceError as error:
            # The message of an error from a worker is a traceback, which ends in the original message.
            self.error = SourceError(str(error).rpartition("SourceError: ")[2].strip())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sources(self) -> list[str]:
        """The source of each micro-batch; the empty name for mixed ones."""
        return ["" if self.mixed else next(iter(rows)) for rows in self.rows]

    @property
    def shared(self) -> tuple[list[str], list[dict[str, Any]]]:
        """What all ranks must share: the sources, and the settings of the optimizer."""
        return self.sources, self.optimizer

    @property
    def complete(self) -> bool:
        """Whether `training_step` got all micro-batches, or no window is in progress."""
        return len(self.inputs) >= len(self)

    def count(self, batches: Sequence[Any], tokens: Sequence[Any], ranks: int) -> Tensor | None:
        """
        Take the loss tokens of each micro-batch on this rank, 0-d each, or `None` where there is no count. Their mean
        over `ranks` divides the losses. All of these ranks must call it, and their sources and settings are compared
        in the same collective.

        Returns:
            `Tensor`, *optional*: the loss tokens of the window over the ranks, 0-d; `None` if they are not counted.
        """
        counted = [n for n in tokens if isinstance(n, Tensor)]
        if not counted or len(counted) < len(batches):
            return None
        self.unit = "tokens" if has_token_labels(batches[0]) else "rows"
        self.tokens = total = torch.stack(counted)
        if ranks > 1:
            mark = zlib.crc32(repr(self.shared).encode()) % 61  # float32 holds sums of its square exactly
            *_, marks, squares = shared = sum_over_ranks(torch.cat([total, total.new_tensor([mark, mark**2])]))
            total, self.same = shared[:-2], squares.long() * ranks == marks.long() ** 2
        self.items = total / ranks
        return total.sum()

    def divisors(self, i: int, differentiable: bool, whole: bool = False) -> "Divisors":
        """
        The divisors of the loss of micro-batch `i`: its own, or those of the `whole` window. They require gradients
        if they are to be `differentiable`.
        """
        steps = len(self) if whole else 1
        if self.items is None or self.tokens is None:
            return Divisors(None, None, steps, differentiable)
        return Divisors(self.items.sum() if whole else self.items[i], self.tokens[i], steps, differentiable)

    def mean_of_part(self, i: int, part: Tensor) -> Tensor:
        """The mean loss of micro-batch `i`, given its part of the window's loss."""
        return part * len(self) if self.items is None else part * self.items.sum() / self.items[i].clamp(min=1e-9)

    def summed(self, i: int, mean_loss: Tensor) -> tuple[Mapping[str, int], Tensor, Tensor]:
        """
        Rows by source, summed loss and loss tokens (or rows) of micro-batch `i` on this rank, given its mean loss: the
        arguments of [`TrainingMeter.add_micro_batch`].
        """
        rows = self.rows[i]
        if self.unit == "rows" or self.tokens is None or self.items is None:
            count = sum(rows.values())
            return rows, mean_loss * count, torch.full_like(mean_loss, count)
        return rows, mean_loss * self.items[i], self.tokens[i]

    def mean_loss(self, losses: Tensor, otherwise: Tensor) -> Tensor:
        """Token-weighted mean of the finite losses (k,); `otherwise` if there is none."""
        weights = torch.ones_like(losses) if self.items is None else self.items.to(losses.dtype)
        finite = losses.isfinite()
        total = torch.where(finite, weights, 0).sum()
        return torch.where(total > 0, torch.where(finite, losses * weights, 0).sum() / total, otherwise)


class Divisors:
    """
    What a loss may be divided by: the count of loss tokens, and the number of micro-batches.

    Which of them divides a loss depends on the model (BERT and T5 ignore the count) and on `compute_loss`. So it is
    measured: of a loss A / n + B, which is divided by n in part, the derivative in n is -A / n^2. FSDP2 allows no
    input that requires a gradient. So `differentiable` is false there, and a loss counts as divided by `items`.

    `items` is the count to divide by, and `tokens` the loss tokens of this micro-batch on this rank. The attributes
    `items` and `steps` are what to give to the loss.
    """

    def __init__(self, items: Tensor | None, tokens: Tensor | None, steps: int, differentiable: bool):
        self._tokens, self._differentiable, self._steps = tokens, differentiable, steps
        self._leaf = None if items is None else items.clone().requires_grad_(differentiable)
        self.items = self._leaf if self._leaf is None else self._leaf * 1  # a loss function may change it in place
        self.steps: Any = steps if steps == 1 else torch.tensor(float(steps), requires_grad=True)

    def divide(self, loss: Tensor) -> Tensor:
        """
        A loss after its backward pass, divided by the count, or without one by the number of micro-batches: once,
        whatever it was divided by.
        """
        times: Any = 1
        if isinstance(self.steps, Tensor):
            times = torch.where(_part(loss, self.steps).abs() > loss.abs() / 2, self._steps, 1)
        if self._leaf is None or self._tokens is None:
            return loss * times / self._steps
        part, items = _part(loss, self._leaf) if self._differentiable else loss, self._leaf.detach()
        divided = (part + (loss - part) * (self._tokens / items)) * times
        # BERT's mean over no token is not a number. Other ranks or micro-batches have tokens.
        return torch.where((self._tokens == 0) & (items > 0), 0.0, divided)


def _part(loss: Tensor, divisor: Tensor) -> Tensor:
    """The part of a loss that was divided by a number, which has its gradient."""
    if divisor.grad is None:
        return torch.zeros_like(loss)
    part = (-divisor.grad * divisor.detach()).to(loss)
    return torch.where((loss - part).abs() <= 1e-4 * loss.abs(), loss, part)  # up to rounding


class Walker:
    """Walks the micro-batches of a window with the Nexus update. Weights are displaced inside `walk` only."""

    groups: PathGroups  # the ranks that walk one path, from `begin` on

    def __init__(self, args: Any):
        self._args = args
        self._new = True  # no window was walked yet
        self._begun: tuple[Any, Any] = (None, None)  # a reference to the wrapped model, and its sets of parameters
        self._compressed: Any = None  # the wrapped model whose gradients may be sent in bfloat16
        self.nexus: Nexus | None = None

    def walk(
        self,
        model: nn.Module,
        window: Window,
        micro_step: Callable[[nn.Module, int], Tensor],
        *,
        optimizer: Any,
        step: int,
    ) -> tuple[Tensor, Nexus]:
        """
        Walk the complete window of an outer step, and leave the pseudo-gradient in `.grad`: that of all ranks if they
        walk one path, or the average over the paths that moved. `micro_step` runs forward and backward pass of a
        micro-batch, given the model and its index, and returns its mean loss.

        Returns:
            `tuple[Tensor, Nexus]`: the losses, (k,), and what walked.
        """
        # A callback may have changed what is trained. On several ranks, DDP could not follow.
        if self.nexus is None or self._begun[1] != _parameter_sets(model, optimizer):
            self.begin(model, optimizer)
        # A run without the update reduces over all ranks, and a callback can add a communication hook.
        reduce_over(model, self.groups.inside)
        nexus, args = self.nexus, self._args
        assert nexus is not None
        nexus.outer_step = step
        nexus.inner_lr = args.inner_lr * inner_lr_scale(args.inner_lr_schedule, optimizer, args.learning_rate)
        named = model.named_buffers() if self._new else ()
        # Those of quantized models are integers and large.
        buffers = {name: buffer.clone() for name, buffer in named if buffer.is_floating_point()}
        losses: list[Tensor] = []
        try:
            with nexus.window():
                for i in range(len(window)):
                    losses.append(micro_step(model, i))
                    nexus.inner_step()
        except BaseException:
            reshard(model)
            raise
        finally:
            nexus.restore()  # a signal can keep the window from being left
        if self._new:
            now = dict(model.named_buffers())
            warn_of_buffers(name for name, buffer in buffers.items() if name in now and not buffer.equal(now[name]))
        self._new = False
        if window.same is not None and not window.same:
            check_windows(gather(window.shared))
        if self.groups.several:
            self.groups.average(nexus.params, nexus.steps_taken > 0)
            share_buffers(model)
        return torch.stack(losses), nexus

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        """
        Take the parameters that the optimizer trains, once the model is wrapped.

        Raises:
            ValueError: the model is not wrapped, or the optimizer does not train what is trainable.
        """
        args = self._args
        before, sets = self._begun, _parameter_sets(model, optimizer)
        changed = before[0] == (wrapped := weakref.ref(model)) and before[1] != sets
        trained = _trained(optimizer)
        check_trained(model, trained, args.world_size, changed)
        self._begun = wrapped, sets
        reshard(model)  # an evaluation leaves some parameters of FSDP2 gathered
        # A loss function can have parameters as well.
        params = list({id(p): p for p in [*model.parameters(), *trained] if p.requires_grad}.values())
        if before[0] != wrapped or self.groups.settings != (args.inner_sync, args.node_size):
            self.groups = PathGroups(args.inner_sync, args.node_size, args.ddp_timeout_delta)
        if args.reduce_dtype and self._compressed != wrapped:
            self._compressed = wrapped
            compress(model, lambda: args.nexus and args.reduce_dtype is not None)
        shards = Shards(params, self.groups)
        self.nexus = Nexus(
            params,
            args.inner_lr,
            direction=args.inner_direction,
            snapshot_device=args.snapshot_device,
            norm=shards.norm,
            # Ranks with the same shard of the same path need the same random directions. Others need others.
            key=[(args.seed, part) for part in shards.parts],
        )
        warn_of_short_steps(self.nexus, args.mixed_precision == "bf16")

    def reset(self) -> None:
        """Discard the parameters: the model may be wrapped again or replaced."""
        if self.nexus is not None:
            self.nexus.restore()
        self.nexus = None

    def at_start(self) -> AbstractContextManager[None]:
        """The weights of the window's start inside the context, from any point of the path."""
        return nullcontext() if self.nexus is None else self.nexus.at_start()


def _trained(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _parameter_sets(model: nn.Module, optimizer: Any) -> tuple[list[int], list[int]]:
    """What the optimizer trains, and what is trainable. Of FSDP2 only the number, because it exchanges parameters."""
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return list(map(id, _trained(optimizer))), [len(trainable)] if sharded else trainable


def inner_lr_scale(schedule: str, optimizer: Any, peak_lr: float) -> float:
    """
    Factor of `inner_lr` at this step: 1, or with the schedule `"follow"` the learning rate of the first
    parameter group over its peak (`peak_lr`, if the optimizer does not know it).
    """
    if schedule == "constant":
        return 1.0
    group = optimizer.param_groups[0]
    # Schedulers start from `initial_lr`. OneCycleLR rises from there to `max_lr`.
    peak = max(group["lr"], group.get("max_lr", group.get("initial_lr", peak_lr)))
    return float(group["lr"]) / float(peak) if peak else 0.0
