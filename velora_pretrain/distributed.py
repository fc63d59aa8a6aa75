"""Processes of a run: launched by torchrun or `accelerate launch`, carried by accelerate, or just one."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from velora_pretrain.devices import pick_device


def start_processes(device: str) -> Accelerator:
    """Joins the processes of this launch and picks each one's device.

    Args:
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: the device is not there.
    """
    return Accelerator(cpu=pick_device(device).type == "cpu")


def data_parallel(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model as every process calls it for training: gradients are averaged over processes, if there are several."""
    if accelerator.num_processes == 1:
        return model
    # Every process draws the same weights from the seed or reads the same checkpoint, so nothing is sent at the start;
    # accelerate's own wrapping has no field for that. A handle of compressed gradients, one number expanded to a
    # matrix, could not be written by a broadcast.
    on_gpu = accelerator.device.type == "cuda"
    return DistributedDataParallel(
        model, device_ids=[accelerator.device.index] if on_gpu else None, broadcast_buffers=False, init_sync=False
    )


def all_reduce(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes, the same on each."""
    if accelerator.num_processes == 1:
        return tensor
    # NCCL sums on the GPU only.
    here = tensor.to(accelerator.device)
    torch.distributed.all_reduce(here)
    return here.to(tensor.device)
