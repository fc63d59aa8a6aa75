"""Where a run's parameters are, and how the gradients of several processes become one.

    Placement    one process: it has everything, nothing is exchanged.
    Replicas     each process has everything; DistributedDataParallel averages the gradients.
    Shards       `shards.py`: each process has some rows of everything.

The trainer calls `module` for its passes, and moves the parameters of `own` from their gradients, which are ordinary
tensors of this process whatever the placement.
"""

# No postponed annotations here: DistributedDataParallel looks at those of its hook.

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from velora_pretrain.dimensions import PROJECTIONS


class ReducedBytes:
    """Counts the bytes of gradients that a process hands over to be summed with those of the others.

    Args:
        model: whose parameters are told apart: those of the blocks' projections, and the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of_projections = {p for name, p in model.named_parameters() if set(name.split(".")) & set(PROJECTIONS)}
        self._bytes = {"projections": 0, "other": 0}
        self.steps = 0

    def add(self, parameters: Iterable[Tensor], bytes_per_element: int, *, times: int = 1) -> None:
        """Counts gradients of these parameters, each exchanged `times` times."""
        for parameter in parameters:
            kind = "projections" if parameter in self._of_projections else "other"
            self._bytes[kind] += parameter.numel() * bytes_per_element * times

    def per_step(self) -> dict[str, int]:
        """The mean over the steps so far, by kind of parameter."""
        return {kind: total // max(1, self.steps) for kind, total in self._bytes.items()}


class Placement:
    """One process, which has everything.

    Args:
        model: adapted, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module = model
        """What is called for a forward pass that is trained on."""
        self.own: nn.Module = model
        """Holds this process's part of each parameter, which its optimizer moves."""
        self.is_first = True
        """Whether this is the process that writes."""
        self.is_sharded = False
        """Whether this process holds a part only, so that what is whole takes all of them."""
        self.stream = 0
        """Tells the random numbers that this process's optimizer draws from those of the others."""

    def reduced_bytes_per_step(self) -> dict[str, int] | None:
        """See `ReducedBytes`; None where nothing is exchanged."""
        return None

    def accumulating(self) -> AbstractContextManager[None]:
        """Around a backward pass whose gradients need not be exchanged yet."""
        return nullcontext()

    def complete_gradients(self) -> None:
        """Called after the last backward pass of a step: its gradients are then on the parameters of `own`."""

    def total(self, value: Tensor) -> Tensor:
        """A sum over the parameters of `own`, summed over all that hold other parts."""
        return value

    def meet(self) -> None:
        """Waits for all that hold other parts, however long that may be."""

    def passes(self, count: int) -> int:
        """How many forward passes this process takes part in where it has inputs for `count`."""
        return count

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of what `own` holds a part of, for the first process; all call it in the same order.

        Args:
            name: of the parameter or buffer that the tensor is or belongs to.
            tensor: the part.
        """
        return tensor

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor; arguments as for `whole`."""
        return tensor


class Replicas(Placement):
    """Several processes, each of which has everything.

    Args:
        accelerator: the processes.
        model: adapted, on its device.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(model)
        self.is_first = accelerator.is_main_process
        # Every process draws the same weights from the seed or reads the same checkpoint, so nothing is sent at the
        # start; accelerate's own wrapping has no field for that. A handle of compressed gradients, one number expanded
        # to a matrix, could not be written by a broadcast.
        on_gpu = accelerator.device.type == "cuda"
        self._parallel = DistributedDataParallel(
            model, device_ids=[accelerator.device.index] if on_gpu else None, broadcast_buffers=False, init_sync=False
        )
        self.module = self._parallel
        self._reduced = ReducedBytes(model)
        self._parallel.register_comm_hook(None, self._reduce)

    def _reduce(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The mean over processes, as without a hook."""
        self._reduced.add(bucket.parameters(), bucket.buffer().element_size())
        return allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]

    def reduced_bytes_per_step(self) -> dict[str, int] | None:
        """See `ReducedBytes`."""
        return self._reduced.per_step()

    def accumulating(self) -> AbstractContextManager[None]:
        """See `Placement`."""
        return self._parallel.no_sync()

    def complete_gradients(self) -> None:
        """Counts the step."""
        self._reduced.steps += 1
