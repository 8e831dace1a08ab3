"""What a fused step refuses, with the remedy."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_subspace._blocks import has_quantized
from optax_subspace._fused_state import LossScale
from optax_subspace._leaves import can_learn, leaf_names
from optax_subspace._projectors._base import check_count, check_number, is_number
from optax_subspace._varying import varying_axes


def check_clips(**clips: Any) -> None:
    """Raises unless each is None or a number that is positive in float32, and may be traced."""
    for name, value in clips.items():
        if value is None:
            continue
        if not is_number(value):
            raise TypeError(f"fused_backward: {name} must be a number, got {value!r}")
        # (Numbers below the normal ones count as zero.)
        if not isinstance(value, jax.core.Tracer) and not value >= np.finfo(np.float32).tiny:
            raise ValueError(
                f"fused_backward: {name} must be positive in float32, got {value}: leave it out "
                "not to clip"
            )


def check_loss_scale(how: Any) -> None:
    """Raises unless ``how`` is None or a :class:`LossScale` that can grow and shrink."""
    if how is None:
        return
    if not isinstance(how, LossScale):
        raise TypeError(f"fused_backward: loss_scale must be a LossScale, got {how!r}")
    check_number("LossScale: initial", how.initial)
    check_number("LossScale: factor", how.factor)
    check_count("LossScale: period", how.period)
    for name, value, least in (("initial", how.initial, 0), ("factor", how.factor, 1)):
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if not least < single < math.inf:
            raise ValueError(
                f"LossScale: {name} must be finite and above {least} in float32, got {value}"
            )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says what an error of JAX means that comes of a block."""
    try:
        yield
    except TypeError as error:
        if "scan body function carry" in str(error):
            error.add_note(
                "fused_backward: block hands on what it is given, of the same shapes and dtypes: "
                "cast what embed returns, or what block does"
            )
        raise


def check_loss(value: Any) -> None:
    """Raises unless what ``loss`` returned is one real number, the same on all devices."""
    if isinstance(value, jax.Array) and not value.shape and can_learn(value.dtype):
        if axes := sorted(varying_axes(value)):
            raise ValueError(
                f"fused_backward: the loss differs between the devices of a shard_map over {axes}: "
                "leave the step to jax.jit, with a batch that is split over the mesh"
            )
        return
    shape = lambda x: f"{jnp.asarray(x).dtype}{list(jnp.shape(x))}"
    found = jax.tree.map(lambda x: shape(x) if isinstance(x, jax.Array) else repr(x), value)
    raise TypeError(
        f"fused_backward: loss must return one real number, the mean as a JAX array, got {found}"
    )


def warn_if_rounded_to_nearest(params: Any, seed: int | None) -> None:
    """Warns of int8 weights without a seed, most of which would stay where they are."""
    if seed is None and has_quantized(params):
        warnings.warn(
            "fused_backward rounds weights in int8 to the nearest code, which loses all updates "
            "below half the distance of two: give seed= to round them stochastically (where they "
            "are frozen it changes nothing)",
            UserWarning,
            stacklevel=3,
        )


def refuse_integers(params: Any) -> None:
    """Raises for a parameter that has no gradient."""
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        if not can_learn(leaf.dtype):
            raise TypeError(
                f"parameter {name} has dtype {leaf.dtype}: only real floating-point parameters of "
                "at least 16 bits learn; close over others, or hand them on with the batch"
            )


def refuse_gradient_trees(state: Any) -> None:
    """Raises for the state of a transformation that keeps gradients of all layers."""
    kinds = {optax.MultiStepsState: "MultiSteps", optax.ApplyEvery: "apply_every"}
    is_one = lambda x: type(x) in kinds
    for node in filter(is_one, jax.tree.leaves(state, is_leaf=is_one)):
        raise ValueError(
            f"{kinds[type(node)]} keeps a whole gradient tree, which the fused backward pass is "
            "there to avoid: accumulate in the subspace, scale_by_subspace(..., accumulate=k), or "
            "use larger batches"
        )
