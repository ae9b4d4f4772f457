"""Other updates from the k micro-batches of an outer step, all with the same AdamW and the same clipping."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

__all__ = ["NaiveNexus", "SharpnessAware", "UPGradDescent"]


class WindowTrainer(Trainer):
    """Collect the micro-batches of an outer step, then call `train_window` to set `.grad`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._batches: list[dict[str, Any]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._batches.append(inputs)
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._batches = self._batches, []
        return self.train_window(model, batches, num_items_in_batch)

    def train_window(self, model: nn.Module, batches: list[dict[str, Any]], items: Any) -> Tensor:
        """Set `.grad` for `batches`, which have `items` tokens in total, and return the loss."""
        raise NotImplementedError

    def accumulate(self, model: nn.Module, batches: list[dict[str, Any]], items: Any) -> Tensor:
        """Accumulate the gradients of the micro-batches as the stock Trainer does."""
        return torch.stack(
            [super(WindowTrainer, self).training_step(model, inputs, items) for inputs in batches]
        ).sum()


class NaiveNexus(WindowTrainer):
    """The Nexus update in its simplest form, with a deep copy of the state dict and loops in Python."""

    inner_lr = 0.05

    def train_window(self, model: nn.Module, batches: list[dict[str, Any]], items: Any) -> Tensor:
        start = copy.deepcopy(model.state_dict())
        loss = torch.zeros((), device=self.args.device)
        steps = 0
        for inputs in batches:
            model.zero_grad()
            loss += self.accumulate(model, [inputs], items)
            norm = sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5
            if not torch.isfinite(norm):
                continue
            steps += 1
            with torch.no_grad():
                for p in model.parameters():
                    p -= self.inner_lr * p.grad / norm
        for name, p in model.named_parameters():
            p.grad = (start[name] - p.detach()) / (self.inner_lr * steps)
        model.load_state_dict(start)
        return loss


class SharpnessAware(WindowTrainer):
    """
    Standard SAM (arXiv 2010.01412) of the accumulated batch: an ascent step of length `rho` along its gradient, then
    the gradient at that point. It takes 2k forward and backward passes.
    """

    rho = 0.05

    def train_window(self, model: nn.Module, batches: list[dict[str, Any]], items: Any) -> Tensor:
        loss = self.accumulate(model, batches, items)
        params = list(model.parameters())
        with torch.no_grad():
            grads = [p.grad for p in params]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            start = [p.detach().clone() for p in params]
            torch._foreach_add_(params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))
        del grads
        model.zero_grad()
        self.accumulate(model, batches, items)
        with torch.no_grad():
            torch._foreach_copy_(params, start)
        return loss


class UPGradDescent(WindowTrainer):
    """
    Jacobian descent (arXiv 2406.16232) with TorchJD's UPGrad over the losses of the k micro-batches.

    The rows of the Jacobian are the gradients of k ordinary backward passes. `torchjd.autojac.backward` on the losses
    gives the same rows, but goes through each graph k times and holds the activations of all of them.
    """

    def train_window(self, model: nn.Module, batches: list[dict[str, Any]], items: Any) -> Tensor:
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad

        params: list[Any] = list(model.parameters())
        losses, rows = [], []
        for inputs in batches:
            losses.append(self.accumulate(model, [inputs], items))
            rows.append([p.grad for p in params])
            model.zero_grad()
        for p, gradients in zip(params, zip(*rows, strict=True), strict=True):
            p.jac = torch.stack(gradients)
        del rows
        # Weights of 1 sum gradients that do not conflict, as plain accumulation does.
        aggregator = UPGrad(torch.ones(len(batches), device=self.args.device))
        jac_to_grad(params, aggregator, optimize_gramian_computation=True)  # takes less memory
        return torch.stack(losses).sum()
