"""Where latentgen keeps what is the user's own: LoRAs, embeddings, models, pictures, jobs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """The folder `$LATENTGEN_HOME`; without that variable, `latentgen` in the platform's data
    folder. It need not exist."""
    if own := os.environ.get("LATENTGEN_HOME"):
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "latentgen"
