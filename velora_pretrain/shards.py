"""Fully sharded training: each process holds some rows of every parameter, and the optimizer's state of these rows.

PyTorch's `fully_shard` (FSDP2; arXiv 2304.11277) does the work: it splits each parameter by rows, gathers a block's for
its forward and its backward pass, and gives each process the mean of its rows' gradients. What is added here:

    own parts     Optimizer, norm and checkpoints see a twin of the model whose parameters are this process's rows, as
                  ordinary tensors over the same memory; so no rule of an optimizer need know of sharding. It goes for
                  rules that move each row by itself.
    handles       A parameter that only receives a gradient, one number expanded to a matrix, has no memory to shard:
                  `fully_shard` leaves it out. Its gradient, which is small, is summed over the micro-batches of a step,
                  then reduced and split by rows as those of all others are.

The gradients of all other parameters are reduced in each micro-batch, so that none is ever kept whole: less memory, at
the price of more traffic. Buffers are the same on all processes and in the twin.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from velora_pretrain.distributed import all_reduce, largest, meet
from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import Llama
from velora_pretrain.placement import Placement, ReducedBytes, Replicas

BY_ROWS = [Shard(0)]


def placed(accelerator: Accelerator, model: Llama, *, is_sharded: bool) -> Placement:
    """Brings an adapted model to the processes' devices.

    Args:
        accelerator: the processes.
        model: adapted, on the CPU.
        is_sharded: whether each of several processes has some rows of everything, or everything.

    Raises:
        UserError: there are more processes than rows.
    """
    if is_sharded:
        return Shards(accelerator, model)
    model.to(accelerator.device)
    return Replicas(accelerator, model) if accelerator.num_processes > 1 else Placement(model)


class Shards(Placement):
    """Several processes, each with some rows of everything.

    Args:
        accelerator: the processes.
        model: adapted, on the CPU; its parameters go to the device block by block, and are split in place.

    Raises:
        UserError: a process would have no row of some parameter.
    """

    def __init__(self, accelerator: Accelerator, model: Llama) -> None:
        super().__init__(model)
        self.is_first, self.is_sharded = accelerator.is_main_process, True
        self._accelerator, self._size = accelerator, accelerator.num_processes
        self._num_rows = {name: len(p) for name, p in model.named_parameters(remove_duplicate=False)}
        for name, rows in self._num_rows.items():
            if rows <= -(-rows // self._size) * (self._size - 1):
                raise UserError(
                    f"distributed.sharding: {name} has {rows} rows, so that of {self._size} processes some would have"
                    " none; use fewer processes"
                )
        self.stream = accelerator.process_index
        self._mesh = init_device_mesh(accelerator.device.type, (self._size,))
        handles = {parameter for parameter in model.parameters() if 0 in parameter.stride()}
        self.own = _twin(model)
        for block in model.model.layers:
            fully_shard(block, mesh=self._mesh, ignored_params=handles)
        # Embedding, norm and head are the root's own: the loss reads the head's weight outside of its module.
        fully_shard(model, mesh=self._mesh, ignored_params=handles)
        for handle in handles:
            handle.data = handle.data.new_zeros((), device=accelerator.device).expand(handle.shape)
        self._pairs = list(zip(model.parameters(), self.own.parameters(), strict=True))
        for parameter, own in self._pairs:
            here = parameter.detach()
            own.data = here.to_local() if isinstance(here, DTensor) else self._rows(here)
        self._reduced, self._passes = ReducedBytes(model), 1

    def _rows(self, tensor: Tensor) -> Tensor:
        """This process's rows, as `fully_shard` splits them."""
        each = -(-len(tensor) // self._size)
        return tensor[self.stream * each :][:each]

    def reduced_bytes_per_step(self) -> dict[str, int] | None:
        """See `ReducedBytes`."""
        return self._reduced.per_step()

    def accumulating(self) -> AbstractContextManager[None]:
        """Counts the backward pass; the gradients of shards are exchanged in each."""
        self._passes += 1
        return nullcontext()

    def complete_gradients(self) -> None:
        """Hands this process's rows of the gradients over, and reduces those of the handles."""
        for parameter, own in self._pairs:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            if isinstance(gradient, DTensor):
                own.grad, times = gradient.to_local(), self._passes
            else:
                summed = DTensor.from_local(gradient, self._mesh, [Partial()])
                own.grad, times = summed.redistribute(self._mesh, BY_ROWS).to_local().div_(self._size), 1
            self._reduced.add([parameter], gradient.element_size(), times=times)
        self._passes = 1
        self._reduced.steps += 1

    def total(self, value: Tensor) -> Tensor:
        """See `Placement`."""
        return all_reduce(self._accelerator, value.cpu()).to(value.device)

    def meet(self) -> None:
        """See `Placement`."""
        meet(self._accelerator)

    def passes(self, count: int) -> int:
        """As many as the process with the most: each gathers parameters from all."""
        return largest(self._accelerator, count)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """See `Placement`; on the other processes an empty tensor."""
        if tensor.ndim == 0 or name not in self._num_rows:
            return tensor
        shape = torch.Size((self._num_rows[name], *tensor.shape[1:]))
        part = DTensor.from_local(tensor.detach(), self._mesh, BY_ROWS, shape=shape, stride=tensor.stride())
        whole = part.full_tensor()
        return whole if self._accelerator.is_main_process else whole.new_empty(0)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """See `Placement`."""
        return tensor if tensor.ndim == 0 or name not in self._num_rows else self._rows(tensor)


def _twin(model: nn.Module) -> nn.Module:
    """The same modules with parameters that are yet empty; a module without parameters is itself in both."""
    shared = {id(module): module for module in model.modules() if next(module.parameters(), None) is None}
    empty = {id(p): nn.Parameter(p.data.new_empty(0), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**shared, **empty})
