"""One token at a time: the model's forward pass for T = 1, with fewer and larger products.

A step of a small model is mostly the overhead of calling torch, so the three matrices that read the same input become
one product, and gate and up another. The weights are laid out for that once per text, in the dtype of the computation,
which takes memory for a second copy. tests/inference/test_decoding.py compares it with the model.
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
    """The model's weights as they are now, ready to decode `rows` texts in `dtype`."""

    def __init__(self, model: SmolLM2, dtype: torch.dtype, rows: int) -> None:
        self.model, self.rotary = model.model, model.model.rotary
        self.layers = [DecoderBlock(cast(Block, block), dtype, rows) for block in model.model.layers]
        self.head = lay_out([model.lm_head.weight], dtype, rows)

    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits (B, V) after one more token of each text: tokens (B,) int64."""
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
    """One block's matrices, laid out; `heads` are the numbers of query, key and value heads."""

    def __init__(self, block: Block, dtype: torch.dtype, rows: int) -> None:
        self.block, attention, mlp = block, block.self_attn, block.mlp
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        self.heads = [len(weight) // attention.head_dim for weight in projections]
        self.qkv = lay_out(projections, dtype, rows)
        self.out = lay_out([attention.o_proj.weight], dtype, rows)
        self.gate_up = lay_out([mlp.gate_proj.weight, mlp.up_proj.weight], dtype, rows)
        self.down = lay_out([mlp.down_proj.weight], dtype, rows)


def lay_out(weights: list[Tensor], dtype: torch.dtype, rows: int) -> Product:
    """Return the product (rows, C) -> (rows, sum of D) with `weights`, each (D, C), laid out for this machine."""
    weight = torch.cat([weight.detach() for weight in weights]).to(dtype)
    packed_name = {torch.float32: "packed_float32", torch.bfloat16: "packed_bf16"}.get(dtype)
    if weight.device.type == "cpu" and packed_name in device_features(weight.device):
        # torch.compile does the same to a constant matrix. The 44 MB of micro, one row in float32 on two cores with
        # AVX-512: 2.0 ms instead of 4.0 ms.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return lambda x: F.linear(x, weight)
