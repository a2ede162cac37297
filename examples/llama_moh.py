"""Replace the attention of a Hugging Face LLaMA decoder by mixture-of-head attention.

    python examples/llama_moh.py    # needs: pip install transformers

Prints the error with all heads active, the loss of fine-tuning, and a check of generation.
"""

import copy
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from moh_dit.continue_tuning.attention import attention_from_linears, attention_to_moh
from moh_dit.model.attention import load_balance_loss, recorded_router_stats


class MoHLlamaAttention(nn.Module):
    """Replacement for LlamaAttention; transformers discards the router statistics it returns."""

    def __init__(self, dense: LlamaAttention, shared: int, active: int, router: str):
        super().__init__()
        self.layer_idx, config = dense.layer_idx, dense.config
        projections = dense.q_proj, dense.k_proj, dense.v_proj, dense.o_proj
        heads = config.num_attention_heads, config.num_key_value_heads
        self.moh = attention_to_moh(
            attention_from_linears(*projections, *heads), shared, active, router
        )

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs
    ):
        cos, sin = position_embeddings
        return self.moh(
            hidden_states,
            attention_mask,
            is_causal=attention_mask is None,
            rotary=lambda query, key: apply_rotary_pos_emb(query, key, cos, sin),
            cache=None if cache is None else partial(cache.update, layer_idx=self.layer_idx),
        )


def to_moh(model: LlamaForCausalLM, shared: int, active: int, router: str = "query_norm"):
    """Return a copy with MoH attention: ``shared`` heads, and ``active`` routed ones per token."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn = MoHLlamaAttention(layer.self_attn, shared, active, router)
    return model


def tune(model: LlamaForCausalLM, tokens: torch.Tensor, active: int, steps: int) -> list[float]:
    """Train on one batch with the load-balance loss; return the loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        with recorded_router_stats(model) as stats:
            loss = model.train()(tokens, labels=tokens).loss
        balance = load_balance_loss(stats, [active] * len(stats))
        (loss + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    dense, tokens = LlamaForCausalLM(config).eval(), torch.randint(256, (4, 32))
    full, moh = to_moh(dense, shared=4, active=4), to_moh(dense, shared=4, active=2)
    with torch.no_grad():
        print(f"all heads: {(full(tokens).logits - dense(tokens).logits).abs().max():.1e} off")
    losses = tune(moh, tokens, active=2, steps=30)
    print(f"75 % of the heads: loss {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps")
    generate = partial(moh.eval().generate, tokens[:1, :8], max_new_tokens=16, do_sample=False)
    same = torch.equal(generate(use_cache=True), generate(use_cache=False))
    print(f"generates the same tokens with a cache as without: {same}")
