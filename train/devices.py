"""Which accelerator the machine has, and whether JAX uses it."""

import os
from pathlib import Path

import jax

# Device files that the drivers make: NVIDIA's, and Google's up to TPU v4; later TPUs are known by
# the variables that their virtual machines set.
_NVIDIA = ("dev/nvidia0", "proc/driver/nvidia/version")
_TPU = ("dev/accel0",)
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME")


def idle_accelerator(root: Path = Path("/")) -> str | None:
    """`cuda` or `tpu` if the machine has one and JAX computes on the CPU all the same.

    None if JAX uses an accelerator, if there is none, or if `JAX_PLATFORMS` asks for the CPU.
    """
    if jax.default_backend() != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return None
    if any((root / name).exists() for name in _NVIDIA):
        return "cuda"
    return "tpu" if has_tpu(root) else None


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether the machine has a TPU, by its device files or variables."""
    files = (root / name for name in _TPU)
    return any(file.exists() for file in files) or any(v in os.environ for v in _TPU_VARIABLES)


def warning(kind: str) -> str:
    """One line about an accelerator that lies idle.

    >>> warning("cuda")
    'this machine has a GPU, but JAX computes on the CPU: make train DEVICE=cuda installs its wheel'
    """
    name = {"cuda": "GPU", "tpu": "TPU"}[kind]
    return (
        f"this machine has a {name}, but JAX computes on the CPU: "
        f"make train DEVICE={kind} installs its wheel"
    )
