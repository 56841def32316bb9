"""Checkpoints that are there whole or not at all."""

import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file and renames, so that a full disk or a kill leaves what was there before.

    Lightning writes to the temporary folder and moves the file; where that is another disk, the move is a copy, and one
    that fails leaves the newest checkpoint cut off. Remote paths are written as Lightning writes them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Lightning's own, beside the file, which then takes its place in one move."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        beside = Path(f"{os.fspath(path)}.part")
        try:
            super().save_checkpoint(checkpoint, beside, storage_options)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
