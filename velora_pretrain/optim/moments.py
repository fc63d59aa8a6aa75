"""How an optimizer keeps a moment: wide, or in 8 bits a block at a time (arXiv 2110.02861).

In 8 bits each block of 256 elements is divided by its largest magnitude and rounded to a table of 256 values, finer
near zero: `name` holds the places in the table, `name_absmax` one fp32 number a block. A moment is widened for the
step alone, one parameter at a time. Tensors of fewer than 4,096 elements stay wide, as in the paper.

The kernels are those of bitsandbytes, the extra `eight-bit`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from velora_pretrain.errors import UserError

BLOCK_ELEMENTS = 256
SMALLEST_ELEMENTS = 4_096
"""Tensors of fewer elements are not worth rounding."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or `dtype` where that is wider: the format that moments are computed in."""
    return torch.promote_types(dtype, torch.float32)


def load_moment(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """The moment `name` of a parameter, to be changed in place and kept again; zero at first.

    Args:
        state: the parameter's state.
        name: of the moment.
        like: a tensor of its shape, on its device.
    """
    if name not in state:
        return torch.zeros_like(like, dtype=wide(like.dtype), memory_format=torch.contiguous_format)
    if f"{name}_absmax" not in state:
        return state[name]
    operators, code = _operators(), _table(name, state[name])
    return operators.dequantize_blockwise(state[name], state[f"{name}_absmax"], code, BLOCK_ELEMENTS, torch.float32)


def keep_moment(state: dict[str, Any], name: str, value: Tensor, bits: int) -> None:
    """Keeps what `load_moment` gave, after it was changed; in 8 bits if `bits` says so and it is large enough."""
    if bits == 32 or value.numel() < SMALLEST_ELEMENTS:
        state[name] = value
        return
    code = _table(name, value)
    for key, tensor in zip(
        (name, f"{name}_absmax"), _operators().quantize_blockwise(value, code, BLOCK_ELEMENTS), strict=True
    ):
        state[key] = state[key].copy_(tensor) if key in state else tensor


def check_eight_bit() -> None:
    """Finds the kernels.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports] # noqa: F401
    except ImportError:
        raise UserError(
            'optimizer.state_bits: 8 needs bitsandbytes; install it with: pip install "velora-pretrain[eight-bit]"'
        ) from None


def _operators() -> Any:
    check_eight_bit()
    return torch.ops.bitsandbytes


def _table(name: str, like: Tensor) -> Tensor:
    """The 256 values that a moment is rounded to, on the device of `like`; without memory, if it has none."""
    if isinstance(like, FakeTensor):
        return like.new_empty(256, dtype=torch.float32)
    return _real_table(name != "exp_avg_sq", like.device)


@cache
def _real_table(is_signed: bool, device: torch.device) -> Tensor:
    import bitsandbytes.functional as functional  # pyright: ignore[reportMissingImports]

    return functional.create_dynamic_map(signed=is_signed).to(device)
