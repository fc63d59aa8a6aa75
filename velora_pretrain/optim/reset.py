"""What a restart does to an optimizer: ReLoRA's partial reset of the moments (arXiv 2307.05695, section 3).

The low-rank factors have become new ones, so what the moments remember belongs to others. All but the largest are set
to zero, each moment by its own magnitudes. Where the second moment goes, the first goes with it: the gradient of a new
A is exactly zero (B is), and m / (√0 + ε) would be a step 10⁸ times m.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from velora_pretrain.optim.moments import keep_moment, load_moment


@torch.no_grad()
def prune_(moment: Tensor, share: float) -> Tensor:
    """Sets the `share` of the elements that are smallest in magnitude to zero, rounded to a whole number; in place."""
    num_kept = moment.numel() - round(share * moment.numel())
    # `topk` and not a threshold: where many are equal, the number is still exact.
    kept = moment.abs().flatten().topk(num_kept, sorted=False).indices
    values = moment.take(kept)
    return moment.zero_().put_(kept, values)


@torch.no_grad()
def reset_moments(optimizer: Optimizer, parameters: Iterable[Tensor], share: float = 0.99) -> float:
    """Sets the smallest elements of the moments of some parameters to zero, in place.

    Args:
        optimizer: keeps its moments as `exp_avg` and `exp_avg_sq`, in whatever number of bits.
        parameters: whose moments; one that has not been stepped has none.
        share: of each moment, from 0 to 1; of the first moment more, where the second has become zero.

    Returns:
        The share of all elements of these moments that is zero now; in 8 bits, before they are rounded again.
    """
    zeros = elements = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "exp_avg" not in state:
            continue
        m, u = (prune_(load_moment(state, name, parameter), share) for name in ("exp_avg", "exp_avg_sq"))
        m.masked_fill_(u == 0, 0.0)
        for name, moment in (("exp_avg", m), ("exp_avg_sq", u)):
            keep_moment(state, name, moment, 8 if f"{name}_absmax" in state else 32)
            zeros += int((moment == 0).sum())
            elements += moment.numel()
    assert elements, "none of the parameters has moments"
    return zeros / elements
