"""What every run writes down about itself before it starts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sparring.data.images import Images


def common(test: Images, seed: int, device: str) -> dict[str, Any]:
    """What the plan of every run says: the test images, the seed, the device, versions and hardware."""
    return {
        "data_digest": test.digest(),
        "classes": list(test.classes),
        "seed": seed,
        "device": device,
        "versions": versions(),
        "hardware": hardware(device),
    }


def versions() -> dict[str, str]:
    """The versions that can change a figure."""
    found = {
        "sparring": importlib.metadata.version("sparring"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("numpy", "scikit-learn", "safetensors"):
        found[name] = importlib.metadata.version(name)
    return found


def hardware(device: str) -> dict[str, Any]:
    """The machine: processor, cores, memory, and the accelerator if one is used."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
