"""SWEET's gradients, one segment at a time.

Under SWEET no gradient crosses an exit (Rotem et al., ACL 2023, section 4). So a segment's gradients are known as soon
as its exit has a loss, and its activations are freed before the next segment is run. The gradients wait, and the loss
that the model returns hands them to autograd as a function of the parameters: whoever calls `backward` on it
(`Trainer`, a loss scaler, DDP's hooks) sees an ordinary model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

# The largest gradient of a score in float16, from which those of the activations are computed: they may grow two
# thousand times on their way down, and are lost only where they shrink to a billionth.
_LARGEST_START = 32.0


class LocalGradients:
    """Gradients of the exits' losses, computed while the forward pass goes on.

    Args:
        parameters (`list[nn.Parameter]`): Those that are trained.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.losses: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, outputs: list[torch.Tensor], loss_of: Callable[..., torch.Tensor]) -> None:
        """Adds the gradients of one exit's loss, and frees what they were computed from.

        Args:
            outputs (`list[torch.Tensor]`): What the exit says.
            loss_of (`Callable`): Its loss, a scalar, from as many tensors.
        """
        is_half = outputs[0].dtype is torch.float16
        leaves = [(tensor.detach().float() if is_half else tensor.detach()).requires_grad_() for tensor in outputs]
        loss = loss_of(*leaves)
        self.losses.append(loss.detach())
        if not any(tensor.requires_grad for tensor in outputs):  # head and segment are frozen
            return
        # Autocast is for forward passes only.
        with torch.autocast(loss.device.type, enabled=False):
            starts = torch.autograd.grad(loss, leaves)
            scale = _float16_scale(starts) if is_half else None
            self._add_from(outputs, starts, scale)

    def _add_from(
        self, outputs: list[torch.Tensor], starts: tuple[torch.Tensor, ...], scale: torch.Tensor | None
    ) -> None:
        scaled = [start if scale is None else start * scale for start in starts]
        found = torch.autograd.grad(
            outputs,
            self.parameters,
            [start.to(tensor.dtype) for start, tensor in zip(scaled, outputs)],
            allow_unused=True,
        )
        for index, gradient in enumerate(found):
            if gradient is not None:
                gradient = gradient if scale is None else gradient / scale.to(gradient.device)
                kept = self._gradients[index]
                self._gradients[index] = gradient if kept is None else kept + gradient

    def loss(self) -> torch.Tensor:
        """The sum of the losses; its `backward` gives the parameters their gradients."""
        total = torch.stack([loss.to(self.losses[0].device) for loss in self.losses]).sum()
        reached = [index for index, gradient in enumerate(self._gradients) if gradient is not None]
        gradients = [gradient for gradient in self._gradients if gradient is not None]
        self._gradients = []
        if not reached:
            return total
        return _HandOver.apply(total, gradients, *(self.parameters[index] for index in reached))


def _float16_scale(starts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What scores' gradients are multiplied by, so that those of activations neither vanish nor overflow in float16.

    A loss scaler outside comes too late for gradients that are computed during the forward pass. Found on the device:
    nothing waits for it.
    """
    largest = torch.stack([start.abs().amax() for start in starts]).amax()
    return torch.where(largest > 0, _LARGEST_START / largest, torch.ones_like(largest))


class _HandOver(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *_: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError(
                "the loss of a SWEET model can be differentiated once only: its gradients were computed during the "
                "forward pass and are handed over. For more, set model.config.exit_local_gradients = False."
            )
        handed_over = []
        while ctx.gradients:  # each is let go before the next one is multiplied
            own = ctx.gradients.pop(0)
            handed_over.append(own * gradient.to(own.device))
        return None, None, *handed_over


class _RefuseGradient(torch.autograd.Function):
    """Says why there is no gradient, where a detached tensor would be silent."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        # DDP that looks for unused parameters sends zeros to outputs that the loss does not come from.
        if not gradient.any():
            return None, None
        raise RuntimeError(
            "these scores have no gradient: with labels, a SWEET model computes the gradients of its own loss during "
            "the forward pass and frees the activations. For a loss of your own call the model without labels, or set "
            "model.config.exit_local_gradients = False."
        )


def refuse_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The same values; a `RuntimeError` says why where somebody wants a gradient through them."""
    return _RefuseGradient.apply(tensor.detach(), tensor.new_zeros((), requires_grad=True))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def can_be_local(model: nn.Module) -> bool:
    """Whether a model's parameters are whole during the forward pass, and its gradients may be asked for there.

    Not where each process holds a part of a parameter (FSDP, DeepSpeed ZeRO 3, tensor parallelism), in a replica of
    `nn.DataParallel` (it has no parameters), under `torch.compile` of the whole model, or where somebody's hook
    changes gradients (it would be called twice).
    """
    parameters = trained_parameters(model)
    return (
        bool(parameters)
        and not torch.compiler.is_compiling()
        and not any(parameter._backward_hooks for parameter in parameters)
        and not is_sharded(model)
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of a parameter, so that all of them have to run its layer together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return (
        is_deepspeed_zero3_enabled()
        or any(is_fsdp_managed_module(module) for module in model.modules())
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    )
