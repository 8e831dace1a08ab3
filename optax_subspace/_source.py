"""Projection at the source: low-rank gradients of kernels whose full gradient never exists."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._bases import Initialised, Subspace
from optax_subspace._blocks import without_variables
from optax_subspace._describe import recorded
from optax_subspace._leaves import LeafPlan, leaf_names
from optax_subspace._projected import Projected, SourceBasis
from optax_subspace._projection import compute_dtype
from optax_subspace._projection_state import LeafBasis, ProjectionState, check_state
from optax_subspace._projectors._base import NO_GRADIENT
from optax_subspace._schedule import LOOK_EVERY, NEVER, UNLESS_LOST, age_due
from optax_subspace._source_check import (
    Held,
    along_no_other_axes,
    along_outer_axes,
    first_misuse,
    goes_through,
    refusal,
    scaled_by_a_rule,
)
from optax_subspace._source_kernel import MARK_DTYPE, SourceKernel, mark
from optax_subspace._source_product import Probe, differentiated_twice
from optax_subspace._source_refresh import How, as_floats, from_floats
from optax_subspace._varying import refuse_unchecked_axes, varying_as


def subspace_value_and_grad(
    fun: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    refresh: bool = True,
) -> Callable[..., tuple[Any, Any, dict[str, SourceBasis]]]:
    r"""``jax.value_and_grad`` whose gradients of projected kernels are never formed.

    For a layer :math:`y = x W` with output cotangent :math:`d` the projected gradient is a product
    of two thin matrices,

    .. math::
      P^\top G = P^\top x^\top d = (x P)^\top d, \qquad G Q = x^\top (d Q),

    of ``2 t r (m + n)`` operations for ``t`` tokens where the gradient itself has ``2 t m n``. What
    rules that follow the gradient ask for, :math:`G (P^\top G)^\top = x^\top (d R^\top)`, is
    another two. With the basis on the input side :math:`x P` is all that is kept of ``x``.

    ``fun`` is called on parameters in which a stand-in takes the place of each projected kernel; it
    knows ``x @ kernel``, ``kernel.astype``, :func:`source_dot_general` and indices along its batch
    axes, also within ``scan``, ``vmap`` and ``jax.checkpoint``, and refuses what would lose its
    gradient: other uses, functions that go through all of the parameters, derivatives within the
    loss that depend on the kernel, derivative rules around it. To see that, it is traced a second
    time, without being differentiated. A kernel that is used several times, as by a loop over parts
    of the batch, would find a basis for each: it is skipped at every step, and counted.

    Args:
      fun: ``(params, *args) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      tx: the transformation whose state the bases are in.
      has_aux: as of ``jax.value_and_grad``.
      refresh: whether bases that are due are found in this pass, layer by layer: by a rule such as
        :func:`svd` from the full gradient of that layer alone. Between refreshes
        (:func:`steps_to_refresh` tells) a second compiled step with ``refresh=False`` keeps less of
        the activations. Before the first refresh that step has no basis: it skips the kernel.

    Returns:
      ``(params, state, *args, **kwargs) -> (value, gradients, source)``. Gradients of projected
      kernels are :class:`Projected` leaves; ``tx.update(gradients, state, params, source=source)``
      takes both.

    Raises:
      TypeError: a kernel is used in another way than above, or differentiated twice; or ``vmap``
        around the call goes along an array that is no argument of it.
      ValueError: at the call, ``state`` is not of ``tx``, a rule asks for what the source cannot
        give (the gradient's norm), or the arrays are on a mesh with explicit axes.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, whose gradients are projected
      after they were formed.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_subspace import galore
      >>> tx, params = galore(0.1, rank=2), {"w": jnp.eye(8, 4)}
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> @jax.jit
      ... def step(params, state, x):
      ...     value, grads, source = subspace_value_and_grad(loss, tx)(params, state, x)
      ...     updates, state = tx.update(grads, state, params, source=source)
      ...     return optax.apply_updates(params, updates), state, grads
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> params, state, grads = step(params, tx.init(params), x)
      >>> grads["w"].low.shape
      (8, 2)
    """

    def value_and_grad(params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        at_source = AtSource(tx, params, state, refresh)
        probes = along_outer_axes(at_source.probes, (params, state, args, kwargs))
        parts = probes, at_source.rest
        loss = lambda *parts: fun(at_source.merge(*parts), *args, **kwargs)
        differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=has_aux)
        with at_source.explained():
            at_source.check(lambda tree: fun(tree, *args, **kwargs))
            value, cotangents = differentiate(*parts)
        if has_aux:
            is_kernel = lambda x: isinstance(x, SourceKernel)
            array = lambda x: x.weight if is_kernel(x) else x
            value = value[0], jax.tree.map(array, value[1], is_leaf=is_kernel)
        scalar = value[0] if has_aux else value
        cotangents = along_no_other_axes(cotangents[0], probes, scalar), cotangents[1]
        return value, *at_source.collect(*cotangents)

    return value_and_grad


# Words of errors that come of a kernel that is a tree.
_OF_TREES = (
    *("vmap", "sharding_constraint", "tuple index", "pytree", "GetAttrKey"),
    *("ncompatible shapes", "Too many indices"),
)
# And of derivatives of derivatives.
_OF_DERIVATIVES = ("custom_lin", "custom_vjp_call", "custom_vjp function", "grad requires real")


class AtSource:
    """Parameters whose projected kernels are replaced by stand-ins.

    Attributes:
      probes: what is differentiated in place of those kernels, by path.
      rest: the other parameters, by path.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, state: Any, refresh: bool):
        refuse_unchecked_axes()
        leaves, self._structure = jax.tree.flatten(params)
        self._names = leaf_names(params)
        by_name = dict(zip(self._names, leaves, strict=True))
        found = _projections(tx, params, state)
        self._kernels = {n: _kernel(jnp.asarray(by_name[n]), *found[n], refresh) for n in found}
        self.probes = {name: kernel.probe for name, kernel in self._kernels.items()}
        self.rest = {name: leaf for name, leaf in by_name.items() if name not in found}

    def merge(self, probes: dict[str, Probe], rest: dict[str, Any]) -> Any:
        """The parameters' tree, with the stand-ins."""
        put = lambda name: dataclasses.replace(self._kernels[name], probe=probes[name])
        return self._tree(lambda name: put(name) if name in probes else rest[name])

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says what errors of JAX mean that come of a stand-in."""
        try:
            yield
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                f"The loss is traced to see what it does to {self._paths()}, projected at the "
                "source, outside of jax.jit and under jax.disable_jit, too: let nothing in it "
                "depend on values in Python (jax.lax.cond chooses; jax.debug_nans finds NaNs)."
            )
            raise
        except (TypeError, NotImplementedError) as error:
            self._explain(error)
            raise
        except (AssertionError, AttributeError, IndexError, ValueError) as error:
            if MARK_DTYPE in str(error):
                raise goes_through(self._paths()) from error
            if any(word in str(error) for word in _OF_TREES):
                error.add_note(
                    f"If it is about {self._paths()}, projected at the source: in the loss such a "
                    "kernel is a tree of arrays that have its batch axes in front and little else "
                    "in common. vmap and scan go along those axes alone, kernels that are "
                    "parameters of their own cannot be stacked or chosen from by a cond (choose "
                    "between results), and the names of leaves go on "
                    "below the parameter's; shardings are for the parameters given, not for a "
                    "kernel in the loss, and flax.linen.unbox takes its boxes off before."
                )
            raise

    def check(self, fun: Callable[[Any], Any]) -> None:
        """Refuses a function of the parameters that computes with the arrays of a stand-in.

        Those are all that a filter by shape or dtype sees of it, and neither the basis nor what is
        found for it may go into a loss.
        """

        def run(kernels: dict[str, SourceKernel], rest: dict[str, Any]) -> Any:
            found = fun(self._tree(lambda name: kernels[name] if name in kernels else rest[name]))
            return [x for x in jax.tree.leaves(found) if isinstance(x, jax.Array)]

        named = {n: dataclasses.replace(k, checked=True) for n, k in self._kernels.items()}
        with jax.disable_jit(False):  # products are named by it
            program = jax.make_jaxpr(run)(named, self.rest)
        held: list[Held | None] = [
            Held(name, path[0] == jax.tree_util.GetAttrKey("weight"), x.ndim - kernel.due.ndim)
            for name, kernel in sorted(self._kernels.items())
            for path, x in jax.tree_util.tree_leaves_with_path(kernel)
        ]
        held += [None] * len(jax.tree.leaves(self.rest))
        misused = first_misuse(program.jaxpr, held)
        if misused is not None:
            raise refusal(misused)

    def _paths(self) -> str:
        return ", ".join([*self._kernels][:5]) + ", ..." * (len(self._kernels) > 5)

    def _explain(self, error: Exception) -> None:
        """Raises what an error of JAX means where it met a stand-in."""
        names, said = self._paths(), str(error)
        # (Forward mode through a custom derivative, one within a derivative rule too; a derivative
        # with respect to all parameters.)
        if any(word in said for word in _OF_DERIVATIVES):
            raise differentiated_twice(names) from error
        if "float0" in said:
            raise scaled_by_a_rule(names) from error
        # (The second is of attributes that random keys do not have.)
        if MARK_DTYPE in said or "Cannot call abstract method" in said:
            raise goes_through(names) from error
        if SourceKernel.__name__ in said:
            raise TypeError(
                f"the loss uses one of {names} in another way than x @ kernel or "
                "source_dot_general, and they are projected at the source, where their gradient is "
                f"known for these alone ({said.splitlines()[0]}): change the layer, or leave "
                "the parameter at full rank by a rule of None"
            ) from error

    def collect(
        self, probes: dict[str, Probe], rest: dict[str, Any]
    ) -> tuple[Any, dict[str, SourceBasis]]:
        """The gradients, and what was found for the bases, from the cotangents of both parts."""

        def gradient(name: str) -> Any:
            if name not in probes:
                return rest[name]
            kernel = self._kernels[name]
            return Projected(probes[name].low, kernel.shape, kernel.dtype)

        source = {
            name: SourceBasis(
                found.products,
                # Nothing has passed by a kernel that was not used.
                tuple(jnp.where(found.uses > 0, e, NO_GRADIENT) for e in found.energies),
                found.bases,
                from_floats(found.rules, self._kernels[name].rules) if found.bases else (),
                found.done > 0,
                found.uses,
            )
            for name, found in probes.items()
        }
        return self._tree(gradient), source

    def _tree(self, leaf: Callable[[str], Any]) -> Any:
        return jax.tree.unflatten(self._structure, [leaf(name) for name in self._names])


def steps_to_refresh(state: optax.OptState) -> jax.Array:
    """How many steps can go by before a basis is due, an int32 scalar; 0 if one is now.

    A lower bound, since a leaf that is skipped takes its next basis later: read it after each
    refresh and again when that many steps are done. For rules that follow it is below ten: where a
    gradient has left the basis, one is due at the next age of the leaf that ten divides.

    Args:
      state: of a transformation of this library, chained, masked or wrapped.

    Returns:
      The steps, or the largest int32 if no basis is ever due.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_subspace import galore
      >>> tx, params = galore(0.1, rank=2, every=50), {"w": jnp.eye(8, 4)}
      >>> state = tx.init(params)
      >>> _, after = tx.update(params, state, params)
      >>> int(steps_to_refresh(state)), int(steps_to_refresh(after))
      (0, 49)
    """
    is_projection = lambda x: isinstance(x, ProjectionState)
    nodes = jax.tree.leaves(without_variables(state), is_leaf=is_projection)

    def left_of(leaf: LeafBasis) -> jax.Array:
        due = age_due(leaf.due)
        left = jnp.where(due == NEVER, NEVER, due - leaf.age)
        return jnp.min(jnp.where(due == UNLESS_LOST, -leaf.age % LOOK_EVERY, left))

    left = [
        left_of(leaf)
        for node in filter(is_projection, nodes)
        if isinstance(node.leaves, dict)
        for leaf in node.leaves.values()
        if leaf.due.size
    ]
    return jnp.maximum(jnp.min(jnp.stack([*left, jnp.int32(NEVER)])), 0)


def _projections(
    tx: optax.GradientTransformation, params: Any, state: Any
) -> dict[str, tuple[LeafPlan, LeafBasis, Subspace, jax.Array]]:
    """Of each projected leaf by its path: plan, basis, settings, whether it may be refreshed."""
    with warnings.catch_warnings():
        # Told when the state was initialised.
        warnings.simplefilter("ignore", UserWarning)
        facts, _ = recorded(tx, params)
    made = [fact for fact in facts if isinstance(fact, Initialised)]
    is_projection = lambda x: isinstance(x, ProjectionState)
    nodes = jax.tree.leaves(without_variables(state), is_leaf=is_projection)
    nodes = [n for n in nodes if is_projection(n)]
    if len(nodes) != len(made):
        raise ValueError(
            f"the state holds {len(nodes)} projections and the transformation makes {len(made)}: "
            "initialise the state with the same transformation"
        )
    found: dict[str, tuple[LeafPlan, LeafBasis, Subspace, jax.Array]] = {}
    for subspace, plans in made:
        # The one of these parameters: where transformations have names, trees sort them.
        paths = {plan.path for plan in plans}
        of_them = lambda n, p=paths: p == (set(n.skipped) if isinstance(n.skipped, dict) else set())
        node = nodes.pop(next((i for i, n in enumerate(nodes) if of_them(n)), 0))
        check_state(plans, node, subspace.accumulate, subspace.init_leaf)
        # As for full gradients: bases change with the first micro-batch.
        first = node.steps % subspace.accumulate == 0
        for plan in filter(lambda plan: plan.projected, plans):
            if plan.path in found:
                raise ValueError(
                    f"parameter {plan.path} is projected by two members of the transformation, and "
                    "its gradient at the source has one basis: project afterwards, or have the "
                    "later of them leave it alone by a rule of None"
                )
            found[plan.path] = plan, node.leaves[plan.path], subspace, first
    return found


def _kernel(
    weight: jax.Array,
    plan: LeafPlan,
    leaf: LeafBasis,
    subspace: Subspace,
    first: jax.Array,
    refresh: bool,
) -> SourceKernel:
    rule = plan.projector or subspace.projector
    if rule.follow is not None and rule.relative_to != "estimate":
        raise ValueError(
            f"parameter {plan.path}: its projector takes G G^T P relative to the exact norm of the "
            "gradient, which does not exist at the source: give it relative_to='estimate', or "
            "project afterwards"
        )
    if plan.batch != tuple(range(len(plan.batch))):
        raise ValueError(
            f"parameter {plan.path} of shape {weight.shape}: its batch axes {plan.batch} are not "
            "in front, where scan and vmap take the slices of a kernel that is projected at the "
            "source: move them there, leave it at full rank by a rule of None, or project "
            "afterwards"
        )
    # Axes of one slice, which scan or vmap leave of the kernel.
    kept = sorted(plan.reduction + plan.output)
    axes = lambda of: tuple(kept.index(a) for a in of)
    sizes = zip(plan.batch_shape, plan.batch_split, strict=True)
    split = tuple((size, parts) for size, parts in sizes if parts > 1)
    how = How(plan.path, plan.sides, axes(plan.reduction), axes(plan.output), rule, refresh, split)
    dtype = compute_dtype(weight.dtype)
    zeros = lambda shape: jnp.zeros(shape, dtype)
    per_slice = jnp.zeros(plan.batch_shape, jnp.float32)
    shapes = tuple(map(zeros, plan.basis_shapes))
    probe = Probe(
        low=zeros(plan.low_shape),
        products=shapes if rule.follow is not None else (),
        energies=(per_slice,) * len(plan.sides) if rule.follow is not None else (),
        bases=shapes if refresh else (),
        rules=jax.tree.map(jnp.zeros_like, as_floats(leaf.rule)) if refresh else (),
        done=per_slice,
        uses=per_slice,
    )
    # Devices of a shard_map that have kernels of their own have gradients of their own.
    probe = varying_as(probe, (weight, leaf))
    due = (leaf.age >= age_due(leaf.due)) & (first | (leaf.refreshes == 0))
    return SourceKernel(weight, leaf.bases, leaf.rule, due, probe, mark(plan.batch_shape), how)
