"""What the subspace does to the state of the transformation inside it.

An inner state is any tree of arrays. Its parts that are shaped like the parameters (``mu`` and
``nu`` of Adam) belong to leaves; all else, such as a step counter, belongs to the whole tree.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_subspace._blocks import dequantize, is_quantized, quantize_like, without_variables
from optax_subspace._leaves import LeafPlan, path_name
from optax_subspace._refresh import Turn, turned

# The fields in which optax and its contrib package keep squares of gradients, and their means.
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v_row", "v_col", "sum_of_squares", "exp_avg_sq"})
_SECOND_MOMENTS |= {"e_g", "e_x", "grad_sum_sq"}
_FIRST_MOMENTS = frozenset({"mu", "trace", "momentum", "exp_avg"})
_OTHERS = frozenset({"m", "n", "v"})  # squares in one optimizer, means in another
# States in which a field is not what its name says elsewhere, or which make plain what it is, by
# what they are called or by another of their fields.
_IN = {
    "ScaleBySM3State": {"mu": True, "nu": False},
    "SophiaState": {"nu": False},  # a Hessian's diagonal
    "v_row": {"v": True},  # of what is not factored
    "m": {"n": True},  # Adan, simplified AdEMAMix
}
# Where weights are kept: by schedule-free, Prodigy, DoG, COCOB, MADGRAD and L-BFGS.
_WEIGHTS = frozenset({"z", "params0", "init_params", "init_particles", "x0", "params"})


def map_leaves(
    by_leaf: Callable[..., Any],
    of_tree: Callable[..., Any],
    structure: Any,
    state: Any,
    *others: Any,
) -> Any:
    """Maps over an inner state, leaf by leaf where a part of it is shaped like ``structure``.

    Args:
      by_leaf: ``(index, path, part, *other_parts) -> part`` for what belongs to the leaf of that
        index; a part is an array, or a tree of arrays if the inner state keeps several.
      of_tree: ``(part, *other_parts) -> part`` for all else.
      structure: the parameters' tree structure.
      state: the inner state.
      *others: trees of the same structure.
    """

    def fits(node):
        try:
            parts = structure.flatten_up_to(node)
        except (ValueError, TypeError):
            return False
        # (A tuple of parameters is shaped like the state of a chain of as many.)
        return type(node) is not tuple or not any(getattr(part, "_fields", ()) for part in parts)

    def like_params(node):
        # The innermost node that fits: the state of a chain of two is a tuple of two, as
        # parameters may be.
        return fits(node) and not any(_within(node, fits))

    def on_part(path, part, *other_parts):
        if not like_params(part):
            return of_tree(part, *other_parts)
        columns = [structure.flatten_up_to(p) for p in (part, *other_parts)]
        rows = zip(*columns, strict=True)
        return structure.unflatten([by_leaf(i, path, *row) for i, row in enumerate(rows)])

    return jax.tree_util.tree_map_with_path(on_part, state, *others, is_leaf=like_params)


def _within(node: Any, test: Callable[[Any], bool]) -> Iterator[bool]:
    """What ``test`` says of every node below ``node``."""
    if is_quantized(node):
        return
    children = jax.tree_util.default_registry.flatten_one_level(node)
    for child in children[0] if children else ():
        yield test(child)
        yield from _within(child, test)


def bytes_by_leaf(state: Any, structure: Any) -> list[int]:
    """Bytes of an inner state's arrays or shapes that belong to each leaf of ``structure``."""
    totals = [0] * structure.num_leaves

    def count(index, path, part):
        totals[index] += tree_bytes(part)

    map_leaves(count, lambda part: None, structure, state)
    return totals


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def holds_squares(path: Sequence[Any], state: Any) -> bool | None:
    """Whether an array at this path of a state is a second moment; None if no name tells.

    The first name that tells decides: what comes after it are the parameters' own names.
    """
    for key, node in _along(path, state):
        name = getattr(key, "name", getattr(key, "key", None))
        of_node = (type(node).__name__, *getattr(node, "_fields", ()))
        for told in (_IN[x] for x in of_node if x in _IN):
            if name in told:
                return told[name]
        if name in _SECOND_MOMENTS:
            return True
        if name in _FIRST_MOMENTS:
            return False
        if name in _OTHERS:
            return None
    return None


def holds_weights(path: Sequence[Any], state: Any) -> bool:
    """Whether an array at this path of a state is a copy of weights, told by its field's name."""
    for key, node in _along(path, state):
        name = getattr(key, "name", None)
        if name in _WEIGHTS and name in getattr(node, "_fields", ()):
            return True
        if holds_squares([key], node) is not None:
            return False
    return False


def _along(path: Sequence[Any], node: Any) -> Iterator[tuple[Any, Any]]:
    """The keys of a path, each with the node that it leads on from (None where that is unknown)."""
    for key in path:
        yield key, node
        children = jax.tree_util.default_registry.flatten_one_level_with_keys(node)
        node = dict(children[0]).get(key) if children else None


def keep_skipped(
    new: Any, old: Any, structure: Any, used: Sequence[jax.Array], ready: jax.Array | None
) -> Any:
    """The new state, but the old one for leaves that were not ``used``, in the old dtypes.

    With ``ready`` given, nothing at all changes where it is false.
    """

    def by_leaf(index, path, new_part, old_part):
        choose = lambda n, o: as_before(jnp.where(used[index], n, o), o)
        return jax.tree.map(choose, new_part, old_part)

    def of_tree(new_part, old_part):
        if ready is not None:
            new_part = jnp.where(ready, new_part, old_part)
        return as_before(new_part, old_part)

    # (Random keys have a dtype that nothing can be cast to.)
    as_before = lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype)
    return map_leaves(by_leaf, of_tree, structure, new, old)


@contextlib.contextmanager
def refused_if_other(inner: Any, gradients: Any, state: Any) -> Iterator[None]:
    """Says so where an error of ``inner.update`` comes of a state that was made for other leaves,
    as those of another side are: bases tell sides of a square matrix apart no more than ranks."""
    try:
        yield
    except (TypeError, ValueError) as error:
        made = state
        with contextlib.suppress(Exception):  # the error is that of the update
            made = jax.eval_shape(inner.init, gradients)
        for path, has, needs in _other_shapes(state, made):
            raise ValueError(
                f"the state of the inner transformation has {path} of shape {has}, these settings "
                f"need {needs}: initialise the state with the same transformation and parameters, "
                "and give gradients of their shapes"
            ) from error
        raise


def check_shapes(new: Any, old: Any) -> None:
    """Raises if an update has changed the shape of an array of the inner state."""
    for path, before, after in _other_shapes(old, new):
        raise ValueError(
            f"the update of the inner transformation makes an array of shape {after} of {path} of "
            f"shape {before}: states keep their shapes"
        )


def _other_shapes(tree: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Paths and both shapes of arrays that differ in it; none of trees of other structures."""
    flatten = functools.partial(jax.tree_util.tree_flatten_with_path, is_leaf=is_quantized)
    structure: Any
    ours, structure = flatten(without_variables(tree))
    theirs, like = flatten(without_variables(other))
    if structure != like:
        return
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        one, two = (x.shape if is_quantized(x) else jnp.shape(x) for x in (a, b))
        if one != two:
            yield path_name(path), one, two


def turn_moments(
    state: Any, structure: Any, plans: Sequence[LeafPlan], turns: Sequence[Turn | None]
) -> Any:
    """Carries the moments over to the bases that have replaced theirs.

    Only arrays of exactly the leaf's subspace shape are coordinates in it; others are kept.
    """
    if all(turn is None for turn in turns):
        return state

    def by_leaf(index, path, part):
        turn, plan = turns[index], plans[index]
        if turn is None:
            return part

        def on_array(inner_path, x):
            if is_quantized(x):
                return quantize_like(on_array(inner_path, dequantize(x)), x)
            if x.shape != plan.low_shape or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            # An array of another name is one of squares if no number in it is negative.
            return turned(holds_squares((*path, *inner_path), state), plan, x, turn)

        return jax.tree_util.tree_map_with_path(on_array, part, is_leaf=is_quantized)

    return map_leaves(by_leaf, lambda part: part, structure, state)
