"""Make the golden checkpoints of one version of the package: what that version wrote, for later versions to resume.

    PYTHONPATH=CHECKOUT:tests OMP_NUM_THREADS=1 python tests/golden/make.py tests/golden/COMMIT

CHECKOUT is a checkout of the version. Only its command line is used, so this script works with any version. For each
optimizer it trains the run of `config.yaml` on `input.txt` without interruption and keeps step 4, from which the tests
resume, and step 8 for AdamW, with which they compare. `outcome.json` says on which kind of CPU that was.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from golden_outcome import describe_cpu, digest

HERE = Path(__file__).resolve().parent


def make(folder: Path) -> None:
    """Write the checkpoints and outcome.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in ("config.yaml", "input.txt"):
            shutil.copy(HERE / file, work / file)
        for optimizer in ("adamw", "muon"):
            words = ["--config", "config.yaml", "--training.optimizer", optimizer, "--save_dir", optimizer]
            subprocess.run([sys.executable, "-m", "smollm2", "train", *words], cwd=work, check=True)
            shutil.copy(work / optimizer / "step_0004.pt", folder / f"{optimizer}_step_0004.pt")
        shutil.copy(work / "adamw" / "step_0008.pt", folder / "adamw_step_0008.pt")
        state = torch.load(work / "adamw" / "step_0008.pt", weights_only=True)
        rows = [json.loads(line) for line in (work / "adamw" / "metrics.jsonl").read_text().splitlines()]
    outcome = {
        "cpu": describe_cpu(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "torch": str(torch.__version__),
        "sha256": digest(state),
        "losses": [row["loss"] for row in rows if "loss" in row],
    }
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
