"""SWEET's gradients, one segment at a time.

Under SWEET no gradient crosses an exit (Rotem et al., ACL 2023, section 4). So a segment's gradients are known as soon
as its exit has a loss, and its activations are freed before the next segment is run. The gradients wait, and the loss
that the model returns hands them to autograd as a function of the parameters: whoever calls `backward` on it
(`Trainer`, a loss scaler, DDP's hooks) sees an ordinary model.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

# Float16 gradients of the loss as it is would vanish below 2 ** -24; those of 4096 times the loss do below 2 ** -36.
_FIRST_SCALE = 2.0**12


class LossScale:
    """What a float16 loss is multiplied by before its gradients are computed, so that small ones do not vanish.

    Any loss scaler comes too late for gradients that are computed during the forward pass. Halved after each pass
    whose gradients overflowed; a scaler outside skips that step, as it does for its own overflows.
    """

    def __init__(self) -> None:
        # Made when it is needed: models are built on the meta device.
        self._value: torch.Tensor | None = None

    def on(self, device: torch.device) -> torch.Tensor:
        """The scale as a float32 scalar on a device."""
        if self._value is None:
            self._value = torch.tensor(_FIRST_SCALE)
        self._value = self._value.to(device)
        return self._value

    def note(self, gradients: list[torch.Tensor]) -> None:
        """Halves the scale if a gradient is infinite or NaN. Decided on the device: nothing waits for it."""
        is_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        scale = self.on(is_finite.device)
        self._value = torch.where(is_finite, scale, (scale / 2).clamp(min=1))


class LocalGradients:
    """Gradients of the exits' losses, computed while the forward pass goes on.

    Args:
        parameters (`list[nn.Parameter]`): Those that are trained.
        loss_scale (`LossScale`): For losses that come from float16 logits.
    """

    def __init__(self, parameters: list[nn.Parameter], loss_scale: LossScale):
        self.parameters = parameters
        self.loss_scale = loss_scale
        self.scale: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        """Adds the gradients of one exit's loss, and frees what they were computed from.

        Args:
            loss (`torch.Tensor`): A scalar.
            logits (`torch.Tensor`): What it was computed from; of half precision if the layers are.
        """
        self.losses.append(loss.detach())
        if not loss.requires_grad:  # head and segment are frozen
            return
        if logits.dtype is torch.float16:
            self.scale = self.loss_scale.on(loss.device)
            loss = loss * self.scale
        # Autocast is for forward passes only.
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                kept = self._gradients[index]
                self._gradients[index] = gradient if kept is None else kept + gradient

    def loss(self) -> torch.Tensor:
        """The sum of the losses; its `backward` gives the parameters their gradients."""
        total = torch.stack(self.losses).sum()
        reached = [index for index, gradient in enumerate(self._gradients) if gradient is not None]
        gradients = [gradient for gradient in self._gradients if gradient is not None]
        self._gradients = []
        if not reached:
            return total
        if self.scale is not None:
            self.loss_scale.note(gradients)
        return _HandOver.apply(total, gradients, self.scale, *(self.parameters[index] for index in reached))


class _HandOver(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], scale: torch.Tensor | None, *_: nn.Parameter
    ) -> torch.Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError(
                "the loss of a SWEET model can be differentiated once only: its gradients were computed during the "
                "forward pass and are handed over. For more, set model.config.exit_local_gradients = False."
            )
        factor = gradient if ctx.scale is None else gradient / ctx.scale
        handed_over = []
        while ctx.gradients:  # each is let go before the next one is multiplied
            handed_over.append(ctx.gradients.pop(0) * factor)
        return None, None, None, *handed_over


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
        and not _is_sharded(model)
    )


def _is_sharded(model: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return (
        is_deepspeed_zero3_enabled()
        or any(is_fsdp_managed_module(module) for module in model.modules())
        or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    )
