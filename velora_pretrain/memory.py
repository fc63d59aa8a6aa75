"""Where the bytes are: every tensor of a training step, once per storage, by category, at the moment of the peak.

A dispatch mode sees each operation and notes the storages of its results; a storage is alive until its last tensor
dies. What a storage is, is known from who holds it:

    weights            parameters of the model
    buffers            registered buffers
    gradients          .grad of the parameters, once the backward pass has accumulated them
    optimizer state    tensors in `optimizer.state`
    saved activations  tensors that the autograd graph keeps for the backward pass
    loss               what else is made between the trunk's end and the loss: logits, probabilities, sums
    temporaries        all else: outputs on their way, gradients of activations, work space of the step

Saved activations are told apart by the kind of module that saved them first, which is the module that was running: a
norm's output is the attention's, since q, k and v save it. Nothing here knows the layers' classes, only Hugging Face's
names of modules.

The same code measures real tensors and predicts from fake ones (`torch._subclasses.FakeTensorMode`), which have shapes
but no memory, so the prediction runs the real model and cannot drift from it. Memory that a kernel takes inside itself
and gives back (a GEMM's work space) is not seen, nor what an allocator rounds up or keeps.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from velora_pretrain.gradients import SteppingOptimizer
from velora_pretrain.matrix_products import product_operations
from velora_pretrain.memory_use import CATEGORIES, AliveTensors, Category, MemoryUse, ModuleKind, Moment

_KIND_OF_NAME: dict[str, ModuleKind] = {
    "norm": "norms",
    "attn": "attention",
    "mlp": "mlp",
    "embed": "embedding",
    "head": "head",
}
"""What stands in the name of a module of each kind."""
LARGEST_SHOWN = 12
"""Groups of tensors named at the peak."""


@dataclass(kw_only=True)
class _Stored:
    """One storage's life, in events of the tracker."""

    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    born: int
    filings: list[tuple[int, Category, str]]
    """From which event on it was of which category and origin."""
    died: float = float("inf")

    def at(self, event: int) -> tuple[Category, str]:
        """Category and origin then."""
        return next(filing[1:] for filing in reversed(self.filings) if filing[0] <= event)


class MemoryTracker(TorchDispatchMode):
    """Follows every storage that is made while it is on, and counts operations of matrix products.

    Args:
        model: its parameters and buffers are weights and buffers; its gradients are followed.
        optimizer: its state is optimizer state, as of the last `settle`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | SteppingOptimizer) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._names: dict[Any, str] = {
            parameter: _without_numbers(name) for name, parameter in model.named_parameters()
        }
        self._alive: dict[int, _Stored] = {}
        self._finalizers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._seen: list[_Stored] = []
        self._event = self._peak_event = 0
        self._alive_bytes = self._peak_bytes = 0
        self._peak_moment: Moment = "step"
        self._hooks: list[Any] = []
        self._saved_hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._between: Moment = "step"
        self._running: list[ModuleKind] = []
        self._loss_nodes = range(0)
        self.operations = {"passes": 0, "hooks": 0, "step": 0}
        """Of matrix products, since the last `forget_peak`: forward and backward passes, what is done with a gradient
        as it arrives, and the optimizer's step."""

    def __enter__(self) -> MemoryTracker:
        super().__enter__()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._gradient_arrived)
                self._hooks.append(hook)
                # Before hooks that use the gradient up.
                parameter._post_accumulate_grad_hooks.move_to_end(hook.id, last=False)  # pyright: ignore
        self._follow_modules()
        self._saved_hooks.__enter__()
        self.settle()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._saved_hooks.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)

    def _follow_modules(self) -> None:
        """Notes which module runs, when the trunk, the model's largest part, has ended, and when the model has."""
        trunk = max(self._model.children(), key=lambda child: sum(1 for _ in child.modules()), default=None)
        for name, module in self._model.named_modules():
            before, after = self._module_hooks(_kind_of(name), is_model=module is self._model, is_trunk=module is trunk)
            self._hooks.append(module.register_forward_pre_hook(before))
            # Also when recomputation stops a forward pass that has made enough.
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    def _module_hooks(self, kind: ModuleKind, *, is_model: bool, is_trunk: bool) -> tuple[Any, Any]:
        def before(*_: Any) -> None:
            if is_model:
                # Also sums of gradients that an earlier micro-batch has left in the optimizer's state.
                self.settle()
                self._running.clear()
                self._between = "forward"
            self._running.append(kind)

        def after(*_: Any) -> None:
            if self._running:
                self._running.pop()
            here = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
            if is_trunk:
                self._between, self._loss_nodes = "loss", range(here, 2**62)
            if is_model:
                self._loss_nodes = range(self._loss_nodes.start, here)

        return before, after

    def settle(self) -> None:
        """Sorts what the model and the optimizer hold now into its categories."""
        for parameter, name in self._names.items():
            self._file(parameter, "weights", name)
        for name, buffer in self._model.named_buffers():
            self._file(buffer, "buffers", _without_numbers(name))
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self._file(value, "optimizer_state", f"{key} of {self._names.get(parameter, 'a parameter')}")
        for parameter, name in self._names.items():
            # Sums that a rule keeps in a form of its own are gradients all the same.
            gradient = getattr(self._optimizer, "gradient", lambda p: p.grad)(parameter)
            if gradient is not None:
                self._file(gradient, "gradients", name)

    def forget_peak(self) -> None:
        """Starts a new search for the peak."""
        self._seen = list(self._alive.values())
        for stored in self._seen:
            del stored.filings[:-1]
        self._peak_bytes = 0
        self.operations = dict.fromkeys(self.operations, 0)
        self._note_peak()

    @property
    def use(self) -> MemoryUse:
        """What was alive at the peak."""
        event = self._peak_event
        by_category: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        by_module: dict[ModuleKind, int] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for stored in self._seen:
            if not stored.born <= event < stored.died:
                continue
            category, origin = stored.at(event)
            by_category[category] += stored.num_bytes
            if category == "saved_activations":
                kind: Any = origin
                by_module[kind] = by_module.get(kind, 0) + stored.num_bytes
            groups.setdefault((category, origin, stored.shape, stored.dtype), []).append(stored.num_bytes)
        largest = sorted(groups.items(), key=lambda group: (-sum(group[1]), group[0]))[:LARGEST_SHOWN]
        return MemoryUse(
            **{f"{category}_bytes": by_category[category] for category in CATEGORIES},
            peak_bytes=self._peak_bytes,
            peak_moment=self._peak_moment,
            saved_by_module_bytes=dict(sorted(by_module.items(), key=lambda item: -item[1])),
            largest_at_peak=tuple(
                AliveTensors(
                    category=category,
                    origin=origin,
                    shape=shape,
                    dtype=dtype,
                    count=len(sizes),
                    total_bytes=sum(sizes),
                )
                for (category, origin, shape, dtype), sizes in largest
            ),
        )

    def elements(self, category: Category) -> int:
        """Elements alive now in `category`, whatever their formats."""
        alive = [stored for stored in self._alive.values() if stored.filings[-1][1] == category]
        return sum(stored.num_bytes // getattr(torch, stored.dtype).itemsize for stored in alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            # Asked of a fake tensor several times per operation, and slow by the long way.
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        operations = product_operations(func, args)
        if operations:
            self.operations[self._payer()] += operations
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._file(tensor, None, func.overloadpacket.__name__)
        return result

    def _payer(self) -> str:
        if self._moment() == "step":
            return "step"
        node = torch._C._current_autograd_node()
        return "hooks" if node is not None and "AccumulateGrad" in node.name() else "passes"

    def _moment(self) -> Moment:
        """The part of the step that runs now."""
        if torch._C._current_graph_task_id() != -1:
            self._between = "step"
            return "backward"
        return self._between

    def _is_in_loss(self) -> bool:
        """Whether the loss is being computed, or the backward pass is at one of its nodes."""
        moment = self._moment()
        if moment != "backward":
            return moment == "loss"
        node = torch._C._current_autograd_node()
        return node is not None and node._sequence_nr() in self._loss_nodes  # pyright: ignore

    def _pack(self, tensor: Tensor) -> Tensor:
        kind = self._running[-1] if self._running else "other"
        is_head = kind == "other" and self._moment() == "loss"
        self._file(tensor, "saved_activations", "head" if is_head else kind)
        # Not the tensor itself: a node that keeps its own output would keep itself alive.
        return tensor.detach()

    def _gradient_arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._file(parameter.grad, "gradients", self._names[parameter])

    def _file(self, tensor: Tensor, category: Category | None, origin: str) -> None:
        """Counts a storage when it is first seen and moves it to `category`.

        Args:
            tensor: one of those over it.
            category: None leaves it where it is; a new one is the loss's or a temporary until somebody holds it.
            origin: see `AliveTensors`.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        stored = self._alive.get(key)
        if stored is None:
            first: Category = "loss" if category is None and self._is_in_loss() else "temporaries"
            self._event += 1
            self._alive[key] = stored = _Stored(
                num_bytes=storage.nbytes(),
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                born=self._event,
                filings=[(self._event, first, origin)],
            )
            self._seen.append(stored)
            self._finalizers[key] = weakref.ref(storage, lambda _: self._died(key))
            self._alive_bytes += stored.num_bytes
            if category is None:
                self._note_peak()
        if category is None:
            return
        before = stored.filings[-1][1]
        # What the graph keeps is a saved activation only if nobody else holds it anyway.
        if before == category or (category == "saved_activations" and before not in ("temporaries", "loss")):
            return
        self._event += 1
        stored.filings.append((self._event, category, origin))
        self._note_peak()

    def _died(self, key: int) -> None:
        self._event += 1
        stored = self._alive.pop(key)
        stored.died = self._event
        self._alive_bytes -= stored.num_bytes
        self._finalizers.pop(key)

    def _note_peak(self) -> None:
        if self._alive_bytes > self._peak_bytes:
            self._peak_bytes, self._peak_event = self._alive_bytes, self._event
            self._peak_moment = self._moment()


def _without_numbers(name: str) -> str:
    """A parameter's name with * for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _kind_of(name: str) -> ModuleKind:
    """The kind of the module of that name, by the innermost part that tells it."""
    parts = name.split(".")
    for part in reversed(parts):
        for text, kind in _KIND_OF_NAME.items():
            if text in part:
                return kind
    # What a whole block keeps, beside its attention and MLP, is the residual stream that its norms read.
    return "norms" if parts[-1].isdigit() else "other"
