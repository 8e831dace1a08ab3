"""The devices as a mesh of two axes, what each of them holds, and how they compute together.

`data`: groups of devices with the same parameters. `fsdp`: the devices of a group, which split the
parameters and the optimizer state (`models.sharding`). The rows of a batch are split over both.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models import sharding
from train.config import Config, MeshConfig
from train.errors import UsageError

AXES = ("data", sharding.FSDP)
ROWS = PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices and how they are split: a wrapper that knows the axes' meaning."""

    devices: jax.sharding.Mesh

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.devices.size

    @property
    def data(self) -> int:
        """Groups that each hold all parameters."""
        return self.devices.shape["data"]

    @property
    def fsdp(self) -> int:
        """Devices that split them."""
        return self.devices.shape[sharding.FSDP]

    @property
    def everywhere(self) -> NamedSharding:
        """The same on each device."""
        return NamedSharding(self.devices, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Split along the first axis over all devices."""
        return NamedSharding(self.devices, ROWS)

    def of_params(self, params: Any) -> Any:
        """The `NamedSharding` of each parameter, in the tree of arrays or shapes."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.devices, spec),
            sharding.specs(params, self.fsdp),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def put(self, batch: Any) -> Any:
        """A batch's arrays (B, ...), the same in all processes, split over the devices."""
        place = lambda x: jax.make_array_from_callback(x.shape, self.rows, lambda i: x[i])
        return jax.tree.map(lambda x: place(np.asarray(x)), batch)

    def __str__(self) -> str:
        kind = self.devices.devices.flat[0].device_kind
        if self.size == 1:
            return f"1 device ({kind})"
        return f"{self.size} devices ({kind}): data {self.data} x fsdp {self.fsdp}"


class Work(NamedTuple):
    """How the work of a step is divided."""

    mesh: Mesh | None = None  # None: on whatever device the arrays are
    micro_batch_size: int | None = None  # rows at a time; None: all at once

    @property
    def shards(self) -> int:
        """Devices that split the parameters."""
        return 1 if self.mesh is None else self.mesh.fsdp


ALONE = Work()  # one device, all rows at once


def make(config: MeshConfig, devices: Sequence[Any] | None = None, axis: str = "data") -> Mesh:
    """The mesh of the configuration over all devices.

    Args:
      config: the lengths of the axes.
      devices: those to use, all by default.
      axis: the one that takes all devices if neither length is given.

    Raises:
      UsageError: the lengths do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    given = {name: getattr(config, name) for name in AXES}
    if given["data"] is None and given["fsdp"] is None:
        given = {"data": 1, "fsdp": 1, axis: count}
    known = math.prod(n for n in given.values() if n is not None)
    words = " ".join(f"--mesh.{name} {n}" for name, n in given.items() if n is not None)
    lengths = {name: count // known if n is None else n for name, n in given.items()}
    if math.prod(lengths.values()) != count:
        raise UsageError(
            f"{words}: makes {known} of the {count} devices that there are; give numbers whose "
            f"product is {count}, or leave both out"
        )
    # (What axes are by default differs between versions of JAX.)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(jax.make_mesh(tuple(lengths.values()), AXES, axis_types=kinds, devices=devices))


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raises UsageError if the rows that are computed at a time can't be split over the devices."""
    size, key = config.train.batch_size, "batch_size"
    if config.train.micro_batch_size is not None:
        size, key = config.train.micro_batch_size, "micro_batch_size"
    if size % mesh.size:
        raise UsageError(
            f"--train.{key} {size}: can't be split evenly over {mesh.size} devices; give a "
            f"multiple of {mesh.size}, e.g. {max(1, round(size / mesh.size)) * mesh.size}"
        )


def over_rows(mesh: Mesh | None, function: Callable[..., Any], prefix: str = "") -> Any:
    """`function` of parameters and of arrays with rows in front, by each device for its own rows.

    Args:
      mesh: of one device or None, the function stays as it is.
      function: `(params, *rows) -> rows`, each a tree.
      prefix: path of these parameters in the model's tree, such as `layers/`.
    """
    if mesh is None or mesh.size == 1:
        return function

    def split(params: Any, *rows: Any) -> Any:
        specs = sharding.specs(params, mesh.fsdp, prefix)
        local = lambda params, *rows: function(sharding.whole(params, specs, prefix), *rows)
        return jax.shard_map(
            local,
            mesh=mesh.devices,
            in_specs=(specs, *(ROWS for _ in rows)),
            out_specs=ROWS,
            # (Not all carries of the model's loops say that they vary from device to device.)
            check_vma=False,
        )(params, *rows)

    return split


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where their arrays are."""
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, shardings)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays or shapes on one device, by their shardings if they have any."""

    def shape(x: Any) -> tuple[int, ...]:
        sharding = getattr(x, "sharding", None)
        return x.shape if sharding is None else sharding.shard_shape(x.shape)

    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
