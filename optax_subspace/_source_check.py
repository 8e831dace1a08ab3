"""What is done to the arrays of a kernel at the source, and axes of `vmap` around it all."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from optax_subspace._source_kernel import AT_SOURCE
from optax_subspace._source_product import differentiated_twice


class Held(NamedTuple):
    """A value of a program that is an array of a kernel, or a part of one.

    Attributes:
      path: the parameter's.
      weight: whether it is of the weight, which may be cast.
      inner: how many of its last axes are those of one slice, which stay as they are.
      moved: the primitives that have moved its slices, and how along the axes in front; an
        ``Either`` where that depends on a branch.
    """

    path: str
    weight: bool
    inner: int
    moved: tuple[Any, ...] = ()


class Either(NamedTuple):
    """What branches have done to an array, each its ``moved``; None where it is replaced."""

    branches: tuple[tuple[Any, ...] | None, ...]


# Stands for the primitives of a derivative of a product.
_DERIVATIVE = "a derivative"


class Misuse(NamedTuple):
    """A kernel whose arrays are computed with, and the name of the primitive that does; none where
    they are the result, and ``AT_SOURCE`` where they come to the product moved apart."""

    held: Held
    primitive: str


def goes_through(names: str, how: str = "") -> TypeError:
    """Of a loss that computes with what stands in for kernels, ``how``."""
    return TypeError(
        f"the loss goes through the leaves of all parameters{how}, as a norm of them does or a "
        f"cast, and {names} are projected at the source, where their gradient is that of "
        "x @ kernel alone: leave them out of it (weight_decay= of the optimizer is what an "
        "L2 norm is for, kernel.astype casts one kernel), or project afterwards"
    )


def scaled_by_a_rule(names: str) -> TypeError:
    """Of a loss with a derivative rule for kernels, or for blocks that hold some."""
    return TypeError(
        f"the loss puts a derivative rule (jax.custom_vjp or custom_jvp) around {names}, projected "
        "at the source, where it would be applied to what is found for the basis as "
        "well: scale gradients by the optimizer (optax.scale, or multi_transform for some of them),"
        " leave the kernels of a block with a rule of its own at full rank by a rule of None, or "
        "project afterwards"
    )


def refusal(misuse: Misuse) -> TypeError:
    """What to do instead."""
    path, primitive = misuse.held.path, misuse.primitive
    if primitive in _OWN_RULES:
        return scaled_by_a_rule(path)
    if primitive == _DERIVATIVE:
        return differentiated_twice(path)
    if primitive == "select_n":
        return TypeError(
            f"the loss chooses between arrays of {path}, as a jax.lax.cond does "
            "under vmap whose predicate is one of each example, and it is projected at the "
            "source, where its gradient is that of x @ kernel alone: choose between the "
            "results, jnp.where(predicate, x @ kernel, other), or project afterwards"
        )
    if primitive == AT_SOURCE:
        return TypeError(
            f"the loss moves, freezes or replaces some of the arrays that {path} consists of at "
            "the source and not the others, as a filter of leaves by shape, size or dtype does: "
            "do the same to all, jax.tree.map(lambda w: w[i], kernel), or project afterwards"
        )
    return goes_through(path, f" (by {primitive})" if primitive else "")


# Primitives that leave slices as they are and where they are; that put them elsewhere; and
# `stop_gradient`, after which a gradient of zero is right.
_STAYS = (
    *("copy", "copy_p", "device_put", "mesh_cast", "name", "pcast", "pvary", "reshard"),
    "sharding_constraint",
)
_STOPS = "stop_gradient"
_MOVES = (
    *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "gather", "reshape"),
    *("rev", "slice", "split", "squeeze", "stack", "transpose", "unstack", _STOPS),
)
_OWN_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def first_misuse(jaxpr: Any, held: list[Held | None]) -> Misuse | None:
    """The first of the kernels whose arrays ``jaxpr`` computes with, or has for its result.

    Args:
      jaxpr: of a loss, before it is differentiated.
      held: what its arguments are.
    """
    found, out = _walk(jaxpr, held)
    # (Of results that follow the loss, of aux, there is no gradient to lose.)
    return found or (Misuse(out[0], "") if out and out[0] else None)


def _walk(jaxpr: Any, held: list[Held | None]) -> tuple[Misuse | None, list[Held | None]]:
    """A kernel that is computed with, and what the results are."""
    now = {v: h for v, h in zip(jaxpr.invars, held, strict=True) if h is not None}
    of = lambda v: None if isinstance(v, Literal) else now.get(v)
    for eqn in jaxpr.eqns:
        given = [of(v) for v in eqn.invars]
        some = next((h for h in given if h is not None), None)
        if some is None:
            continue
        name = eqn.primitive.name
        if eqn.params.get("name") == AT_SOURCE:
            if _is_stopped(eqn, given):
                continue
            if not _is_whole(eqn):
                return Misuse(some, _DERIVATIVE), []
            # (The first is what the kernel is multiplied by.)
            if given[0] is not None:
                return Misuse(given[0], "dot_general"), []
            if _moved_apart(eqn, given):
                return Misuse(some, AT_SOURCE), []
            continue
        found, out = _within(eqn, given)
        if out is None:
            if name == "optimization_barrier":
                out = given
            elif name in _STAYS:
                out = [some] * len(eqn.outvars)
            elif name in _MOVES and _moves_slices(eqn, given):
                how = _how_moved(eqn, given)
                out = [some._replace(moved=(*some.moved, how))] * len(eqn.outvars)
            elif name == "convert_element_type" and some.weight and _is_float(eqn.outvars[0]):
                out = [some]
            else:
                found = Misuse(some, name)
        elif name in _OWN_RULES and not _is_stopped(eqn, given):
            # The rule would be applied to what is found for the basis, too, if not by the block.
            found = Misuse(some, name)
        if found is not None:
            return found, []
        assert out is not None
        now.update({v: h for v, h in zip(eqn.outvars, out, strict=True) if h is not None})
    return None, [of(v) for v in jaxpr.outvars]


def _moved_apart(eqn: Any, given: list[Held | None]) -> bool:
    """Whether arrays that come to a product together were not all moved alike."""
    # (Keys and arrays without entries are left out of some of what is done to the others.)
    arrays = [
        (held, var)
        for held, var in zip(given[1:], eqn.invars[1:], strict=True)
        if var.aval.size and not jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)
    ]
    moved = {held and _without_stops(held.moved) for held, _ in arrays}
    # (Integers have no gradient to stop.)
    floats = {held and held.moved for held, var in arrays if _is_float(var)}
    return len(moved) > 1 or len(floats) > 1


def _is_whole(eqn: Any) -> bool:
    """Whether this is a product; else a part of its derivative, which the loss takes itself."""
    program = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    # (The derivative has one of `_once` alone.)
    return any(e.primitive.name in _OWN_RULES and len(e.invars) > 2 for e in program.eqns)


def _is_stopped(eqn: Any, given: list[Held | None]) -> bool:
    """Whether no gradient goes to a kernel by this equation."""
    floats = (h for h, v in zip(given, eqn.invars, strict=True) if h is not None and _is_float(v))
    return all((_STOPS,) in held.moved for held in floats)


def _without_stops(moved: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """What has moved an array, apart from ``stop_gradient``."""
    if moved is None:
        return None
    left: list[Any] = []
    for how in moved:
        if isinstance(how, Either):
            branches = [_without_stops(branch) for branch in how.branches]
            one = branches[0] if len(set(branches)) == 1 else None
            left += [Either(tuple(branches))] if one is None else one
        elif how[0] != _STOPS:
            left.append(how)
    return tuple(left)


# Parameters of primitives that move slices: lists of axes or sizes, and numbers of each axis.
_WHOLE = ("axis", "dimension", "dimensions", "sizes")
_BY_AXIS = ("limit_indices", "permutation", "slice_sizes", "start_indices", "strides")


def _how_moved(eqn: Any, given: list[Held | None]) -> tuple[Any, ...]:
    """The primitive, and what it does along the axes in front, as far as it is known."""
    at, held = next((i, h) for i, h in enumerate(given) if h is not None)
    first = len(eqn.invars[at].aval.shape) - held.inner
    of_axes = lambda value: tuple(value[:first]) if isinstance(value, tuple) else value
    params = eqn.params
    known = [(key, params[key]) for key in _WHOLE if key in params]
    known += [(key, of_axes(params[key])) for key in _BY_AXIS if key in params]
    if eqn.primitive.name == "dynamic_slice":
        starts = eqn.invars[at + 1 : at + 1 + first]
        known += [("start", int(v.val)) for v in starts if isinstance(v, Literal)]
    return (eqn.primitive.name, *known)


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _moves_slices(eqn: Any, given: list[Held | None]) -> bool:
    """Whether an equation leaves the last axes of what it moves, those of a slice, in place."""
    params, name = eqn.params, eqn.primitive.name
    for var, held in zip(eqn.invars, given, strict=True):
        if held is None or not held.inner:
            continue
        shape, inner = var.aval.shape, held.inner
        first = len(shape) - inner  # of the axes that stay
        if any(out.aval.shape[-inner:] != shape[-inner:] for out in eqn.outvars):
            return False
        # (With sizes alone the others tell: of slices, and of reshaped arrays.)
        rank = len(eqn.outvars[0].aval.shape)
        stay = tuple(range(rank - inner, rank))
        touched = [params[k] for k in ("axis", "dimension") if isinstance(params.get(k), int)]
        touched += params["dimensions"] if name in ("rev", "squeeze") else ()
        if any(axis >= first + (name == "stack") for axis in touched):
            return False
        for key in ("permutation", "broadcast_dimensions"):
            if key in params and tuple(params[key])[-inner:] != stay:
                return False
        if name == "gather":
            how = params["dimension_numbers"]
            # (An index under vmap has a start along each axis, which is 0 along whole ones.)
            clipped = params["mode"] == jax.lax.GatherScatterMode.CLIP
            taken = [*how.collapsed_slice_dims, *how.operand_batching_dims]
            for axis in how.start_index_map:
                if not clipped or params["slice_sizes"][axis] != shape[axis]:
                    taken.append(axis)
            if any(axis >= first for axis in taken) or how.offset_dims[-inner:] != stay:
                return False
    return True


def _within(eqn: Any, given: list[Any]) -> tuple[Misuse | None, list[Any] | None]:
    """``_walk`` of an equation that holds programs; results of None where it holds none."""
    params, name = eqn.params, eqn.primitive.name
    open_up = lambda program: getattr(program, "jaxpr", program)
    if name == "cond":
        branches = [_walk(open_up(branch), given[1:]) for branch in params["branches"]]
        found = next((f for f, _ in branches if f is not None), None)
        results = zip(*(out for _, out in branches), strict=True) if found is None else ()
        return found, [_of_branches(held) for held in results]
    if name == "while":
        at, n = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        found, carry = _settled(open_up(params["body_jaxpr"]), given[at:n], given[n:], [])
        return found or _walk(open_up(params["cond_jaxpr"]), given[:at] + carry)[0], carry
    if name == "scan":
        body: Any = open_up(params["jaxpr"])
        # (Versions of JAX tell in different ways what is carried. What is not has an axis less in
        # the body.)
        whole = lambda here, there: sum(
            len(a.aval.shape) == len(b.aval.shape) for a, b in zip(here, there, strict=True)
        )
        last = whole(eqn.invars, body.invars)
        first = last - whole(eqn.outvars, body.outvars)
        return _settled(body, given[:first], given[first:last], given[last:])
    for key in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr"):
        program: Any = open_up(params.get(key))
        if hasattr(program, "eqns") and len(program.invars) == len(given):
            return _walk(program, given)
    return None, None


def _of_branches(held: tuple[Held | None, ...]) -> Held | None:
    """What a branch's result is, by what it is in each."""
    one = next(filter(None, held), None)
    if one is None or all(h == one for h in held):
        return one
    return one._replace(moved=(Either(tuple(h and h.moved for h in held)),))


def _settled(
    program: Any, before: list[Any], carry: list[Any], after: list[Any]
) -> tuple[Misuse | None, list[Any]]:
    """``_walk`` of a loop's program, as often as what it carries holds more than a turn before."""
    while True:
        found, out = _walk(program, before + carry + after)
        if found is not None:
            return found, carry
        new = [old or h for old, h in zip(carry, out, strict=False)]
        if new == carry:
            return None, carry + out[len(carry) :]
        carry = new


def along_outer_axes(probes: Any, others: Any) -> Any:
    """``probes``, with an axis of their own along each of a ``vmap`` around the gradient.

    Within a loss an axis of examples is more tokens of one gradient; around it each has its own.
    """

    @jax.custom_batching.custom_vmap
    def tied(probes: Any, others: Any) -> Any:
        del others
        return probes

    @tied.def_vmap
    def _(size: int, batched: Any, probes: Any, others: Any) -> Any:
        whole = lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape))
        probes = jax.tree.map(whole, probes, batched[0])
        # (Again, for an axis around this one.)
        return tied(probes, others), jax.tree.map(lambda _: True, probes)

    others = [x for x in jax.tree.leaves(others) if isinstance(x, jax.Array)]
    # (Derivatives are `_once`'s to refuse.)
    return tied(probes, jax.lax.stop_gradient(others))


def along_no_other_axes(found: Any, probes: Any, value: Any) -> Any:
    """``found``, the cotangents of ``probes``, unless an axis around the loss is added up in them.

    Raises:
      TypeError: one is: of what the function has from outside of its arguments.
    """

    @jax.custom_batching.custom_vmap
    def checked(found: Any, probes: Any, value: Any) -> Any:
        del probes, value
        return found

    @checked.def_vmap
    def _(size: int, batched: Any, *given: Any) -> Any:
        del size
        if batched[2] and not any(jax.tree.leaves(batched[:2])):
            raise TypeError(
                "jax.vmap around a gradient at the source goes along an array that its function "
                "does not have as an argument: make it one (the gradients would be added up)"
            )
        return checked(*given), batched[0]

    return checked(found, probes, value) if found else found
