"""Small models and their transformers twins, which several test files compare."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smollm2.config.schema import ModelConfig
from smollm2.model.transformer import Block, SmolLM2
from smollm2.runtime.precision import device_features

needs_bf16 = pytest.mark.skipif(
    "bf16" not in device_features(torch.device("cpu")), reason="this CPU has no bf16 units (AVX-512 BF16 or AMX)"
)
without_bf16 = pytest.mark.skipif(
    "bf16" in device_features(torch.device("cpu")),
    reason="this CPU has bf16 units; ATEN_CPU_CAPABILITY=avx2 hides them",
)


def small_config(**changes: object) -> ModelConfig:
    """Three layers, grouped heads; any key changed."""
    values: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "norm": "rmsnorm",
        "initializer_range": 0.1,
    }
    return ModelConfig.model_validate({**values, **changes})


def small_model(seed: int = 0, /, **changes: object) -> SmolLM2:
    """A model whose norms are not at their first values, so that a lost weight or bias shows."""
    model = SmolLM2(small_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def blocks_of(model: SmolLM2) -> list[Block]:
    """Return the model's blocks with their type, which a ModuleList does not tell."""
    return [cast(Block, layer) for layer in model.model.layers]


def gradient_of(model: torch.nn.Module) -> Tensor:
    """Return the gradient of all parameters in one vector."""
    gradients = [p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def transformers_twin(model: SmolLM2) -> Any:
    """transformers' LlamaForCausalLM or StableLmForCausalLM with the same weights, loaded strictly by name."""
    import transformers

    # The configs accept more than their annotations say: attn_implementation.
    llama_config: Any = transformers.LlamaConfig
    stable_lm_config: Any = transformers.StableLmConfig
    config = model.config
    twin: Any
    shared: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    rope = {"rope_theta": shared.pop("rope_theta"), "rope_type": "default"}
    if scaling := shared.pop("rope_scaling"):
        rope |= {"rope_type": "llama3", **scaling}
    del shared["init_from"]
    norm, eps = shared.pop("norm"), shared.pop("norm_eps")
    if norm == "rmsnorm":
        twin = transformers.LlamaForCausalLM(
            llama_config(**shared, rms_norm_eps=eps, rope_parameters=rope, attn_implementation="sdpa")
        )
    else:
        rope["partial_rotary_factor"] = 1.0
        twin = transformers.StableLmForCausalLM(
            stable_lm_config(
                **shared, layer_norm_eps=eps, rope_parameters=rope, use_qkv_bias=False, attn_implementation="sdpa"
            )
        )
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.eval()


def write_hugging_face_folder(model: SmolLM2, folder: Path, **changes: object) -> Path:
    """config.json (transformers 4's names) and model.safetensors of a model, some config values changed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        **model.config.model_dump(exclude={"norm", "norm_eps", "rope_scaling", "init_from"}),
        "rms_norm_eps": model.config.norm_eps,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
