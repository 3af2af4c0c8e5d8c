"""What made a run: versions, the commit of a checkout, and the machine, as the run's start event and reports say it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgrpo import __version__


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns what numbers of this process depend on; no host or user name.

    Args:
        device: What the process computes on.

    Returns:
        `device` as PyTorch names it, `machine` in words, `versions` by package, and `commit`: of the checkout that
        fastgrpo is imported from, with `+` where tracked files differ from it; None where it is no checkout.
    """
    return {
        "device": str(device),
        "machine": machine(device),
        "commit": commit(Path(__file__).resolve().parents[2]),
        "versions": {"fastgrpo": __version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's kind, and how many cores this process may use."""
    threads = torch.get_num_threads()
    used = f"{threads} thread" + "s" * (threads != 1)
    cores = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {used}"
    return f"{torch.cuda.get_device_name(device)}, {cores}" if device.type == "cuda" else f"CPU ({cores})"


def commit(checkout: Path) -> str | None:
    """The commit of a git checkout, 12 digits, with `+` where tracked files were changed; None where there is none."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changed.returncode else "")
