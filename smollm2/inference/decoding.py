"""Decode one token at a time: the model's forward pass for T = 1, with fewer and larger matrix products.

In a small model, most of a decoding step is the overhead of calling torch. So the query, key and value projections are
computed as one product, the gate and up projections as another. The weights are prepared for this once per batch of
sequences, in the compute dtype, as a second copy in memory. tests/inference/test_decoding.py compares the logits with
the model's.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm2.model.cache import KeyValueCache, attend_cached
from smollm2.model.transformer import Block, SmolLM2
from smollm2.runtime.precision import device_features

Product = Callable[[Tensor], Tensor]


class Decoder:
    """The model's current weights, prepared for decoding `rows` sequences in `dtype`."""

    def __init__(self, model: SmolLM2, dtype: torch.dtype, rows: int) -> None:
        self.model, self.rotary = model.model, model.model.rotary
        self.layers = [DecoderBlock(cast(Block, block), dtype, rows) for block in model.model.layers]
        self.head = lay_out([model.lm_head.weight], dtype, rows)

    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append one token to each sequence, tokens (B,) int64, and return the logits (B, V) of the next token."""
        positions, slots = cache.advance(1)
        x = self.model.embed(tokens)
        cos, sin = self.rotary.cos[positions].to(x.dtype), self.rotary.sin[positions].to(x.dtype)  # B 1 D/2
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        width = cos.shape[-1]
        for layer, slot in zip(self.layers, slots, strict=True):
            block = layer.block
            qkv = layer.qkv(block.input_layernorm.forward(x)).view(len(x), -1, width)  # B H+2K D
            qk, v = torch.split(qkv, [sum(layer.heads[:2]), layer.heads[2]], dim=1)
            rotated = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)
            q, k = torch.split(rotated, layer.heads[:2], dim=1)
            mixed = attend_cached(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), slot)
            x = x + layer.out(mixed.flatten(1))
            gate, up = layer.gate_up(block.post_attention_layernorm.forward(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return self.head(self.model.norm.forward(x))


class DecoderBlock:
    """One block's weight matrices, prepared for decoding; `heads` lists the numbers of query, key and value heads."""

    def __init__(self, block: Block, dtype: torch.dtype, rows: int) -> None:
        self.block, attention, mlp = block, block.self_attn, block.mlp
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.heads = [len(weight) // attention.head_dim for weight in projections]
        self.qkv = lay_out(projections, dtype, rows)
        self.out = lay_out([attention.o_proj.weight], dtype, rows)
        self.gate_up = lay_out([mlp.gate_proj.weight, mlp.up_proj.weight], dtype, rows)
        self.down = lay_out([mlp.down_proj.weight], dtype, rows)


def lay_out(weights: list[Tensor], dtype: torch.dtype, rows: int) -> Product:
    """Return a function (rows, C) -> (rows, sum of D) that multiplies by all `weights`, each (D, C), in one product."""
    weight = torch.cat([weight.detach() for weight in weights]).to(dtype)
    packed_name = {torch.float32: "packed_float32", torch.bfloat16: "packed_bf16"}.get(dtype)
    if weight.device.type == "cpu" and packed_name in device_features(weight.device):
        # torch.compile also packs constant matrices like this. Multiplying one row by micro's 44 MB of weights takes
        # 2.0 ms instead of 4.0 ms, in float32 on two cores with AVX-512.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return lambda x: F.linear(x, weight)
