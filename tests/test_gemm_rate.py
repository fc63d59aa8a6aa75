"""The rate of matrix products."""

import torch

from velora_pretrain.gemm_rate import GemmRate


def test_the_rate_of_products_is_sampled() -> None:
    rate = GemmRate({"small": (32, 16, 8), "square": (64, 64, 64)}, dtype=torch.float32, device=torch.device("cpu"))
    rate.sample()
    rate.sample()
    assert [len(samples) for samples in rate.samples.values()] == [2, 2]
    assert rate.operations_per_second >= min(rate.samples["square"]) > 0
