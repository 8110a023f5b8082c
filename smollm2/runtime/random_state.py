"""The state of every random number generator: saved in a checkpoint and restored on resume."""

import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, object]:
    """Return the state of every random number generator, in plain types."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
    }


def restore_random_state(state: dict[str, object]) -> None:
    """Restore the states that `random_state` returned; CUDA's are restored only if the number of devices is equal."""
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    cuda: list[Tensor] = state["cuda"]  # type: ignore[assignment]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(state["python"])  # type: ignore[arg-type]
    numpy: dict[str, object] = state["numpy"]  # type: ignore[assignment]
    keys = numpy["keys"].numpy().astype(np.uint32)  # type: ignore[attr-defined]
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # type: ignore[arg-type]
