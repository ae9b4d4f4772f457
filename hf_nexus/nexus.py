"""
The Nexus update (arXiv 2604.09258) for any torch training loop.

A *window* replaces the gradient accumulation of k micro-batches, each from one source:

    theta_0 <- snapshot of the parameters                         (1) enter `nexus.window()`
    for m = 1..k:
        g_m     <- gradient of micro-batch m at theta_{m-1}           your `loss.backward()`
        theta_m <- theta_{m-1} - inner_lr * g_m / ||g_m||         (2) `nexus.inner_step()`
    p <- (theta_0 - theta_k) / (inner_lr * k)                     (3) leave the window: p is in `.grad`
    theta <- theta_0, bit for bit                                 (4) leave the window, also by an exception
    the optimizer steps on p                                          your `optimizer.step()`

An inner step is skipped if its gradient norm is zero or not finite. k counts the steps taken.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from .controls import Settings
from .tensors import Snapshot, add_scaled_, clear_gradients, find_gradients, set_gradients

__all__ = ["Nexus"]


class GradientPath:
    """Steps (1) to (3) of one window. The snapshot holds theta_0, the parameters hold theta_m."""

    def __init__(self, snapshot: Snapshot, inner_lr: float):
        self._snapshot, self._inner_lr = snapshot, inner_lr
        snapshot.save()  # (1)

    def step(self, indices: list[int], gradients: list[Tensor], norm: Tensor, usable: Tensor) -> None:
        self._snapshot.wait()  # an offloaded snapshot may still be on its way
        add_scaled_(self._snapshot.tensors_at(indices), gradients, -self._inner_lr / norm, usable)  # (2)

    def pseudo_gradient(self, indices: list[int], steps: int) -> list[Tensor]:
        p = self._snapshot.minus_current(indices)
        torch._foreach_div_(p, self._inner_lr * steps)  # (3)
        return p


class Nexus(Settings):
    """
    The Nexus update of a list of parameters.

    Args:
        params (`Iterable[Tensor]`):
            Trainable parameters, float32 or float64. One norm covers all of them.
        inner_lr (`float`, *optional*, defaults to 0.05):
            Length gamma of an inner step. It can be set between windows. At 0 and below `min_inner_lr` the parameters
            do not move, and p is the mean of the normalized gradients at theta_0.
        direction (`str`, *optional*, defaults to `"gradient"`):
            `"random"` is a control: the parameters move in random directions instead.
        snapshot_device (`str` or `torch.device`, *optional*):
            Device of the snapshot, for example `"cpu"`. Defaults to the device of the parameters.
        norm (`Callable[[Sequence[int], Sequence[Tensor]], Tensor]`, *optional*):
            Norm (0-d) over all shards, given the indices of parameters and their local gradients. Required if a
            parameter is sharded. Defaults to the norm of these gradients.
        key (`tuple[int, ...]` or a `list` of them, *optional*, defaults to `(0,)`):
            Key of random directions: a seed, and a shard or rank if they must differ. Or a list: one per parameter.

    Raises:
        ValueError: negative `inner_lr`, unknown `direction`, no parameters, under 32 bits, shards without `norm`.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> nexus = Nexus(model.parameters(), inner_lr=0.05)
        >>> with nexus.window():
        ...     for x in torch.randn(4, 8, 4):  # 4 micro-batches
        ...         model(x).square().mean().backward()
        ...         norm = nexus.inner_step()
        >>> optimizer.step()
    """

    taken: Sequence[bool] = ()  # inner steps of the last window: False if skipped
    steps_taken = 0  # k of the last window
    pseudo_gradient_norm: Tensor | None = None  # of the last window; None if k = 0
    _open = False

    @property
    def path_cosine(self) -> Tensor:
        """Mean pairwise cosine of the inner gradients of the last window (0-d). NaN for k < 2."""
        k, norm = self.steps_taken, self.pseudo_gradient_norm
        return torch.tensor(float("nan")) if norm is None or k < 2 else (k * norm**2 - 1) / (k - 1)

    @contextmanager
    def window(self) -> Iterator["Nexus"]:
        """One outer step: call `loss.backward()` and `inner_step()` per micro-batch. An exception clears `.grad`."""
        if self._open:
            raise RuntimeError("A Nexus window is already open; windows cannot be nested.")
        try:
            try:
                self._open = True
                self._usable: list[Tensor] = []  # per inner step: 0-d bool
                self._indices: list[list[int]] = []  # per inner step: which parameters had a gradient
                clear_gradients(self.params)
                self._path = self._start_control() or GradientPath(self._snapshot, self.inner_lr)
                yield self
                self._load_pseudo_gradient()
            except BaseException:
                clear_gradients(self.params)
                raise
            finally:
                self.restore()  # (4)
        finally:
            self._open = False
            self.restore()  # again, because a second Ctrl-C can interrupt the first restore

    @torch.no_grad()
    def inner_step(self) -> Tensor:
        """Take one normalized step along the gradients in `.grad`, clear them, and return their norm (0-d)."""
        if not self._open:
            raise RuntimeError("inner_step() was called outside `with nexus.window():`.")
        indices, gradients = find_gradients(self.params)
        norm = self._norm(indices, gradients)
        usable = norm.isfinite() & (norm > 0)
        self._path.step(indices, gradients, norm, usable)
        self._usable.append(usable)
        self._indices.append(indices)
        clear_gradients(self.params)
        return norm

    @torch.no_grad()
    def _load_pseudo_gradient(self) -> None:
        clear_gradients(self.params)
        self.taken = torch.stack(self._usable).tolist() if self._usable else []  # waits for the device, once
        self.steps_taken, self.pseudo_gradient_norm = sum(self.taken), None
        self.outer_step += 1
        if not self.steps_taken:
            return
        indices = sorted({i for step, taken in zip(self._indices, self.taken, strict=True) if taken for i in step})
        p = self._path.pseudo_gradient(indices, self.steps_taken)
        set_gradients(self.params, indices, p)
        self.pseudo_gradient_norm = self._norm(indices, p)

    def restore(self) -> None:
        """Restore the parameters if they are displaced, as after a signal that kept a window from being left."""
        self._snapshot.restore()

    def at_start(self) -> AbstractContextManager[None]:
        """Context with the parameters at theta_0, to save them in the middle of a window that goes on."""
        if not self._open:
            self.restore()
        return self._snapshot.swapped_in()
