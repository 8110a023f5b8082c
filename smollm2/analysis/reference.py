"""SmolLM2's forward pass once more: in float64, from the formulas of the papers, with nothing shared with the package's own.

It is slow and has no backward pass. Checks compare the model with it.
"""

import math

import torch
from torch import Tensor

from smollm2.config.schema import ModelConfig


def reference_logits(weights: dict[str, Tensor], config: ModelConfig, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V), float64, of token ids (B, T); `weights` by Hugging Face's names."""

    def weight(name: str) -> Tensor:
        return weights[name].detach().double()

    def norm(x: Tensor, name: str) -> Tensor:
        """RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450)."""
        if config.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight(f"{name}.weight")
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * weight(f"{name}.weight") + weight(f"{name}.bias")

    turns = rotations(config, torch.arange(ids.shape[1], device=ids.device))
    x = weight("model.embed_tokens.weight")[ids]
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (h @ weight(f"{layer}.self_attn.{part}_proj.weight").T for part in "qkv")
        mixed = attention(q, k, v, turns, config) @ weight(f"{layer}.self_attn.o_proj.weight").T
        x = x + mixed
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (h @ weight(f"{layer}.mlp.{part}_proj.weight").T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weight(f"{layer}.mlp.down_proj.weight").T
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm") @ weight(head).T


def attention(q: Tensor, k: Tensor, v: Tensor, turns: Tensor, config: ModelConfig) -> Tensor:
    """Return causal attention (B, T, H x D) of projections (B, T, heads x D); `turns` (T, D / 2) rotate q and k."""
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    length, outputs = q.shape[1], []
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    for head in range(heads):
        own = slice(head * config.head_dim, (head + 1) * config.head_dim)
        shared = slice(head // groups * config.head_dim, (head // groups + 1) * config.head_dim)
        scores = turn(q[..., own], turns) @ turn(k[..., shared], turns).transpose(1, 2) / math.sqrt(config.head_dim)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., shared])
    return torch.cat(outputs, -1)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate x (B, T, D) as complex numbers x[i] + j x[i + D / 2] (arXiv 2104.09864, in Llama's layout)."""
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * turns
    return torch.cat((turned.real, turned.imag), -1)


def rotations(config: ModelConfig, positions: Tensor) -> Tensor:
    """Return exp(j x angle) for positions (T,), complex128, (T, D / 2); with Llama 3's scaling (arXiv 2407.21783)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device) / config.head_dim
    frequencies = float(config.rope_theta) ** -exponents
    if scaling := config.rope_scaling:
        wavelengths = 2 * math.pi / frequencies
        shortest = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        longest = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        slowed = frequencies / scaling["factor"]
        ratio = scaling["original_max_position_embeddings"] / wavelengths
        smooth = (ratio - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        between = (1 - smooth) * slowed + smooth * frequencies
        frequencies = torch.where(
            wavelengths > longest, slowed, torch.where(wavelengths < shortest, frequencies, between)
        )
    angles = positions.double().unsqueeze(-1) * frequencies
    return torch.polar(torch.ones_like(angles), angles)
