"""Processes of a run: launched by torchrun or `accelerate launch`, carried by accelerate, or just one.

How long a process waits for the others depends on what for. A process that dies closes its connections, which gloo
notices at once and NCCL may not: NCCL gives up on a collective only after the group's timeout. So whatever may take
long for reasons of its own (data that come slowly, a checkpoint that one process writes) is waited for over gloo, with
a long timeout; what goes over NCCL is waited for within a pass only, where all processes do the same work, and its
timeout is short. A run whose process has died then ends everywhere within a minute.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from velora_pretrain.devices import pick_device

LONGEST_WAIT = timedelta(hours=1)
"""For what one process may do while the others wait."""
LONGEST_PASS_WAIT = timedelta(seconds=40)
"""For the other processes within a pass, over NCCL; until its watchdog has ended the program, some 15 seconds more."""
LOST_CONNECTION = ("connection closed", "connection reset", "broken pipe", "timed out waiting", "gloo")
"""What stands in the messages of a collective whose other side is gone; PyTorch has no type for them all."""


def start_processes(device: str) -> Accelerator:
    """Joins the processes of this launch and picks each one's device.

    Args:
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: the device is not there.
    """
    on_cpu = pick_device(device).type == "cpu"
    waits = InitProcessGroupKwargs(timeout=LONGEST_WAIT if on_cpu else LONGEST_PASS_WAIT)
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[waits])
    if accelerator.num_processes > 1:
        _messages()
    return accelerator


@functools.cache
def _messages() -> dist.ProcessGroup | None:
    """The group for what is waited for over gloo. All processes ask for it first at the same time."""
    if dist.get_backend() == "gloo":
        return None
    group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def all_reduce(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes, the same on each."""
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor, group=_messages())
    return tensor


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers."""
    tensor = torch.tensor(number)
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_messages())
    return int(tensor)


def of_first_process(accelerator: Accelerator, value: Any) -> Any:
    """What the first process has given."""
    values = [value]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(values, src=0, group=_messages())
    return values[0]


def meet(accelerator: Accelerator) -> None:
    """Waits until all processes have come here."""
    if accelerator.num_processes > 1:
        dist.barrier(group=_messages())


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error is that of a collective whose other side is gone."""
    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in message for words in LOST_CONNECTION)
