"""SmolLM2 Training: train language models from text, and export them for other libraries.

Public names are imported when they are first used, so that `import smollm2` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smollm2.config.reading import load_config
    from smollm2.config.schema import Config
    from smollm2.errors import Interrupted, Smollm2Error
    from smollm2.exporting.export import export
    from smollm2.inference.evaluation import evaluate
    from smollm2.inference.generation import generate
    from smollm2.inference.loading import load_model
    from smollm2.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Interrupted",
    "Smollm2Error",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "load_model",
    "train",
]

_MODULES = {
    "Config": "smollm2.config.schema",
    "Interrupted": "smollm2.errors",
    "Smollm2Error": "smollm2.errors",
    "evaluate": "smollm2.inference.evaluation",
    "export": "smollm2.exporting.export",
    "generate": "smollm2.inference.generation",
    "load_config": "smollm2.config.reading",
    "load_model": "smollm2.inference.loading",
    "train": "smollm2.training.loop",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'smollm2' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
