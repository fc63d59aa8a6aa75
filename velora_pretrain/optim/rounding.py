"""How a bf16 weight takes the fp32 value that a step gives it.

bf16 has 8 bits of precision: to the nearest, a change of less than 2⁻⁹ of a weight is lost, however often it comes.
Stochastic rounding (arXiv 2010.06192, section 3) goes up or down with odds by the distance, so that the expected value
is the exact one and small steps add up. The fp32 bits get a random number below 2¹⁶ added, and are cut at 16 bits:

    round(x) = cut(bits(x) + U{0, …, 2¹⁶ − 1})        E round(x) = x

It costs one random number and a few elementwise passes per weight and step, and no memory that stays. The rounding
error is a little larger than to the nearest, with a mean of zero in place of a bias.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from velora_pretrain.optim.parts import row_parts

Rounding = Literal["nearest", "stochastic"]

ROUNDED_ELEMENTS = 2**22
"""Elements that are rounded at a time: bounds the random numbers in memory."""


def round_stochastically(
    value: Float[Tensor, " *shape"], generator: torch.Generator | None = None
) -> Float[Tensor, " *shape"]:
    """`value` in bf16, each element rounded to one of its two neighbours with odds by the distance.

    Args:
        value: in fp32. What is not finite stays as it is.
        generator: source of the random numbers, on the device of `value`.
    """
    assert value.dtype == torch.float32
    noise = torch.randint(2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    rounded = noise.add_(value.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # The bits of a NaN can run over into those of a zero.
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


class Store:
    """Puts wide values into narrow parameters, rounding to the nearest."""

    def __call__(self, narrow: Tensor, value: Tensor) -> None:
        """narrow ← value, in place; nothing where the two are one tensor."""
        if narrow is not value:
            narrow.copy_(value)


class StochasticStore(Store):
    """The same for bf16 parameters, rounding stochastically.

    Args:
        seed: of all that is drawn, in the order of the calls.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, narrow: Tensor, value: Tensor) -> None:
        """narrow ← value, in place; a parameter that is no narrower than the value takes it as it is."""
        if narrow.dtype != torch.bfloat16 or value.dtype != torch.float32:
            super().__call__(narrow, value)
            return
        if self._generator is None:
            self._generator = torch.Generator(narrow.device).manual_seed(self._seed)
        for part, values in row_parts(ROUNDED_ELEMENTS, narrow, value):
            part.copy_(round_stochastically(values, self._generator))


NEAREST = Store()
"""Rounds to the nearest, as published runs do."""
