"""Which code, libraries and machine made a file: the part of every stage's record that hashes of its inputs do not tell.

Beneath `config`, and without torch or pandas, as the runner needs it too.
"""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from lib import files

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "huggingface_hub"),
    *("numpy", "pandas", "scipy", "statsmodels", "openai", "pydantic", "papermill", "plotly"),
)
"""Libraries whose releases may change numbers or formats."""

LOCKS = ("requirements.lock", "pyproject.toml")
"""What fixes the libraries: the first that is there."""


def describe(root: Path = files.ROOT) -> dict[str, Any]:
    """Says what makes a file now.

    Args:
        root: the clone; its commit is looked up there.

    Returns:
        git_commit (None outside a clone, or without git), git_dirty (whether tracked files differ from it; None when unknown), lock
        (file and sha256 of what fixes the libraries), versions (by package), python and platform.
    """
    commit, dirty = _git(root)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "lock": lock(root),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def lock(root: Path = files.ROOT) -> dict[str, str] | None:
    """Returns file and sha256 of what fixes the libraries; None where there is neither."""
    path = next((root / name for name in LOCKS if (root / name).is_file()), None)
    return {"file": path.name, "sha256": files.sha256(path)} if path else None


def versions() -> dict[str, str]:
    """Returns the installed versions of `PACKAGES`; one that is absent is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path) -> tuple[str | None, bool | None]:
    if not (root / ".git").exists():  # a clone of something else around ours says nothing about us
        return None, None
    try:
        said = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None, None
    return said[0], bool(said[1])
