"""The recipes for clusters are what their programs accept, and their commands are those of this project.

Nothing here starts a cluster. slurm.sbatch is run with stand-ins for Slurm's commands.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from smollm2.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "cluster"
SBATCH = "job-name nodes ntasks-per-node exclusive gpus-per-node cpus-per-task time requeue open-mode signal"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    return content


def commands() -> dict[str, list[str]]:
    """The words after `train.py` of each recipe."""
    found = {"kubeflow-trainjob.yaml": read("kubeflow-trainjob.yaml")["spec"]["trainer"]["args"]}
    for name in ("slurm.sbatch", "skypilot.yaml"):
        text = (CLUSTER / name).read_text(encoding="utf-8").replace("\\\n", " ")
        found[name] = shlex.split(re.findall(r"^.*\btrain\.py --.*$", text, re.MULTILINE)[0].strip(" &"))
        found[name] = found[name][found[name].index("train.py") :]
    return found


@pytest.mark.parametrize("name", ["kubeflow-trainjob.yaml", "skypilot.yaml", "slurm.sbatch"])
def test_its_command_is_one_of_this_project(name: str) -> None:
    script, *flags = commands()[name]
    assert (ROOT / script).exists()
    args, unknown = build_parser().parse_known_args(["train", *flags])
    assert args.resume == "auto"
    assert {word for word in unknown if word.startswith("-")} <= {"--data.cache_dir"}


def test_kubeflow_trainer_accepts_its_recipe() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = models.TrainerV1alpha1TrainJob.from_dict(read("kubeflow-trainjob.yaml"))
    assert job.spec.trainer.num_nodes == 2
    written = job.to_dict()["spec"]["trainer"]
    assert written == read("kubeflow-trainjob.yaml")["spec"]["trainer"]


def test_skypilot_accepts_its_recipe() -> None:
    task = read("skypilot.yaml")
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "setup", "run"}
    schemas = pytest.importorskip("sky.utils.schemas")
    pytest.importorskip("jsonschema").validate(task, schemas.get_task_schema())


def test_accelerate_reads_the_file_for_two_machines() -> None:
    from accelerate.commands.config import config_args

    config = config_args.load_config_from_file(str(ROOT / "configs" / "accelerate" / "two_machines.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 16)


def test_the_options_for_slurm_are_options_of_sbatch() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8")
    assert re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE) == SBATCH.split()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins for Slurm's commands and for torchrun, which write down their words."""
    programs = {
        "srun": '[ "$1" = --overlap ] && { shift 3; } ; exec "$@"',
        "scontrol": 'echo "$@" >>scontrol.log; echo first; echo second',
        "torchrun": (
            'echo "$@" >torchrun.log; echo $$ >torchrun.pid; trap "echo 138 >$SMOLLM2_EXIT_CODE_FILE; exit 0" USR1;'
            ' touch started; [ -z "$CODE" ] || { echo "$CODE" >$SMOLLM2_EXIT_CODE_FILE; exit 0; };'
            " while :; do sleep 0.05; done"
        ),
        "pkill": "kill -USR1 $(cat torchrun.pid)",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "first,second"}
    return {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": ""}


def start(slurm: dict[str, str], folder: Path, code: str = "") -> "subprocess.Popen[str]":
    words = [shutil.which("bash") or "bash", str(CLUSTER / "slurm.sbatch")]
    return subprocess.Popen(words, cwd=folder, env={**slurm, "CODE": code}, text=True)


def test_a_signal_of_slurm_reaches_the_run_and_the_job_is_put_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    job = start(slurm, tmp_path)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 138
    assert "requeue 7" in (tmp_path / "scontrol.log").read_text()
    assert "--rdzv_endpoint first:29400" in (tmp_path / "torchrun.log").read_text()


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("75", True), ("2", False), ("3", False)])
def test_only_a_run_that_is_not_finished_is_put_back(
    code: str, requeued: bool, slurm: dict[str, str], tmp_path: Path
) -> None:
    assert start(slurm, tmp_path, code).wait(20) == int(code)
    assert ("requeue 7" in (tmp_path / "scontrol.log").read_text()) is requeued
