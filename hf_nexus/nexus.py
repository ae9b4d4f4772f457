"""
The Nexus update (arXiv 2604.09258) for any torch training loop.

One *window* replaces one gradient accumulation of k micro-batches, each drawn from one source:

    theta_0 <- snapshot of the parameters                              (1) `nexus.window()` is entered
    for m = 1..k:
        g_m     <- gradient of micro-batch m at theta_{m-1}                your `loss.backward()`
        theta_m <- theta_{m-1} - inner_lr * g_m / ||g_m||              (2) `nexus.inner_step()`
    p <- (theta_0 - theta_k) / (inner_lr * k)                          (3) the window is left: p goes to `.grad`
    theta <- theta_0, bit for bit                                      (4) however it is left
    an ordinary optimizer steps on p                                       your `optimizer.step()`

An inner step whose norm is zero or not finite is left out; k counts the steps taken.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tensors import TensorCopy, add_scaled_, as_gradient, fill_normal_, global_norm, shard

__all__ = ["Nexus"]


class Nexus:
    """
    Walks micro-batches as small normalized steps and hands the displacement to the optimizer as its gradient.

    Args:
        params (`Iterable[Tensor]`):
            The trainable parameters, float32 or float64. All of them share one norm.
        inner_lr (`float`, *optional*, defaults to 0.05):
            Length gamma of an inner step. 0 averages the normalized gradients without moving. May be set anew between
            windows. Below [`min_inner_lr`] rounding would drown the path, and the form for 0 is used.
        direction (`str`, *optional*, defaults to `"gradient"`):
            `"random"` is a control: the parameters move along random directions of the same length, and p is the mean
            of the normalized gradients met on the way.
        snapshot_device (`str` or `torch.device`, *optional*):
            Where the extra copy lives; beside the parameters by default, `"cpu"` to offload it.
        reduce_norm (`Callable[[Tensor], Tensor]`, *optional*):
            Makes the global norm of this process's 0-d norm, where the parameters are sharded.
        key (`tuple[int, ...]`, *optional*, defaults to `(0,)`):
            Keys the random directions, with `outer_step` and the inner step: a seed, and a shard's number where
            processes hold different parameters or walk different paths.

    Raises:
        ValueError: a negative `inner_lr`, an unknown direction, no parameter, or one of less than 32 bits.

    Example:
        >>> import torch
        >>> from hf_nexus import Nexus
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> nexus = Nexus(model.parameters(), inner_lr=0.05)
        >>> with nexus.window():
        ...     for x in torch.randn(4, 8, 4):  # four micro-batches
        ...         model(x).square().mean().backward()
        ...         norm = nexus.inner_step()
        >>> optimizer.step()
        >>> nexus.steps_taken
        4
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        inner_lr: float = 0.05,
        *,
        direction: str = "gradient",
        snapshot_device: str | torch.device | None = None,
        reduce_norm: Callable[[Tensor], Tensor] = lambda norm: norm,
        key: tuple[int, ...] = (0,),
    ):
        self.params = list(params)
        if not self.params:
            raise ValueError("Nexus got no parameters; pass at least one tensor that requires a gradient.")
        for p in self.params:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Nexus got a {p.dtype} parameter of shape {tuple(p.shape)}, in which inner steps would be lost. "
                    "Keep the weights in float32 (`model.float()`) and compute under bfloat16 autocast."
                )
        if direction not in ("gradient", "random"):
            raise ValueError(f"direction={direction!r} is not known; use 'gradient' or 'random'.")
        self.inner_lr = inner_lr
        self.direction = direction
        self.outer_step = 0  # counts windows; set it when resuming, for the same random directions
        self.taken: list[bool] = []  # per inner step of the last window
        self.pseudo_gradient_norm: Tensor | None = None  # of the last window; None if no step was taken
        self._reduce_norm = reduce_norm
        self._key = key
        self._snapshot = TensorCopy(self.params, snapshot_device)
        # Without a path nothing needs restoring, and the copy holds the sum instead. Random directions need both.
        self._sum = self._snapshot if direction == "gradient" else TensorCopy(self.params, snapshot_device)
        self._displaced = self._open = False

    @property
    def inner_lr(self) -> float:
        """Length gamma of the next window's inner steps."""
        return self._inner_lr

    @inner_lr.setter
    def inner_lr(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"inner_lr={value!r} is not allowed; it must be finite and >= 0 (0.05 is the default).")
        self._inner_lr = float(value)

    @property
    def min_inner_lr(self) -> float:
        """
        Where the displacement's rounding error exceeds 1 %. The error grows as sqrt(N) / inner_lr for N parameters and
        was measured at 5 % for N = 1e6 and inner_lr = 1e-5 in float32.
        """
        precision = max(torch.finfo(p.dtype).eps for p in self.params) / torch.finfo(torch.float32).eps
        return 5e-8 * precision * math.sqrt(sum(p.numel() for p in self.params))

    @property
    def effective_inner_lr(self) -> float:
        """The step length really walked: `inner_lr`, or 0 where that is below [`min_inner_lr`]."""
        return self.inner_lr if self.inner_lr >= self.min_inner_lr else 0.0

    @property
    def steps_taken(self) -> int:
        """Inner steps of the last window that were not left out: k in the formulas."""
        return sum(self.taken)

    @property
    def path_cosine(self) -> float:
        """Mean pairwise cosine of the last window's inner gradients, (k ||p||^2 - 1) / (k - 1); NaN for k < 2."""
        k, norm = self.steps_taken, self.pseudo_gradient_norm
        return math.nan if norm is None or k < 2 else (k * float(norm) ** 2 - 1) / (k - 1)

    @contextmanager
    def window(self) -> Iterator["Nexus"]:
        """
        One outer step: run `loss.backward(); nexus.inner_step()` for each micro-batch inside.

        Leaving normally puts the pseudo-gradient into `.grad` (None where no step taken met a gradient). Leaving by an
        exception clears `.grad`. Either way the parameters are restored bit for bit.
        """
        if self._open:
            raise RuntimeError("A Nexus window is already open: windows cannot be nested.")
        try:
            try:
                self._enter()
                yield self
                self._load_pseudo_gradient()
            except BaseException:
                self._clear_gradients()
                raise
            finally:
                self.restore()  # (4)
        finally:
            self._open = False
            self.restore()  # again, in case a second interrupt (Ctrl-C twice) broke off the first

    @torch.no_grad()
    def _enter(self) -> None:
        self._open = True
        self._clear_gradients()
        self._norms: list[Tensor] = []
        self._met: list[list[int]] = []  # per inner step: positions of the parameters that had a gradient
        self._gamma = self.effective_inner_lr
        self._summing = not self._gamma or self.direction == "random"
        if self._summing:
            self._sum.zero()
        if self._gamma:
            self._snapshot.save()  # (1)
            self._displaced = True  # only now is there something to go back to

    @torch.no_grad()
    def inner_step(self) -> Tensor:
        """
        Take one normalized step along the gradients in `.grad`, and clear them.

        Returns:
            `Tensor`: 0-d, the gradient's norm. If it is zero or not finite, the step was left out.

        Raises:
            RuntimeError: outside a window, or without any gradient.
            ValueError: a sparse gradient.
        """
        if not self._open:
            raise RuntimeError("inner_step() was called outside `with nexus.window():`.")
        met = [i for i, p in enumerate(self.params) if p.grad is not None]
        if not met:
            raise RuntimeError("inner_step() found no gradient: call loss.backward() before it.")
        params = [shard(self.params[i]) for i in met]
        grads = [shard(p.grad) for p in self.params if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise ValueError("Nexus does not support sparse gradients; build the embedding with sparse=False.")
        norm = self._reduce_norm(global_norm(grads))
        usable = norm.isfinite() & (norm > 0)
        length = norm
        if self._summing:
            self._sum.add_scaled(met, grads, 1 / norm, usable)
        if self._gamma and self.direction == "random":
            fill_normal_(grads, (*self._key, self.outer_step, len(self._norms)))
            length = self._reduce_norm(global_norm(grads))
        if self._gamma:
            self._snapshot.wait()  # it may still be on its way to another device
            add_scaled_(params, grads, -self._gamma / length, usable)  # (2)
        self._norms.append(norm)
        self._met.append(met)
        self._clear_gradients()
        return norm

    @torch.no_grad()
    def _load_pseudo_gradient(self) -> None:
        self._clear_gradients()
        norms = torch.stack(self._norms).tolist() if self._norms else []  # the window's only host synchronisation
        self.taken = [math.isfinite(norm) and norm > 0 for norm in norms]
        self.pseudo_gradient_norm = None
        self.outer_step += 1
        if not any(self.taken):
            return
        met = sorted({i for step, taken in zip(self._met, self.taken, strict=True) if taken for i in step})
        if self._summing:
            pseudo_gradient = self._sum.values(met)
            torch._foreach_div_(pseudo_gradient, self.steps_taken)
        else:
            pseudo_gradient = self._snapshot.minus_tensors(met)
            torch._foreach_div_(pseudo_gradient, self._gamma * self.steps_taken)  # (3)
        for i, values in zip(met, pseudo_gradient, strict=True):
            self.params[i].grad = as_gradient(values, self.params[i])
        self.pseudo_gradient_norm = self._reduce_norm(global_norm(pseudo_gradient))

    def restore(self) -> None:
        """
        Put the parameters back to the snapshot if they are displaced. Idempotent.

        Leaving a window does it. After an interrupt in a loop of your own it does no harm to call it once more: a
        signal that arrives just as Python begins to leave the `with` block can keep it from being left.
        """
        if self._displaced:
            with torch.no_grad():
                self._snapshot.restore()
            self._displaced = False

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """
        The weights of the window's start inside, those reached on the path again after: for a save in the middle of a
        window that goes on, as by a signal handler. Without an open window it is [`restore`].
        """
        if not (self._open and self._displaced):
            self.restore()
            yield
            return
        # Through `.data`: autograd would take a forward's saved weights for changed ones, and they will not be.
        self._snapshot.wait()
        path = [shard(p).data for p in self.params]
        walked = [p.clone() for p in path]
        torch._foreach_copy_(path, self._snapshot.copies)
        try:
            yield
        finally:
            torch._foreach_copy_(path, walked)

    def _clear_gradients(self) -> None:
        for p in self.params:
            p.grad = None
