"""Elementwise updates of large leaves whose state is stored in blocks, a slice at a time.

Decoded, the blocks of a moment are a float32 array, and another one in rows where the two differ in
memory, as on a TPU; so are the new moments. Of a head with 32,000 columns these are gigabytes. What
an elementwise update does to a slice of the first axis does not depend on the others, so that no
more than one slice needs to exist in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from optax_subspace._blocks import is_quantized, parts_of
from optax_subspace._dependence import flow
from optax_subspace._inner_state import map_leaves

# A leaf is taken in slices if it has more than so many times the values that one may have.
LEAST = 4

_NAMES = (
    "abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq erf exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter "
    "not or pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub "
    "tan tanh xor"
)
_ELEMENTWISE = frozenset(_NAMES.split())
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call"})
# The shape of a stand-in, which no array of another leaf or of the whole tree has.
_PRIMES = (7, 11, 13, 17, 19, 23)

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def count_slices(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: Any,
    params: Any,
    size: int,
) -> dict[int, int]:
    """The leaves that can be updated in slices of ``size`` values: their number by leaf's index."""
    structure: Any = jax.tree.structure(updates)
    leaves = jax.tree.leaves(updates)
    # (A lone array is shaped like every array of the state.)
    if structure.num_nodes == 1:
        return {}
    counts = {}
    for i, leaf in enumerate(leaves):
        if leaf.size <= LEAST * size or not 2 <= leaf.ndim <= len(_PRIMES):
            continue
        count = _count(leaf, _parts(structure, state, i), size)
        if count > 1 and _is_elementwise(inner, structure, leaves, i, state, params):
            counts[i] = count
    return counts


def in_slices(
    step: Step, counts: dict[int, int], updates: Any, state: Any, params: Any, key: Any
) -> tuple[Any, Any]:
    """``step(updates, state, params, key)``, with some leaves slice by slice.

    Args:
      step: returns new updates and state.
      counts: see :func:`count_slices`.
      updates, state, params: trees of all leaves.
      key: of random numbers, or None.
    """
    structure: Any = jax.tree.structure(updates)
    leaves = jax.tree.leaves(updates)
    weights: Any = None if params is None else structure.flatten_up_to(params)
    draw = lambda i: None if key is None else jax.random.fold_in(key, i)

    def alone(i: int, x: Any) -> Any:
        """A tree in which the other leaves are empty."""
        return structure.unflatten([x if j == i else _empty(y) for j, y in enumerate(leaves)])

    whole = [_empty(x) if i in counts else x for i, x in enumerate(leaves)]
    others = (
        None
        if params is None
        else structure.unflatten([_empty(w) if i in counts else w for i, w in enumerate(weights)])
    )
    few = _with_parts(structure, state, lambda i, part: _empty(part) if i in counts else part)
    done, new = step(structure.unflatten(whole), few, others, draw(len(leaves)))
    done, found = structure.flatten_up_to(done), {}
    for i, count in counts.items():
        parts, draws = _parts(structure, state, i), draw(i)

        def of_slice(k, leaf, parts, weight, i=i, draws=draws):
            given = iter(parts)
            put = lambda j, part: next(given) if j == i else _empty(part)
            low = None if weight is None else alone(i, weight)
            draw = None if draws is None else jax.random.fold_in(draws, k)
            out, new = step(alone(i, leaf), _with_parts(structure, state, put), low, draw)
            return structure.flatten_up_to(out)[i], _parts(structure, new, i)

        def one(k, carry, i=i, count=count, of_slice=of_slice):
            # In place: updates end where gradients were. (In a branch, which is always taken, since
            # XLA:CPU copies all of what it does not see to be read before it is written.)
            leaf, parts = carry
            weight = None if weights is None else _slice(weights[i], k, count)
            rows = k, _slice(leaf, k, count), [_slice(part, k, count) for part in parts], weight
            out, after = jax.lax.cond(k >= 0, of_slice, lambda k, *rows: rows[:2], *rows)
            put = [_put_slice(old, x, k) for old, x in zip(parts, after, strict=True)]
            return _put_slice(leaf, out, k), put

        done[i], after = jax.lax.fori_loop(0, count, one, (leaves[i], parts))
        found[i] = iter(after)
    put = lambda i, part: next(found[i]) if i in counts else part
    return structure.unflatten(done), _with_parts(structure, new, put)


def _parts(structure: Any, state: Any, index: int) -> list[Any]:
    """The arrays of a state, stored in blocks or not, that belong to a leaf."""
    found: list[Any] = []

    def collect(i: int, part: Any) -> Any:
        if i == index:
            found.append(part)
        return part

    _with_parts(structure, state, collect)
    return found


def _with_parts(structure: Any, state: Any, change: Callable[[int, Any], Any]) -> Any:
    """A state with other arrays for those that belong to leaves."""
    by_leaf = lambda i, _, part: jax.tree.map(lambda x: change(i, x), part, is_leaf=is_quantized)
    return map_leaves(by_leaf, lambda part: part, structure, state)


def _count(leaf: Any, parts: list[Any], most: int) -> int:
    """Into how many slices of its first axis a leaf is cut, 1 if it can't be."""
    stored = [part for part in parts if is_quantized(part)]
    if not stored or any(part.shape != leaf.shape for part in parts):
        return 1
    if any(max(parts_of(q.shape, q.layout.shards)) > 1 or q.batch for q in stored):
        return 1
    rows, found = leaf.shape[0], 1
    for count in range(2, rows + 1):
        size = leaf.size // count
        if rows % count or any(size % q.layout.block for q in stored):
            continue
        found = count
        if size <= most:
            break
    return found


def _slice(x: Any, k: Any, count: int) -> Any:
    """One of ``count`` slices of the first axis."""
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, k * (len(a) // count), len(a) // count)
    if not is_quantized(x):
        return take(x)
    shape = (x.slice_shape[0] // count, *x.slice_shape[1:])
    return type(x)(take(x.codes), take(x.scales), shape, x.dtype, x.layout)


def _put_slice(x: Any, part: Any, k: Any) -> Any:
    """The inverse: ``x`` with another slice."""
    put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), k * len(b), 0)
    if not is_quantized(x):
        return put(x, part)
    codes, scales = put(x.codes, part.codes), put(x.scales, part.scales)
    return type(x)(codes, scales, x.slice_shape, x.dtype, x.layout)


def _empty(x: Any) -> Any:
    """What stands for a leaf that is left out: none of its entries, in as many dimensions."""
    ndim = len(x.shape)
    return jnp.zeros((0,) * ndim, x.dtype) if ndim else x


def _is_elementwise(
    inner: optax.GradientTransformationExtraArgs,
    structure: Any,
    leaves: list[Any],
    index: int,
    state: Any,
    params: Any,
) -> bool:
    """Whether each entry of a leaf's update depends on that entry of its arrays alone.

    It may depend on scalars of the whole state; nothing else may depend on the leaf, and the update
    has the gradient's dtype, whose place it takes.
    """
    shape = _PRIMES[: leaves[index].ndim]
    small = lambda i, x: jax.ShapeDtypeStruct(shape if i == index else (0,) * len(x.shape), x.dtype)
    tree = structure.unflatten([small(i, x) for i, x in enumerate(leaves)])
    weights = params
    if params is not None:
        rows = enumerate(structure.flatten_up_to(params))
        weights = structure.unflatten([small(i, x) for i, x in rows])
    stand_in = _with_parts(structure, state, small)
    program = jax.make_jaxpr(inner.update)(tree, stand_in, weights).jaxpr
    # The leaf that each array belongs to; none for those of the whole tree.
    every = list(range(len(leaves)))
    nobodys = jax.tree.map(lambda _: -1, stand_in)
    of_state = jax.tree.leaves(_with_parts(structure, nobodys, lambda i, _: i))
    own = [frozenset() if i < 0 else frozenset([i]) for i in every + of_state]
    own += [frozenset([i]) for i in every] if params is not None else []
    if len(program.outvars) != len(every) + len(of_state):
        return False
    out = zip(every + of_state, flow(program, own, []), strict=True)
    alone = all(found <= {index} if i == index else index not in found for i, found in out)
    same = program.outvars[index].aval.dtype == leaves[index].dtype
    return alone and same and all(_apart(program, shape))


def _apart(program: Jaxpr, shape: tuple[int, ...]) -> Iterator[bool]:
    """Of each equation on arrays of ``shape``: whether it is elementwise."""
    for eqn in program.eqns:
        name = eqn.primitive.name
        of = lambda v: tuple(getattr(v.aval, "shape", ()))
        given = [of(v) for v in eqn.invars]
        shapes = {*given, *map(of, eqn.outvars)} - {()}
        if shape not in shapes:
            continue
        if name in _CALLS:
            within = [x.jaxpr for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
            yield bool(within)
            for inner in within:
                yield from _apart(inner, shape)
        elif name == "broadcast_in_dim":
            yield given[0] == ()
        else:
            yield name in _ELEMENTWISE and shapes == {shape}
