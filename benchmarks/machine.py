"""Which machine a figure comes from: without it a rate means nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "faiss-cpu", "scikit-learn", "lexicalrichness")


def machine() -> dict[str, Any]:
    """JSON-like: processor, cores, threads, memory, GPU, load, versions."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": load(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
    }
    return found


def load() -> float | None:
    """Processes running or waiting, mean of the last minute (1-minute load average); None where it is not told."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def describe(found: dict[str, Any]) -> str:
    """The machine in a sentence or two."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    memory = f", {found['memory_gib']} GiB" if found["memory_gib"] else ""
    loads = f"1-minute load {found['load_before']} before"
    if "load_after" in found:
        loads += f", {found['load_after']} after (the benchmark's own threads included)"
    if "clock" in found:
        loads += f"; {found['clock']}"
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['cpu_capability']}{memory}{gpu}; "
        f"{found['system']}, Python {found['python']}; {versions}; {loads}"
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
