"""Compiles the training step for a TPU slice that this machine need not have, and tells its memory.

The TPU compiler comes with libtpu (the extra `aot`) and needs no TPU. What it lays out is what a
chip would hold; a step that doesn't fit is refused with the bytes that it needs.
"""

import dataclasses
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import backend
from models.config import LlamaConfig
from train import hlo, launch, mesh, placement, source
from train.batches import Batch
from train.cli import Command
from train.config import Config
from train.errors import UsageError, one_line
from train.screen import Screen, duration

# Chips of a host, by kind, for libtpu: it wants to know on which kind of machine it compiles.
_KINDS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}


class Compiled(NamedTuple):
    """A step as the compiler lays it out, bytes on each device."""

    arguments: int
    temporaries: int
    peak: int
    traffic: dict[str, int]  # by kind of collective, of one step


class Refused(NamedTuple):
    """A step that doesn't fit: the compiler's words."""

    reason: str


def show(command: Command) -> None:
    """Compiles the command's step and prints what it takes; reads no data.

    Raises:
      UsageError: there is no such slice, or no libtpu.
    """
    config, screen = command.config, Screen()
    where, platform = devices(config.topology)
    config = dataclasses.replace(config, model=for_platform(config.model, platform))
    # (On one host the devices that the run itself would take.)
    axis = "data" if config.topology is None else "fsdp"
    grid = mesh.make(config.mesh, where, axis)
    mesh.check_rows(config, grid)
    source.check(config, grid)
    screen.say(
        f"Model {command.model}: {config.model.num_params():,} parameters in "
        f"{config.model.param_dtype}. {config.optimizer.name}"
        f"{', fused backward pass' if config.train.fused_backward else ''}, "
        f"{config.train.batch_size} x {config.train.sequence_length} tokens a step.\n"
        f"{config.topology or 'this machine'}: {grid}. Compiling ..."
    )
    start = time.perf_counter()
    found = compile_step(config, grid)
    took = duration(time.perf_counter() - start)
    if isinstance(found, Refused):
        screen.say(f"It does not fit: {found.reason} (compiled in {took})")
        return
    memory = [
        ["arguments", gibibytes(found.arguments), "weights, optimizer state and batch"],
        ["temporaries", gibibytes(found.temporaries), "gradients, activations and other work"],
        ["= peak", gibibytes(found.peak), f"it fits (compiled in {took})"],
    ]
    screen.say("\nMemory of each device:")
    screen.table("", ["part", "GiB", ""], memory)
    moved = [[kind, gibibytes(size)] for kind, size in sorted(found.traffic.items())]
    moved.append(["= all", gibibytes(sum(found.traffic.values()))])
    screen.say("\nResults of collectives in a step, on each device:")
    screen.table("", ["kind", "GiB"], moved)


def devices(topology: str | None) -> tuple[list[Any], str]:
    """The devices to compile for, and their platform.

    >>> len(devices(None)[0]) == jax.device_count()
    True
    """
    if topology is None:
        return jax.devices(), jax.default_backend()
    from jax.experimental import topologies

    kind = topology.partition(":")[0]
    if kind not in _KINDS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise UsageError(
            f"--topology {topology}: give a kind of TPU ({', '.join(_KINDS)}) and the chips along "
            "each axis, e.g. v5e:4x4"
        )
    # Where libtpu is installed and no TPU is, JAX would look for one.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", _KINDS[kind])
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        slice_of = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # whatever libtpu, or its absence, raises
        raise UsageError(
            f"--topology {topology}: {one_line(error)[:200]}; if libtpu is missing, install the "
            "extra aot: pip install '.[train,aot]'"
        ) from None
    return list(slice_of.devices), "tpu"


def for_platform(model: LlamaConfig, platform: str) -> LlamaConfig:
    """The model as it is computed there: what is `auto` is decided."""
    choice = backend.choose(model, platform)
    fields: dict[str, Any] = dataclasses.asdict(choice)
    if choice.loss != "fused":
        fields["loss_chunk"] = None
    return dataclasses.replace(model, **fields)


def compile_step(config: Config, grid: mesh.Mesh) -> Compiled | Refused:
    """The training step of a configuration on a mesh."""
    work = mesh.Work(grid, config.train.micro_batch_size)
    key = jax.random.key(config.train.seed)
    optimizer, fused, begin = launch.prepare(config, work)
    shapes = placement.place(jax.eval_shape(begin, key), optimizer, grid)
    formats = placement.formats(shapes)
    size = (config.train.batch_size, config.train.sequence_length)
    tokens = jax.ShapeDtypeStruct(size, jnp.int32, sharding=grid.rows)
    # (Of two steps the one that takes more.)
    step = source.jitted_steps(config, optimizer, fused, work, formats)[0]
    try:
        compiled = step.lower(shapes, Batch(tokens, tokens)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Refused(why_refused(str(error)))
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = max(getattr(memory, "peak_memory_in_bytes", 0), arguments + results)
    # (XLA's own for a CPU leaves the temporaries out.)
    on_cpu = grid.devices.devices.flat[0].platform == "cpu"
    if on_cpu or not getattr(memory, "peak_memory_in_bytes", 0):
        peak = arguments + results + temporaries
    return Compiled(arguments, temporaries, peak, hlo.traffic(compiled.as_text()))


def why_refused(message: str) -> str:
    """The compiler's words on memory, which differ between versions of libtpu, in short.

    >>> why_refused("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.5G of 15.75G hbm.")
    'needs 17.5GiB of 15.75GiB'
    >>> why_refused("memory for HLO temporaries (34.85G) exceeds available HBM (15.75G)")
    'needs 34.85GiB of 15.75GiB'
    """
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", message)
    found = found or re.search(r"\(([\d.]+\w)\) exceeds .*?\(([\d.]+\w)\)", message)
    return f"needs {found[1]}iB of {found[2]}iB" if found else one_line(message)[:200]


def gibibytes(count: int) -> str:
    """
    >>> gibibytes(3 * 2**29)
    '1.500'
    """
    return f"{count / 2**30:,.3f}"
