"""Compare FLOPs by formula with the published figure and with a count of executed FLOPs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moh_dit import build_model
from moh_dit.model.flops import count_flops, flops_per_image, skipped_flops
from moh_dit.model.transformer import MoHDiTTransformer2DModel


def test_the_largest_dense_model_is_as_published():
    with torch.device("meta"):
        model = build_model("DiT-XL/2")
    assert flops_per_image(model) / 2 == pytest.approx(118.6e9, rel=5e-3)


@pytest.mark.parametrize("plan", [{}, dict(num_shared_heads=1, num_active_routed_heads=2)])
def test_it_counts_executed_flops_without_the_skipped_queries(plan):
    model = MoHDiTTransformer2DModel(
        sample_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=3, **plan
    ).eval()  # fmt: skip
    # Use plain products: the counter does not know all fused attention kernels.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    executed = counter.get_total_flops() / 2
    tokens, head_dim, skipped_heads = 16, 8, 1 if plan else 0
    skipped = 2 * (2 * 2 * tokens * tokens * head_dim * skipped_heads)  # layers, two products
    padding = 0
    if plan:  # router rows are part of the projection, padded to a multiple of 64
        rows = 3 * 32 + 4 + 2
        padding = 2 * 2 * tokens * 32 * (-rows % 64)
    assert flops_per_image(model) == executed - skipped - padding
    assert skipped_flops(model) == skipped
    assert count_flops(model)["attention"] == 2 * 2 * 2 * tokens * tokens * 32 - skipped
