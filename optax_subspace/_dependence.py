"""Which gradients each leaf's update depends on, read off the traced update."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from optax_subspace._leaves import leaf_names
from optax_subspace._projection import IN_TURN

_Leaves = frozenset[int]  # indices of the gradients that a value depends on
_NONE: _Leaves = frozenset()
_JAX = os.path.join(os.path.dirname(jax.__file__), "")
# Transformations that only call others.
_WRAPPERS = ("chain", "named_chain", "masked", "partition", "with_extra_args_support")


def check_leaves_apart(tx: optax.GradientTransformation, params: Any, remedy: str) -> None:
    """Raises if the update of one leaf depends on the gradient or weight of another.

    It may do so by way of the state, at once or after some steps.

    Args:
      tx: the transformation.
      params: a tree; only shapes are read.
      remedy: the end of the message.

    Raises:
      ValueError: naming the transformation that mixes leaves, and two of them; or one that needs
        more than gradients and weights.
    """
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    unfit = "the transformation can't be used with plain gradients and weights"
    try:
        made, state = jax.make_jaxpr(lambda p: tx.init(p), return_shape=True)(params)
    except AttributeError as error:
        raise ValueError(f"{unfit} ({error}); {remedy}") from error
    try:
        update = lambda g, p, s: tx.update(g, s, p)
        traced, shapes = jax.make_jaxpr(update, return_shape=True)(params, params, state)
    except (TypeError, ValueError, AttributeError) as error:
        if missing := _missing(error):
            raise missing from None
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{unfit} alone ({said}); {remedy}") from error
    kept: Any = jax.tree.structure(state)
    if kept != jax.tree.structure(shapes[1]):
        raise ValueError(
            "the transformation's update returns a state of another structure than its init, as "
            f"that of optax.monitor, so that no compiled step can keep it; {remedy}"
        )
    count = len(jax.tree.leaves(params))
    own = [frozenset([i]) for i in range(count)]
    at_first: list[tuple[_Leaves, JaxprEqn]] = []
    in_state = flow(made.jaxpr, own, at_first)
    # Of all rounds: in the last ones the state has mixed already, and no equation does it anew.
    mixing = list(at_first)
    while True:  # until the state depends on no more leaves than a step before
        out = flow(traced.jaxpr, [*own, *own, *in_state], mixing)
        updates, after = out[:count], out[count:]
        grown = [a | b for a, b in zip(in_state, after, strict=True)]
        if grown == in_state:
            break
        in_state = grown
    paths = leaf_names(params)
    for i, leaves in enumerate(updates):
        for other in sorted(leaves - {i}):
            names = (_name(eqn) for found, eqn in mixing if found <= leaves)
            culprit = next((name for name in names if name), "the transformation")
            raise ValueError(
                f"{culprit} mixes leaves: the update of {paths[i]} depends on {paths[other]}, "
                f"whose gradient does not exist at the same time; {remedy}"
            )


def _missing(error: Exception) -> ValueError | None:
    """What it means that an update misses an argument, if that is the error."""
    pattern = r"(\S+?)(?:\.<locals>\S*)?\(\) missing \d+ required keyword-only arguments?: (.*)"
    found = re.search(pattern, str(error))
    return found and ValueError(
        f"{found[1]} needs {found[2]} at each update, which the fused step does not hand on: set "
        "the learning rate in the state between the steps, or use a plain step"
    )


def flow(
    jaxpr: Jaxpr, leaves_in: Sequence[_Leaves], mixing: list[tuple[_Leaves, JaxprEqn]]
) -> list[_Leaves]:
    """The leaves that each output of a program depends on; where they meet goes to ``mixing``."""
    known: dict[Any, _Leaves] = dict(zip(jaxpr.invars, leaves_in, strict=True))
    read = lambda x: _NONE if isinstance(x, Literal) else known.get(x, _NONE)
    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        results = _through(eqn, inputs, mixing)
        for var, leaves in zip(eqn.outvars, results, strict=True):
            known[var] = leaves
            if len(leaves) > 1 and not any(len(x) > 1 for x in inputs):
                mixing.append((leaves, eqn))
        if eqn.primitive.name in ("swap", "addupdate"):  # what is written into a mutable array
            known[eqn.invars[0]] = frozenset().union(*inputs)
    return [read(x) for x in jaxpr.outvars]


def _through(
    eqn: JaxprEqn, inputs: list[_Leaves], mixing: list[tuple[_Leaves, JaxprEqn]]
) -> list[_Leaves]:
    """The leaves that each result of an equation depends on."""
    name, params = eqn.primitive.name, eqn.params
    if params.get("name") == IN_TURN:  # orders the leaves' work, and passes no number on
        return inputs[:1]
    if name == "cond":
        chosen, operands = inputs[0], inputs[1:]
        branches = [flow(_program(b), operands, mixing) for b in params["branches"]]
        return [frozenset().union(chosen, *parts) for parts in zip(*branches, strict=True)]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        test, body, carry = inputs[:a], inputs[a : a + b], inputs[a + b :]

        def turn(carry: list[_Leaves]) -> list[_Leaves]:
            again = flow(_program(params["cond_jaxpr"]), [*test, *carry], mixing)[0]
            after = flow(_program(params["body_jaxpr"]), [*body, *carry], mixing)
            return [x | again for x in after]

        return _until_settled(turn, carry)
    # (Of a scan each result is taken to depend on all: which operands are carried is told in
    # different ways by the versions of JAX.)
    for value in params.values() if name != "scan" else ():
        inner = _program(value)
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(inputs):
            return flow(inner, inputs, mixing)
    return [frozenset().union(*inputs)] * len(eqn.outvars)


def _program(value: Any) -> Any:
    return value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _until_settled(step: Any, carry: list[_Leaves]) -> list[_Leaves]:
    while True:
        grown = [a | b for a, b in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _name(eqn: JaxprEqn) -> str:
    """The innermost transformation in whose ``init`` or ``update`` an equation was traced."""
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = traceback.frames if traceback is not None else ()
    called = ""
    for frame in frames:
        found = re.search(r"(\w+)\.<locals>\.(init|update)(_fn)?$", frame.function_name)
        if found and found[1] not in _WRAPPERS:
            return found[1]
        if found:  # what it calls is a transformation's, under a name of its own
            return called.replace("<lambda>", "")
        name = frame.function_name.partition(".<locals>")[0]
        if name not in _WRAPPERS and not frame.file_name.startswith(_JAX):
            called = name
    return ""
