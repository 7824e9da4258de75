# SPDX-License-Identifier: Apache-2.0
"""What the package ships to be served at once: a small model, its adapters, and their tasks."""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"

BASE_MODEL = _ASSETS / "base"


def adapter_dirs() -> dict[str, Path]:
    """The shipped adapters, by name."""
    found = (path.parent for path in (_ASSETS / "adapters").glob("*/adapter_config.json"))
    return {path.name: path for path in sorted(found)}
