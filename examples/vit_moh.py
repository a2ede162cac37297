"""Replace the attention of a Hugging Face ViT by mixture-of-head attention, and fine-tune it.

    pip install transformers
    python examples/vit_moh.py

Prints the error with all heads active, and the loss of fine-tuning with 75 % of the heads.
"""

import copy

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from moh_dit.continue_tuning import attention as convert
from moh_dit.model.attention import load_balance_loss, recorded_router_stats


class MoHViTAttention(nn.Module):
    """Replacement for ViTAttention; transformers discards the router statistics it returns."""

    def __init__(self, moh: nn.Module):
        super().__init__()
        self.moh = moh

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.moh(hidden_states, attention_mask)


def to_moh(model: ViTForImageClassification, images, shared: int, active: int, router="learned"):
    """Return a copy with MoH attention; heads ordered and routers fitted on ``images``."""
    model = copy.deepcopy(model).eval()
    dense = []
    for layer in model.vit.layers:
        old = layer.attention
        projections = old.q_proj, old.k_proj, old.v_proj, old.o_proj
        dense.append(convert.attention_from_linears(*projections, old.num_attention_heads))
        layer.attention = MoHViTAttention(dense[-1])
    importance = convert.head_importance(dense, lambda: model(images))
    orders = [scores.argsort(descending=True) for scores in importance]
    routed = [
        convert.attention_to_moh(layer, shared, active, router, order)
        for layer, order in zip(dense, orders, strict=True)
    ]
    if router == "learned":
        convert.fit_routers(dense, routed, lambda: model(images))
    for layer, moh in zip(model.vit.layers, routed, strict=True):
        layer.attention.moh = moh
    return model


def tune(model: ViTForImageClassification, images, labels, active: int, steps: int) -> list[float]:
    """Train on one batch with the load-balance loss; return the loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        with recorded_router_stats(model) as stats:
            loss = model.train()(images, labels=labels).loss
        balance = load_balance_loss(stats, [active] * len(stats))
        (loss + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=64, intermediate_size=128,
                       num_hidden_layers=2, num_attention_heads=8, num_labels=10)  # fmt: skip
    dense = ViTForImageClassification(config).eval()
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    full, moh = to_moh(dense, images, 4, 4), to_moh(dense, images, shared=4, active=2)
    with torch.no_grad():
        print(f"all heads: {(full(images).logits - dense(images).logits).abs().max():.1e} off")
    losses = tune(moh, images, labels, active=2, steps=30)
    print(f"75 % of the heads: loss {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps")
