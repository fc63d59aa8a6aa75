"""What is made again in the backward pass in place of being kept.

    elementwise    one tensor, by elementwise operations on tensors that are kept anyway: a norm's output from its
                   input, SwiGLU's product from gate and up. No matrix product is repeated, the bits are the same.
    a region       everything inside a part of the model, from the part's input (arXiv 1604.06174): one more forward
                   pass through it.

Both change what autograd keeps and nothing else, so they go with any kind of layer. Elementwise rebuilding frees what a
layer that keeps its whole input would have kept; beside layers that keep it compressed it frees nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "elementwise", "mlp", "block"]

_is_recomputing = False


def is_recomputing() -> bool:
    """Whether a region runs again for the backward pass: what it sees has been seen before."""
    return _is_recomputing


@contextmanager
def _recomputing() -> Iterator[None]:
    global _is_recomputing
    _is_recomputing = True
    try:
        yield
    finally:
        _is_recomputing = False


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass, and around the second."""
    return nullcontext(), _recomputing()


def run_again_in_backward(region: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """region(*inputs), of which only the inputs are kept; random numbers are drawn again as they were."""
    if not torch.is_grad_enabled():
        return region(*inputs)
    if torch.compiler.is_compiling():
        # Traced once, so nothing sees the second pass; and the compiler takes no contexts of ours.
        result = checkpoint(region, *inputs, use_reentrant=False)
    else:
        result = checkpoint(region, *inputs, use_reentrant=False, context_fn=_contexts)
    assert isinstance(result, Tensor)
    return result


class _Rebuilt:
    """A tensor in the place of all its saved views: made when the first is asked for, dropped after the last."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._num_saved = self._num_left = 0
        self._value: Tensor | None = None

    def save(self, view: Tensor) -> _Kept:
        """What is kept in the place of `view`."""
        self._num_saved += 1
        return _Kept(self, view)

    def take(self) -> Tensor:
        """The tensor, for one of its views."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._make()
            self._num_left = self._num_saved
        self._num_left -= 1
        self._value = value if self._num_left else None
        return value


class _Kept:
    """One saved view: called, it gives the view again."""

    def __init__(self, rebuilt: _Rebuilt, view: Tensor) -> None:
        self._rebuilt = rebuilt
        self._layout = (view.shape, view.stride(), view.storage_offset())

    def __call__(self) -> Tensor:
        return self._rebuilt.take().as_strided(*self._layout)


@contextmanager
def rebuilt_in_backward(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Around the layers that read `tensor`: wherever they would keep it, they keep how it is made.

    Args:
        tensor: contiguous, and kept by nobody else.
        make: gives the same bits again, from tensors that are kept anyway.

    Under torch.compile this does nothing: the compiler itself makes again what elementwise operations can.
    """
    if torch.compiler.is_compiling():
        yield
        return
    storage, rebuilt = tensor.untyped_storage()._cdata, _Rebuilt(make)
    # Hooks around these ones, a memory tracker's for instance, still see all other tensors.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata == storage:
            return rebuilt.save(saved)
        # Not the tensor itself: a node that keeps its own output would keep itself alive.
        return outer[0](saved) if outer else saved.detach()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            return packed()
        return outer[1](packed) if outer else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
