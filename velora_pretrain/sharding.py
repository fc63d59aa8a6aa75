"""Several devices: a closed form on top of one device's step. No gradient is exchanged and nothing is run here.

    data-parallel   what `train` does under torchrun: every device has everything, and DistributedDataParallel keeps a
                    copy of all gradients in its buckets from the first backward pass on.
    sharded         full sharding (ZeRO's third stage, FSDP; arXiv 1910.02054), which `train` does with
                    `distributed.sharding = "full"`: weights, gradients and optimizer states are split evenly over the
                    devices; one block, or embedding or head, at a time is gathered with its weights and its gradient
                    whole. That a second block is fetched ahead, that embedding and head stay gathered between forward
                    and backward pass, that compressed gradients are split only after the last one, and padding to a
                    multiple of the devices are left out.

In both, activations, loss, buffers and temporaries are those of the device's own micro-batch. What NCCL itself takes is
left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from velora_pretrain.config import Run
from velora_pretrain.memory import MemoryUse
from velora_pretrain.prediction import predict
from velora_pretrain.step_memory import StepPrediction

Sharding = Literal["none", "data-parallel", "sharded"]


def per_device(prediction: StepPrediction, *, devices: int, sharding: Sharding) -> MemoryUse:
    """Bytes on each of several devices at the moment of one device's peak; see the module's docstring.

    Args:
        prediction: of one device's step.
        devices: how many share in it.
        sharding: what they share; none is one device's own.
    """
    use = prediction.memory
    if devices == 1 or sharding == "none":
        return use
    if sharding == "data-parallel":
        buckets = prediction.whole_gradients_bytes
        return replace(use, gradients_bytes=use.gradients_bytes + buckets, peak_bytes=use.peak_bytes + buckets)
    weights, gradients, states = (
        -(-each // devices) for each in (use.weights_bytes, use.gradients_bytes, use.optimizer_state_bytes)
    )
    temporaries = use.temporaries_bytes + prediction.largest_unit_bytes
    rest = use.buffers_bytes + use.saved_activations_bytes + use.loss_bytes
    return replace(
        use,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_state_bytes=states,
        temporaries_bytes=temporaries,
        peak_bytes=weights + gradients + states + temporaries + rest,
        largest_at_peak=(),
    )


def predict_per_device(run: Run, micro_batch: int, *, accumulates: bool, devices: int) -> StepPrediction:
    """What `prediction.predict` finds, with the memory of each of a run's devices; see the module's docstring.

    Args:
        run: the run, which says how its devices share it.
        micro_batch: sequences per forward pass.
        accumulates: whether a step has more than one micro-batch.
        devices: how many share in it.
    """
    prediction = predict(run, micro_batch, accumulates=accumulates)
    sharding: Sharding = "sharded" if run.distributed.sharding == "full" else "data-parallel"
    return replace(prediction, memory=per_device(prediction, devices=devices, sharding=sharding))
