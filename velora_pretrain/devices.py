"""Devices and number formats of a run."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from velora_pretrain import __version__
from velora_pretrain.config import Precision
from velora_pretrain.errors import UserError
from velora_pretrain.hints import nearest
from velora_pretrain.host_memory import host_memory_bytes

KINDS = ("auto", "cpu", "cuda", "mps")
WEIGHT_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16": torch.bfloat16,
}
"""Format of the weights, and of their gradients."""


def pick_device(name: str) -> torch.device:
    """The device that `name` means: auto takes CUDA, else Apple's GPU, else the CPU.

    Raises:
        UserError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is no device; {nearest(name, KINDS)}choose auto, cpu, cuda or mps") from None
    if device.index is not None:
        raise UserError(f"device: {name} names one of several; choose {device.type} and set CUDA_VISIBLE_DEVICES")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise UserError(f"device: {name} is not available here; choose auto or cpu")
    return device


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[object]:
    """Around a forward pass: matrix products in bf16 where the weights are wider."""
    if precision == "bf16-mixed":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new tensors in `dtype`: for models without memory, which cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated tensors on CUDA, else what the process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit_bytes(device: torch.device) -> int:
    """Memory that the device has in all: what a process may use of it is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes()


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "velora-pretrain": __version__,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def cpu_model() -> str:
    """The processor by its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
