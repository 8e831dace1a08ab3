"""How fast a run goes: rows of throughput.jsonl, which depend on the clock and the machine."""

from typing import Any

import jax

from train import flops
from train.clock import Clock
from train.config import Config
from train.records import Row


def row(step: int, first: int, clock: Clock, config: Config) -> Row:
    """Speed since this process began, at a step.

    `first` is the step after which it began. Model FLOP/s are those of `train.flops`, utilisation
    is their share of the devices' bfloat16 peak, None where that is not known.
    """
    devices, speed = jax.devices(), clock.speed()
    rank = config.lora.rank if config.lora.factorize else 0
    cost = flops.per_token(config.model, config.train.sequence_length, config.lora.freeze, rank)
    best = flops.peak(devices[0].device_kind)
    return {
        "kind": "speed",
        "step": step,
        "after": first,
        "seconds": round(clock.seconds(), 3),
        "tokens_per_second": round(speed, 1),
        "tokens_per_second_per_device": round(speed / len(devices), 1),
        "model_flops_per_second": float(f"{speed * cost:.4g}"),
        "utilisation": None if best is None else round(speed * cost / best / len(devices), 4),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "peak_bytes": peak_bytes(jax.local_devices()),
    }


def peak_bytes(devices: Any) -> int | None:
    """The most memory that one of the devices has had in use, None where they don't count it."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [count for count in found if count is not None]
    return max(known, default=None)
