"""Which layers an exit's loss may update (`exit_routing`).

SWEET (Rotem et al., ACL 2023, section 4) detaches the hidden state that one exit's segment hands to the next. A number
between 0 (SWEET) and 1 (joint training) lets that share of the gradient through.
"""

from typing import Any

import torch

SHARES = {"joint": 1.0, "sweet": 0.0, "disjoint": 0.0}


def gradient_share(routing: str | float) -> float:
    """Share of a later exit's gradient that passes a boundary, 0 to 1."""
    return SHARES[routing] if isinstance(routing, str) else float(routing)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, share: float) -> torch.Tensor:
        ctx.share = share
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.share, None


def pass_gradient(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The same tensor; of its gradient only `share` (0 to 1) reaches what it was made from."""
    if share == 1.0:
        return tensor
    return tensor.detach() if share == 0.0 else _ScaleGradient.apply(tensor, share)
