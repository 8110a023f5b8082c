"""The transformer, with the parameter names of Hugging Face's Llama, or of its StableLM if the norm is LayerNorm.

Letters used for shapes: B sequences, T positions, C hidden_size, H query heads, K key-value heads, D head_dim, I
intermediate_size, V vocab_size. The model does not depend on the device: autocast decides the dtype, and the caller
sets the attention backend, checkpointing and compilation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smollm2.config.schema import ModelConfig
from smollm2.model.attention import Backend, Layout, attend, lay_out
from smollm2.model.cache import KeyValueCache, Slot, attend_cached
from smollm2.model.functional import layer_norm, rms_norm, rotary_tables, rotate, swiglu
from smollm2.model.loss import next_token_loss

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The names of the two matrices that are one tensor if the embeddings are tied."""

Seen = Layout | Slot
"""What each position attends to: the layout for an attention backend, or one layer's slot of a key-value cache."""


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: SmolLM2.initialize draws the weights."""


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a weight (arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C)."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalization with weight and bias, in float32 (arXiv 1607.06450)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C)."""
        return layer_norm(x, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Rotary(nn.Module):
    """Cosine and sine tables of the rotary embedding (arXiv 2104.09864), in float32 even if the model is cast.

    They are recomputed after every move or cast, because tables rounded to bf16 change the logits by 0.68.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.scaling = config.rope_scaling
        for name, table in zip(("cos", "sin"), self._tables(torch.get_default_device()), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cos, self.sin = self._tables(self.cos.device)
        return self

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device.type != "meta":
            return rotary_tables(*self.shape, device, self.scaling)
        positions, width, _ = self.shape  # computing on the meta device would import torch's compiler
        return 2 * (torch.empty(positions, width // 2, device=device),)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen = None, backend: Backend = "sdpa") -> Tensor:
        """Apply attention, (B, T, C) -> (B, T, C). `seen` is the backend's layout, or a cache slot that is extended."""
        q, k = self.queries_and_keys(x, cos, sin)
        v = self.v_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # B K T D
        mixed = attend_cached(q, k, v, seen) if isinstance(seen, Slot) else attend(q, k, v, backend, seen)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated queries (B, H, T, D) and keys (B, K, T, D) of x (B, T, C)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)
        k = rotate(self.k_proj(x).view(heads), cos, sin).transpose(1, 2)
        return q, k


class FeedForward(nn.Module):
    """A SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network, (B, T, C) -> (B, T, C)."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen = None, backend: Backend = "sdpa") -> Tensor:
        """Apply the block, (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, seen, backend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """Embedding, blocks and final normalization. The caller sets `attention_backend` and `checkpointing`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config)
        self.rotary = Rotary(config)
        self.attention_backend: Backend = "sdpa"
        self.checkpointing = False

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, C) of input_ids (B, T) int64; document_ids are as in SmolLM2.forward."""
        length = input_ids.shape[1]
        cos, sin = self.rotary.cos[:length], self.rotary.sin[:length]
        backend = self.attention_backend
        seen = lay_out(document_ids, input_ids, backend)
        x = self.embed(input_ids)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, seen, backend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, seen, backend)
        out: Tensor = self.norm(x)
        return out

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the token embeddings, (B, T) int64 -> (B, T, C)."""
        x: Tensor = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream stays in 16 bits
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def extend(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Append the tokens (B, T) to the cache and return their hidden states (B, T, C)."""
        positions, slots = cache.advance(input_ids.shape[1])
        x = self.embed(input_ids)
        cos, sin = self.rotary.cos[positions].to(x.dtype), self.rotary.sin[positions].to(x.dtype)
        for layer, slot in zip(self.layers, slots, strict=True):
            x = layer.forward(x, cos, sin, slot)  # layer(...) would recompile the block for these shapes
        out: Tensor = self.norm(x)
        return out


class SmolLM2(nn.Module):
    """The language model; it returns logits, or the loss if labels are given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trained_length = config.max_position_embeddings  # a loaded checkpoint sets the window length of its run
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Initialize the weights as in SmolLM2's pretraining: normal(0, initializer_range), with the two output
        projections of each block divided by sqrt(2 x layers); norms start with weight 1 and bias 0."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
                factor = (2 * self.config.num_hidden_layers) ** -0.5 if scaled else 1.0
                nn.init.normal_(parameter, 0.0, std * factor, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        gradient_scale: Tensor | None = None,
    ) -> Any:
        """Return the logits (B, T, V) for input_ids (B, T). With labels (B, T), return the loss as (sum over targets in
        float32, number of targets); labels[t] is the token after input_ids[t], or -100 for no target. With document_ids
        (B, T), which do not decrease along T, a position attends only to its own document."""
        hidden = self.model(input_ids, document_ids)
        if labels is None:
            return self.lm_head(hidden)
        return next_token_loss(hidden, self.lm_head.weight, labels, z_loss=z_loss, gradient_scale=gradient_scale)
