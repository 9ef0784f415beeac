"""Where the real data are that some tests train on and convert."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def real_data(name: str) -> Path:
    """A file or folder of the real data; a test that needs it fails with this message where it is missing."""
    folder = Path(os.environ.get("CTR_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.fail(f"{folder / name} is missing; set CTR_DATA to the folder of the real data")
    return folder / name
