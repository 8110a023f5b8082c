"""Configs that the tests of the plan share."""

from pathlib import Path

from smollm2.config.reading import load_config
from smollm2.config.schema import Config

ROOT = Path(__file__).parents[1]

NANO: dict[str, object] = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
NANO |= {"num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": 128, "norm": "rmsnorm"}
MICRO: dict[str, object] = {"vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
MICRO |= {"num_key_value_heads": 2, "intermediate_size": 1024, "max_position_embeddings": 256, "norm": "rmsnorm"}


def small_run(
    model: dict[str, object], batch_size: int, accumulation: int, optimizer: str = "muon", **training: object
) -> Config:
    training = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "optimizer": optimizer,
        **training,
    }
    return Config.model_validate({"model": model, "training": {"train_steps": 10, **training}})


def user_config(**model: object) -> Config:
    return load_config(ROOT / "config.yaml", model=model)


def in_folder(config: Config, folder: Path) -> Config:
    """Return the config with input and cache in `folder`."""
    data = {"input": str(folder / "input.txt"), "cache_dir": str(folder), "stride": config.training.sequence_length}
    return Config.model_validate({**config.model_dump(), "data": data})
