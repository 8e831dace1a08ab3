"""The same projection, spelled as members of ``optax.chain``.

``optax.chain`` initialises each member with the full parameters, so a member after
``subspace_project`` cannot tell the subspace's shapes from its argument. ``subspace_project``
therefore leaves them in a slot of this thread, and the very next ``in_subspace`` takes them if it
is initialised on the identical leaves. The slot holds shapes and weak references alone, and is
void once the state that was made with it is gone.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any, NamedTuple

import jax
import optax

from optax_subspace._bases import Subspace
from optax_subspace._handover import LowRankUpdate
from optax_subspace._leaves import LeafPlan
from optax_subspace._projected import is_projected
from optax_subspace._projection_state import ProjectionState
from optax_subspace._projectors import Projector
from optax_subspace._projectors._base import transformation
from optax_subspace._rules import Rules
from optax_subspace._subspace import init_inner, inner_update

_slot = threading.local()


class InSubspaceState(NamedTuple):
    """State of :func:`in_subspace` after a projection: the inner one, in subspace shape."""

    inner: optax.OptState


def subspace_project(
    rank: int = 128,
    *,
    projector: Projector | None = None,
    side: str = "shorter",
    scale: optax.ScalarOrSchedule = 1.0,
    rules: Rules | None = None,
    projector_dtype: Any = None,
    stagger: bool = False,
    moments: str = "keep",
    accumulate: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Projects gradients for the next member of the chain, which must be an ``in_subspace``.

    ``optax.chain(subspace_project(rank), in_subspace(inner))`` equals
    ``scale_by_subspace(inner, rank=rank)``, whose arguments these are.

    Args:
      rank, projector, side, scale, rules, projector_dtype, stagger, moments, accumulate, seed: see
        :func:`scale_by_subspace`. What comes next is not known here, so ``side="auto"`` counts the
        bytes of Adam's two moments.

    Returns:
      A transformation with state :class:`ProjectionState`. Its updates can be used by
      :func:`in_subspace` and by our ``scale_by_*`` alone.

    Raises:
      TypeError: at ``update``, by any other member that comes next.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_subspace import scale_by_adam, subspace_project
      >>> tx = optax.chain(
      ...     subspace_project(rank=2), scale_by_adam(), optax.scale_by_learning_rate(1e-2)
      ... )
      >>> tx.init({"w": jnp.ones((16, 8))})[1].inner.mu["w"].shape
      (16, 2)
    """
    subspace = Subspace(
        rank, projector, side, scale, rules, projector_dtype, stagger, moments, accumulate, seed
    )

    def init_fn(params):
        state, plans = subspace.init(params)
        leaves = tuple(_reference(x) for x in jax.tree.leaves(params))
        _slot.offer = _Offer(leaves, plans, _reference(state.steps))
        return state

    def update_fn(updates, state: ProjectionState, params=None, *, source=None, **extra_args):
        del params, extra_args
        _slot.offer = None
        handed, new_state = subspace.project(updates, state, source)
        structure: Any = jax.tree.structure(updates, is_leaf=is_projected)
        return structure.unflatten(handed), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_subspace(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` in the subspace of the ``subspace_project`` before it, and lifts the result.

    With no projection before it, it is ``inner``. Members that shall share one subspace go into
    one call: ``in_subspace(optax.chain(a, b))``.

    Args:
      inner: any optax transformation.

    Returns:
      A transformation whose state is :class:`InSubspaceState` after a projection, and the state of
      ``inner`` without one.

    Raises:
      ValueError: at ``init``, if this member sees fewer leaves than the projection before it, as
        within ``optax.masked``; at ``update``, if projection and state do not belong together.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_subspace import in_subspace, subspace_project
      >>> tx = optax.chain(subspace_project(rank=2), in_subspace(optax.trace(0.9)))
      >>> tx.init({"w": jnp.ones((16, 8))})[1].inner.trace["w"].shape
      (16, 2)
    """
    inner = transformation("in_subspace: inner", inner)

    def init_fn(params):
        plans = _take_offer(params)
        if plans is None:
            return inner.init(params)
        return InSubspaceState(init_inner(inner, params, plans))

    def update_fn(updates, state, params=None, **extra_args):
        _slot.offer = None
        structure: Any
        leaves, structure = jax.tree.flatten(updates, is_leaf=_is_handed)
        handed = [x for x in leaves if _is_handed(x)]
        if bool(handed) != isinstance(state, InSubspaceState) and leaves:
            raise ValueError(
                "in_subspace was initialised "
                + ("without" if handed else "with")
                + " a projection and is now updated "
                + ("with" if handed else "without")
                + " one: initialise the whole chain at once (again), on the parameters it will "
                "update, after dropping the state of any subspace_project that no in_subspace took"
            )
        if not handed:
            if isinstance(state, InSubspaceState):
                return updates, state
            return inner.update(updates, state, params, **extra_args)
        full, inner_state = inner_update(inner, handed, structure, state.inner, params, extra_args)
        return structure.unflatten(full), InSubspaceState(inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_adam(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_adam``, in the subspace if a ``subspace_project`` comes before it.

    Args:
      *args, **kwargs: those of ``optax.scale_by_adam``: ``b1``, ``b2``, ``eps``, ``eps_root``,
        ``mu_dtype``, ``nesterov``.

    Returns:
      ``in_subspace(optax.scale_by_adam(...))``.

    Example:
      >>> import jax.numpy as jnp
      >>> scale_by_adam(b1=0.95).init({"w": jnp.ones((4, 4))}).mu["w"].shape
      (4, 4)
    """
    return in_subspace(optax.scale_by_adam(*args, **kwargs))


def scale_by_lion(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_lion``, in the subspace if a ``subspace_project`` comes before it.

    Args:
      *args, **kwargs: those of ``optax.scale_by_lion``: ``b1``, ``b2``, ``mu_dtype``.

    Returns:
      ``in_subspace(optax.scale_by_lion(...))``.

    Example:
      >>> import jax.numpy as jnp
      >>> scale_by_lion().init({"w": jnp.ones((4, 4))}).mu["w"].shape
      (4, 4)
    """
    return in_subspace(optax.scale_by_lion(*args, **kwargs))


# optax.inject_hyperparams and the help of editors ask for the arguments by name. (Type checkers
# know no such attribute of a function.)
scale_by_adam.__signature__ = inspect.signature(optax.scale_by_adam)  # type: ignore[attr-defined]
scale_by_lion.__signature__ = inspect.signature(optax.scale_by_lion)  # type: ignore[attr-defined]


class _Offer(NamedTuple):
    """What ``subspace_project`` leaves for the next ``in_subspace``."""

    leaves: tuple[Any, ...]  # references to the leaves that the plans were made for
    plans: list[LeafPlan]
    state: Any  # reference to an array of the state that was made with them


def _is_handed(x: Any) -> bool:
    return isinstance(x, LowRankUpdate)


def _reference(x: Any) -> Any:
    """A callable that returns ``x`` while it lives. Strong for objects without weak references,
    which are shapes and Python numbers."""
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


def _take_offer(params: Any) -> list[LeafPlan] | None:
    """The plans for ``params``, if the last ``subspace_project`` was initialised on them."""
    offer: _Offer | None = getattr(_slot, "offer", None)
    _slot.offer = None
    if offer is None or offer.state() is None:
        return None
    leaves = jax.tree.leaves(params)
    offered = [reference() for reference in offer.leaves]
    if len(leaves) == len(offered) and all(a is b for a, b in zip(leaves, offered, strict=True)):
        return offer.plans
    if leaves and all(any(a is b for b in offered) for a in leaves):
        missing = [
            p.path
            for p, b in zip(offer.plans, offered, strict=True)
            if not any(a is b for a in leaves)
        ]
        raise ValueError(
            f"in_subspace is initialised on fewer parameters than the subspace_project before it: "
            f"{missing[0]} is missing. Put both under the same mask: "
            "optax.masked(optax.chain(subspace_project(rank=...), scale_by_adam()), mask). If they "
            "are of two chains, drop the state of the one without in_subspace first"
        )
    return None
