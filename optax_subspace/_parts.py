"""The parts of the parameters that a fused backward pass updates one by one, and their states."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize
from optax_subspace._leaves import path_name
from optax_subspace._projected import is_projected
from optax_subspace._projection_state import ProjectionState
from optax_subspace._quantize import QuantizedState


def as_seen(tree: Any) -> Any:
    """Parameters or gradients as a transformation sees them: arrays, float32 in place of float16.

    (Second moments vanish in float16, in which optax would keep them.)
    """

    def widened(x: Any) -> Any:
        if getattr(x, "dtype", None) != jnp.float16:
            return x
        if is_projected(x):
            return dataclasses.replace(x, dtype=jnp.float32)
        return x.astype(jnp.float32)

    return jax.tree.map(widened, dequantize(tree), is_leaf=is_projected)


def init_part(tx: optax.GradientTransformation, part: Any, number: Any) -> Any:
    """The state of one part, with random keys of its own by the part's number.

    Its arrays are its own too, so that it can be donated: a state may hold an array that the user
    has, or a weight.

    Raises:
      ValueError: ``tx`` can't be initialised on a part, where it was on the whole tree.
    """
    with warnings.catch_warnings():
        # Rules for other parts match nothing here; the whole tree was looked at before.
        for known in ("the rule .* (matches no|has no effect)", "no parameter is projected"):
            warnings.filterwarnings("ignore", known, UserWarning)
        try:
            state = tx.init(as_seen(part))
        except (ValueError, KeyError) as error:
            (key,) = part
            raise ValueError(
                "fused_backward: tx can be initialised on the whole tree of parameters, and not on "
                f"{{{key!r}: ...}} alone, of which it sees one at a time: give a mask or labels as "
                "a function of what it sees, mask=lambda params: jax.tree.map(..., params), not "
                f"those of the whole tree ({str(error).strip().partition(chr(10))[0]})"
            ) from error
    return jax.tree.map(jnp.copy, _with_own_keys(state, number))


def _with_own_keys(state: Any, number: Any) -> Any:
    """A state whose random keys are folded with a number.

    (But for this library's own, which differ from part to part by ``key_of``.)
    """

    def own(path, x):
        if isinstance(x, QuantizedState):
            return x._replace(inner=_with_own_keys(x.inner, number))
        if isinstance(x, ProjectionState) or not _is_key(path, x):
            return x
        fold = lambda key: jax.random.fold_in(key, number)
        for _ in range(x.ndim if _is_typed(x) else 0):
            fold = jax.vmap(fold)
        return fold(x)

    stop = lambda x: isinstance(x, ProjectionState | QuantizedState)
    return jax.tree_util.tree_map_with_path(own, state, is_leaf=stop)


def _is_key(path: Any, x: Any) -> bool:
    """Whether an array is a random key: by its type, or in the raw form by its name."""
    named = path_name(path[-1:]) in ("key", "rng_key")
    return _is_typed(x) or named and jnp.shape(x) == (2,) and x.dtype == jnp.uint32


def _is_typed(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
