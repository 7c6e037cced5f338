"""Where a run came from: code, versions, machine. Nothing secret: variables from a list, URLs without credentials."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gdn2 import env

PACKAGES = (
    "gdn2-eval",
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "transformers",
    "lm-eval",
    "datasets",
    "nltk",
    "wonderwords",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TRITON_INTERPRET",
    "RANK",
    "WORLD_SIZE",
)
ROOT = Path(__file__).resolve().parent.parent


def collect(root: Path = ROOT) -> dict[str, object]:
    """Commit, dirty flag and remote of the code at `root`, versions, platform and allow-listed variables."""
    return {
        "code": code(root),
        "python": sys.version.split()[0],
        "platform": platform.system(),
        "machine": platform.machine(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "environment": {name: value for name in VARIABLES if (value := env.get(name))},
    }


def code(root: Path) -> dict[str, object]:
    """Git's commit, whether tracked files differ from it, and the remote; empty outside a repository of ours."""
    if not (root / ".git").exists() or (commit := _git(root, "rev-parse", "HEAD")) is None:
        return {}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    remote = _git(root, "config", "--get", "remote.origin.url")
    return {"commit": commit, "dirty": bool(changes), "remote": redacted(remote or "")}


def redacted(url: str) -> str:
    """`url` without user, password, query and fragment."""
    return re.sub(r"[?#].*", "", re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/]*@)?", r"\1", url))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
