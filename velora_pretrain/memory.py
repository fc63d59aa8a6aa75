"""Where the bytes are: every tensor of a training step, once per storage, by category, at the moment of the peak.

A dispatch mode sees each operation and notes the storages of its results; a storage is alive until its last tensor
dies. What a storage is, is known from who holds it:

    weights            parameters of the model
    buffers            registered buffers
    gradients          .grad of the parameters, once the backward pass has accumulated them
    optimizer state    tensors in `optimizer.state`
    saved activations  tensors that the autograd graph keeps for the backward pass
    temporaries        all else: outputs on their way, gradients of activations, work space of loss and step

The same code measures real tensors and predicts from fake ones (`torch._subclasses.FakeTensorMode`), which have shapes
but no memory, so the prediction runs the real model and cannot drift from it. Memory that a kernel takes inside itself
and gives back (a GEMM's work space) is not seen, nor what an allocator rounds up or keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from velora_pretrain.gradients import Gradients, SteppingOptimizer

Category = Literal["weights", "gradients", "optimizer_state", "buffers", "saved_activations", "temporaries"]
CATEGORIES: tuple[Category, ...] = (
    "weights",
    "gradients",
    "optimizer_state",
    "buffers",
    "saved_activations",
    "temporaries",
)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes alive at the peak of a step; the categories add up to the peak."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    buffers_bytes: int
    saved_activations_bytes: int
    temporaries_bytes: int
    peak_bytes: int


class MemoryTracker(TorchDispatchMode):
    """Follows every storage that is made while it is on.

    Args:
        model: its parameters and buffers are weights and buffers; its gradients are followed.
        optimizer: its state is optimizer state, as of the last `settle`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | SteppingOptimizer) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._category: dict[int, Category] = {}
        self._storage_bytes: dict[int, int] = {}
        self._finalizers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._alive_bytes: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self._peak: dict[Category, int] = dict(self._alive_bytes)
        self._peak_bytes = 0
        self._hooks: list[Any] = []
        self._saved_hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> MemoryTracker:
        super().__enter__()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_arrived))
        self._saved_hooks.__enter__()
        self.settle()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._saved_hooks.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)

    def settle(self) -> None:
        """Sorts what the model and the optimizer hold now into its categories."""
        for parameter in self._model.parameters():
            self._file(parameter, "weights")
            if parameter.grad is not None:
                self._file(parameter.grad, "gradients")
        for buffer in self._model.buffers():
            self._file(buffer, "buffers")
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._file(value, "optimizer_state")

    def forget_peak(self) -> None:
        """Starts a new search for the peak."""
        self._peak_bytes = 0
        self._note_peak()

    @property
    def use(self) -> MemoryUse:
        """What was alive at the peak."""
        return MemoryUse(
            **{f"{category}_bytes": self._peak[category] for category in CATEGORIES}, peak_bytes=self._peak_bytes
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._file(tensor, None)
        return result

    def _pack(self, tensor: Tensor) -> Tensor:
        self._file(tensor, "saved_activations")
        # Not the tensor itself: a node that keeps its own output would keep itself alive.
        return tensor.detach()

    def _gradient_arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._file(parameter.grad, "gradients")

    def _file(self, tensor: Tensor, category: Category | None) -> None:
        """Counts a storage when it is first seen (a temporary until somebody holds it) and moves it to `category`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._category:
            self._category[key] = "temporaries"
            self._storage_bytes[key] = storage.nbytes()
            self._finalizers[key] = weakref.ref(storage, lambda _: self._died(key))
            self._alive_bytes["temporaries"] += storage.nbytes()
            if category is None:
                self._note_peak()
        before = self._category[key]
        # What the graph keeps is a saved activation only if nobody else holds it anyway.
        if category is None or (category == "saved_activations" and before != "temporaries"):
            return
        self._category[key] = category
        self._alive_bytes[before] -= self._storage_bytes[key]
        self._alive_bytes[category] += self._storage_bytes[key]
        self._note_peak()

    def _died(self, key: int) -> None:
        self._alive_bytes[self._category.pop(key)] -= self._storage_bytes.pop(key)
        self._finalizers.pop(key)

    def _note_peak(self) -> None:
        total = sum(self._alive_bytes.values())
        if total > self._peak_bytes:
            self._peak_bytes, self._peak = total, dict(self._alive_bytes)


def peak_of_step(
    model: nn.Module,
    optimizer: SteppingOptimizer,
    micro_batches: Iterable[Callable[[], Tensor]],
    *,
    in_backward: bool = False,
) -> MemoryUse:
    """The peak of one training step, after a first one that has made the optimizer's state.

    Args:
        model: as it trains.
        optimizer: over its parameters.
        micro_batches: each gives the loss of one micro-batch; two of them show gradients beside activations.
        in_backward: whether parameters move in the backward pass.
    """
    losses = list(micro_batches)
    with MemoryTracker(model, optimizer) as tracker:
        # After the tracker, which sees each gradient before it is used.
        gradients = Gradients(model, optimizer, in_backward=in_backward)
        for _ in range(2):
            tracker.forget_peak()
            for number, loss in enumerate(losses, start=1):
                value = loss()
                with gradients.of_micro_batch(number, len(losses)):
                    value.backward()
                del value
            gradients.step()
            tracker.settle()
        return tracker.use
