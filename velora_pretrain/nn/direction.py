"""The direction v of a compressed input: how it comes from the data, and how it stays the same everywhere.

    batch_average_once    v = Σ sub-tokens / ‖Σ sub-tokens‖ over the first batch (arXiv 2405.17991, section 3)
    running_average       the same, then moved by every step
    svd                   the top eigenvector of Σ (sub-token)(sub-token)ᵀ, (s, s): the top right-singular vector
    random                a seeded unit vector

What is gathered is a sum, so it is the same in whatever pieces a batch comes, and is summed over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from velora_pretrain.errors import UserError
from velora_pretrain.nn.recompute import is_recomputing

Initialisation = Literal["batch_average_once", "running_average", "svd", "random"]

RUNNING_AVERAGE_DECAY = 0.9
"""Share of the old direction that one step of `running_average` keeps."""


class Direction(nn.Module):
    """v: (s,), the unit vector of one compressed input, shared by the layers that read this input.

    Args:
        features: D, the width of the input.
        num_groups: G, the number of sub-tokens; divides D.
        init: how v comes from the data. `batch_average_once`: the normalised mean sub-token; `running_average`: the
            same, moved by every step; `svd`: the top right-singular vector of the sub-tokens; `random`: without data.
        keeps_basis: with `svd`, keeps all right-singular vectors (s, s) for `turn`.
        generator: draws the `random` direction.
        device: of v.
        dtype: of v; fp32 or wider, whatever the weights are.

    Raises:
        ValueError: `num_groups` does not divide `features`.
    """

    vector: Float[Tensor, " width"]
    ready: Tensor
    statistics: Tensor
    basis: Float[Tensor, "width width"] | None

    def __init__(
        self,
        features: int,
        num_groups: int,
        *,
        init: Initialisation = "batch_average_once",
        keeps_basis: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if features % num_groups:
            raise ValueError(f"num_groups {num_groups} does not divide the width {features}")
        width = features // num_groups
        self.num_groups, self.init = num_groups, init
        self.observing = False
        vector = torch.zeros(width, dtype=dtype)
        if init == "random":
            vector = F.normalize(torch.randn(width, generator=generator, dtype=dtype), dim=0)
        self.register_buffer("vector", vector.to(device))
        self.register_buffer("ready", torch.tensor(init == "random", device=device))
        shape = (width, width) if init == "svd" else (width,)
        self.register_buffer("statistics", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("basis", torch.zeros(width, width, dtype=dtype, device=device) if keeps_basis else None)
        self.is_ready = init == "random"

    def watch(self, x: Float[Tensor, "*batch features"]) -> None:
        """Called with each input before it is compressed: gathers what v is made from, while that is wanted.

        A direction that nobody has set is taken from the first input that it trains on, as in the released code.
        """
        if is_recomputing():
            return
        if self.observing or (self.init == "running_average" and torch.is_grad_enabled()):
            self._observe(x)
        if not (self.is_ready or self.observing) and torch.is_grad_enabled():
            if self.init != "running_average":
                self._observe(x)
            self.take()

    def _observe(self, x: Tensor) -> None:
        """Adds the sub-tokens' sum (s,), or their second moment (s, s), to the statistics."""
        with torch.no_grad():
            sub_tokens = x.detach().reshape(-1, self.vector.numel()).to(self.statistics.dtype)
            self.statistics += sub_tokens.t() @ sub_tokens if self.init == "svd" else sub_tokens.sum(0)

    @torch.no_grad()
    def take(self) -> None:
        """Sets v from the statistics gathered on all ranks, if they are finite, and clears them."""
        if self.init == "random":
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.statistics)
        if not isinstance(self.statistics, FakeTensor) and not self.statistics.isfinite().all():
            # Of a batch whose step cannot be taken either: what v was stays, and the next batch is asked.
            self.statistics.zero_()
            return
        if self.init == "svd":
            # The top eigenvector of the second moment is the top right-singular vector; eigh sorts upwards.
            basis = torch.linalg.eigh(self.statistics.cpu().double())[1].flip(1).t().to(self.vector)
            # An eigenvector's sign is free: fixed by the largest entry, so that every machine takes the same one.
            basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
            new = basis[0]
            if self.basis is not None:
                self.basis.copy_(basis)
        else:
            new = F.normalize(self.statistics, dim=0)
        if self.init == "running_average" and self.is_ready:
            new = F.normalize(RUNNING_AVERAGE_DECAY * self.vector + (1 - RUNNING_AVERAGE_DECAY) * new, dim=0)
        self.vector.copy_(new)
        self.statistics.zero_()
        self.ready.fill_(True)
        self.is_ready = True

    @torch.no_grad()
    def turn(self, number: int) -> None:
        """Sets v to a vector of the basis that was kept: the `number`-th, in cycles, by descending eigenvalue."""
        assert self.basis is not None
        self.vector.copy_(self.basis[number % len(self.basis)])

    @torch.no_grad()
    def put(self, vector: Tensor, *, is_ready: bool) -> None:
        """Sets v to one that was taken before."""
        self.vector.copy_(vector)
        self.ready.fill_(is_ready)
        self.is_ready = is_ready

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise UserError(
            "nn.DataParallel: what its replicas find in a forward pass is lost, and so would v be; start a process per"
            " GPU (torchrun or accelerate launch), or show one GPU alone by CUDA_VISIBLE_DEVICES=0"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.is_ready = bool(self.ready)
        self.statistics.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Direction:
        """Moves between devices; v stays in fp32 whatever the weights become."""
        vector, statistics, basis = self.vector, self.statistics, self.basis
        super()._apply(fn, recurse)
        device = self.vector.device
        if vector.device.type != "meta":
            self.vector, self.statistics = vector.to(device), statistics.to(device)
            self.basis = None if basis is None else basis.to(device)
        return self


def directions_of(model: nn.Module) -> list[Direction]:
    """Every direction of `model`, once."""
    return [module for module in model.modules() if isinstance(module, Direction)]


def forget_seen(model: nn.Module) -> None:
    """Clears what was gathered of a step that is not taken."""
    for direction in directions_of(model):
        direction.statistics.zero_()


def take_directions(directions: Sequence[Direction], run_forward: Callable[[], None]) -> None:
    """Sets each direction from what it sees in `run_forward`."""
    for direction in directions:
        direction.observing = True
    # Once in a run: not worth a compiled pass of its own.
    with torch.compiler.set_stance("force_eager"):
        run_forward()
    for direction in directions:
        direction.observing = False
        direction.take()


def move_running_averages(model: nn.Module) -> None:
    """Moves the directions of `running_average` by what was seen since the last call; call it after each step."""
    for direction in directions_of(model):
        if direction.init == "running_average":
            direction.take()
