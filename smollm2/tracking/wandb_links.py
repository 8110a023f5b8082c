"""Hard links that keep checkpoints for W&B until they are uploaded, so that `keep_last` may remove the originals."""

import contextlib
from pathlib import Path

from smollm2.config.schema import WandbConfig
from smollm2.tracking.base import Report
from smollm2.tracking.wandb_environment import OWN_FOLDER


def links_folder(folder: Path) -> Path:
    """Return the folder for the hard links to checkpoints."""
    return folder.absolute() / OWN_FOLDER / "checkpoints"


def remove_links(folder: Path) -> None:
    """Remove the hard links in a run folder: those of an interrupted run may keep gigabytes of old checkpoints."""
    for path in links_folder(folder).glob("*.pt"):
        with contextlib.suppress(OSError):
            path.unlink()


class CheckpointLinks:
    """Hard links to the checkpoints that are to be uploaded, in the run's wandb folder."""

    def __init__(self, folder: Path, config: WandbConfig, report: Report) -> None:
        self.folder, self.chosen, self.report = links_folder(folder), config.log_checkpoints, report

    def keep(self, path: Path, is_best: bool) -> Path | None:
        """Create and return a hard link to the file, or return None if it is not to be uploaded.

        If it cannot be linked, report this once, and return None from then on.
        """
        if self.chosen == "none" or (self.chosen == "best" and not is_best):
            return None
        if path.is_dir():
            self.report(f"W&B: {path.name} is a folder and is not uploaded; `smollm2 convert` makes a file of it")
            return None
        link = self.folder / path.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.hardlink_to(path)
        except OSError as error:
            self.chosen = "none"
            self.report(f"W&B: {path.name} cannot be linked ({error.strerror or error}). No checkpoints are uploaded.")
            return None
        return link
