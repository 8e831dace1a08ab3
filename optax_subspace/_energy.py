"""The energy of a momentum method, which falls whatever path its subspace takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize, is_quantized, without_variables
from optax_subspace._describe import recorded
from optax_subspace._fused_state import FusedState
from optax_subspace._gradient_scaling import GradientScalingState
from optax_subspace._hamiltonian import HamiltonianState, weights_of
from optax_subspace._kinetic import Kinetic, slope_of
from optax_subspace._leaves import LeafPlan, path_name
from optax_subspace._projection import compute_dtype
from optax_subspace._projection_state import ProjectionState


class Hamiltonian(NamedTuple):
    """An energy and its parts, scalars.

    Attributes:
      total: ``potential + kinetic``.
      potential: the loss.
      kinetic: of all leaves together, times learning rate and scale.
      predicted: what the damping takes from the total in the step that ended here, according to the
        theorem: ``learning_rate * scale * <S, grad K(S)>``. With a look-ahead the theorem's
        point lies between this momentum and the gradient.
      dissipation: what was taken: the total before minus this one; NaN if none was given.
    """

    total: jax.Array
    potential: jax.Array
    kinetic: jax.Array
    predicted: jax.Array
    dissipation: jax.Array


def hamiltonian(
    loss: jax.typing.ArrayLike,
    state: optax.OptState,
    tx: optax.GradientTransformation,
    params: optax.Params,
    learning_rate: jax.typing.ArrayLike,
    *,
    kinetic: Kinetic | None = None,
    previous: Hamiltonian | None = None,
) -> Hamiltonian:
    r"""The energy that a momentum method with this state cannot keep up.

    .. math::
      H(W, S) = L(W) + \eta \frac{1 - c}{a} \sum_i \alpha_i K(S_i)

    over all leaves, :math:`\alpha` being the scale of :func:`scale_by_subspace` where a leaf is
    projected, else one. It is a pure function, which may be traced, of the state between two steps:
    the loss is that of the parameters which the state's last update led to, on the same data each
    time. A learning rate or scale that changes also changes :math:`H`. Of Adam's squares in fewer
    than 32 bits, which may have been rounded away, the smallest stand in that its momentum allows.

    Args:
      loss: :math:`L(W)`, a scalar.
      state: of ``tx``, or of :func:`fused_backward` with it.
      tx: the transformation; chains, masks, subspaces and quantized state are looked into.
      params: the parameters; only shapes are read.
      learning_rate: :math:`\eta` of the last step, a scalar; of a schedule its value there.
      kinetic: the kinetic energy, for transformations that are not made by
        :func:`scale_by_hamiltonian_descent` and keep a running mean ``mu``, such as
        ``optax.scale_by_adam`` with ``adam_kinetic``.
      previous: the Hamiltonian of the step before.

    Returns:
      A :class:`Hamiltonian` of float32 scalars (float64 if a leaf is).

    Raises:
      TypeError: ``kinetic`` is no :class:`Kinetic`, ``previous`` no :class:`Hamiltonian`,
        ``learning_rate`` a schedule.
      ValueError: the state holds no momentum, several for one parameter, momenta of different
        kinetic energies, some of a transformation that does not tell its own, or those of
        :func:`scale_by_subspace_norms`; it is not the state of ``tx`` and ``params``; ``loss`` or
        ``learning_rate`` has a shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_subspace import heavy_ball, scale_by_hamiltonian_descent, scale_by_subspace
      >>> momentum = scale_by_hamiltonian_descent(heavy_ball(0.9))
      >>> tx = optax.chain(scale_by_subspace(momentum, rank=1), optax.scale(-0.01))
      >>> params = {"w": jnp.eye(4)}
      >>> loss, state, energy = lambda p: jnp.sum(p["w"] ** 2), tx.init(params), None
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(params), state)
      ...     params = optax.apply_updates(params, updates)
      ...     energy = hamiltonian(loss(params), state, tx, params, 0.01, previous=energy)
      >>> bool(energy.dissipation > 0), bool(energy.kinetic > 0)
      (True, True)
    """
    if kinetic is not None and not isinstance(kinetic, Kinetic):
        raise TypeError(f"kinetic must be a Kinetic such as heavy_ball(0.9), got {kinetic!r}")
    if previous is not None and not isinstance(previous, Hamiltonian):
        raise TypeError(f"previous must be what hamiltonian returned, got {previous!r}")
    if callable(learning_rate):
        raise TypeError(
            "hamiltonian: learning_rate must be a number, got a schedule: give its value at the "
            "last step, schedule(count - 1)"
        )
    for label, number in (("loss", loss), ("learning_rate", learning_rate)):
        if jnp.shape(number):
            raise ValueError(
                f"hamiltonian: {label} must be a scalar, got shape {jnp.shape(number)}"
            )
    with_plans, _ = recorded(tx, params)
    told = [k for k in with_plans if isinstance(k, Kinetic)]
    _check_alike(told, state)
    kinetic = _told(told, state) if kinetic is None else kinetic
    state = without_variables(state)
    scaled = lambda x: isinstance(x, GradientScalingState)
    if any(map(scaled, jax.tree.leaves(state, is_leaf=scaled))):
        raise ValueError(
            "hamiltonian: the state holds a GradientScalingState: APOLLO and Fira move weights by "
            "the gradient itself, not by the slope of a kinetic energy of their momenta, so that "
            "no such energy falls: measure another transformation"
        )
    scales = {p.path: p.scale for p in with_plans if isinstance(p, LeafPlan) and p.projected}
    found: list[str] = []
    energy, power = _energies(state, kinetic, scales, found)
    if not found:
        raise ValueError(
            "hamiltonian: the state holds no momentum (no field mu beside a count): it must be the "
            "state of a Hamiltonian descent, or of an optax transformation that keeps a mean mu"
        )
    for name in found:
        if found.count(name) > 1:
            raise ValueError(
                f"hamiltonian: {name} has two momenta: give the part of the state, and of tx, that "
                "holds the one which moves the weights"
            )
    c = kinetic.damping if kinetic.lookahead is None else kinetic.lookahead
    rate = jnp.asarray(learning_rate, energy.dtype)
    kinetic_part = rate * (1 - c) / kinetic.damping * energy
    potential = jnp.asarray(loss, energy.dtype)
    total = potential + kinetic_part
    lost = jnp.full([], jnp.nan, energy.dtype) if previous is None else previous.total - total
    return Hamiltonian(total, potential, kinetic_part, rate * power, lost)


def _told(kinetics: list[Kinetic], state: Any) -> Kinetic:
    """The one kinetic energy that the parts of a transformation tell of."""
    remedy = "give it, with the numbers that it has, as kinetic=, such as kinetic=adam_kinetic(b1)"
    if not kinetics:
        raise ValueError(
            "hamiltonian: tx holds no scale_by_hamiltonian_descent, which would tell the kinetic "
            f"energy of its momentum: {remedy} for optax.scale_by_adam"
        )
    injected = lambda x: hasattr(x, "hyperparams") and hasattr(x, "inner_state")
    for node in jax.tree.leaves(state, is_leaf=injected):
        if injected(node) and any(map(_is_momentum, _nodes(node.inner_state))):
            raise ValueError(
                "hamiltonian: optax.inject_hyperparams makes the kinetic energy anew at every "
                f"step, of what is in the state: {remedy}"
            )
    for node in _nodes(state):
        if _is_momentum(node) and not isinstance(node, HamiltonianState):
            raise ValueError(
                f"hamiltonian: the state holds a {type(node).__name__}, tx the momentum of a "
                "scale_by_hamiltonian_descent: give the state of this tx"
            )
    return kinetics[0]


def _check_alike(kinetics: list[Kinetic], state: Any) -> None:
    """One energy is that of one sort of momentum, whoever tells it."""
    remedy = "measure the parts of the state one by one, each with its own part of tx"
    # (Numbers of optax.inject_hyperparams are known at a step alone.)
    fixed = [k for k in kinetics if not any(isinstance(x, jax.Array) for x in k)]
    different = [k for i, k in enumerate(fixed) if k not in fixed[:i]]
    if len(different) > 1:
        raise ValueError(
            f"hamiltonian: tx holds momenta of {len(different)} different kinetic energies: "
            f"{remedy}"
        )
    sorts = list(dict.fromkeys(type(n).__name__ for n in _nodes(state) if _is_momentum(n)))
    if len(sorts) > 1:
        raise ValueError(
            f"hamiltonian: the state holds a {sorts[1]} beside a {sorts[0]}, momenta of different "
            f"transformations: {remedy}"
        )


def _nodes(state: Any) -> list[Any]:
    """The momenta of a state, those within fused states and not those of projectors."""
    is_part = lambda x: isinstance(x, ProjectionState) or _is_momentum(x)
    return jax.tree.leaves(state, is_leaf=is_part)


def _is_momentum(node: Any) -> bool:
    return {"mu", "count"} <= set(getattr(node, "_fields", ()))


def _energies(
    state: Any, kinetic: Kinetic, scales: dict[str, Any], found: list[str]
) -> tuple[jax.Array, jax.Array]:
    """``sum scale * K(S)`` and ``sum scale * <S, grad K(S)>`` of all momenta in a state."""
    # (A projection's rules may have momenta of their own, which move bases.)
    is_part = lambda x: isinstance(x, FusedState | ProjectionState) or _is_momentum(x)
    projected = _projected(state)
    total = power = jnp.zeros([], jnp.float32)
    for node in jax.tree.leaves(state, is_leaf=is_part):
        if isinstance(node, FusedState):
            of_layer = lambda layer: _energies(layer, kinetic, scales, found)
            parts = [jax.tree.map(jnp.sum, jax.vmap(of_layer)(node.layers))]
            parts += [_energies(node.rest, kinetic, scales, found)]
        elif _is_momentum(node):
            parts = list(_leaf_energies(node, kinetic, scales, projected, found))
        else:
            continue
        for k, p in parts:
            total, power = total + k, power + p
    return total, power


def _projected(state: Any) -> set[str]:
    """The paths of what the projections of a state project."""
    is_projection = lambda x: isinstance(x, FusedState | ProjectionState)
    nodes = jax.tree.leaves(state, is_leaf=is_projection)
    return {
        name
        for node in nodes
        if isinstance(node, ProjectionState) and isinstance(node.leaves, dict)
        for name in node.leaves
    }


def _leaf_energies(
    node: Any,
    kinetic: Kinetic,
    scales: dict[str, Any],
    projected: set[str],
    found: list[str],
) -> Iterator[tuple[jax.Array, jax.Array]]:
    slope = slope_of(kinetic)
    means = jax.tree_util.tree_leaves_with_path(dequantize(node.mu))
    squares: list[Any] = [None] * len(means)
    if kinetic.squares is not None:
        if getattr(node, "nu", None) is None:
            raise ValueError(
                "hamiltonian: the kinetic energy needs means of squares (nu), of which "
                f"{type(node).__name__} holds none: it is that of another transformation"
            )
        squares = jax.tree.leaves(node.nu, is_leaf=is_quantized)
    begun, last = node.count > 0, jnp.maximum(node.count - 1, 0)
    for (path, s), v in zip(means, squares, strict=True):
        name = path_name(path)
        found.append(name)
        if (name in scales) != (name in projected):
            there, missing = ("tx", "the state") if name in scales else ("the state", "tx")
            raise ValueError(
                f"hamiltonian: {name} is projected by {there} and not by {missing}: give the whole "
                "state of this tx, and the parameters of its init"
            )
        if not s.size:
            continue
        scale = scales.get(name, 1.0)
        scale = scale(last) if callable(scale) else scale  # of the step that ended here
        s = s.astype(compute_dtype(s.dtype))
        v = None if v is None else _squares(v, s, kinetic)
        weights = weights_of(kinetic, last + 1, s.dtype)
        energy, power = kinetic.energy(s, v, weights), jnp.sum(s * slope(s, v, weights))
        yield jnp.where(begun, scale * energy, 0), jnp.where(begun, scale * power, 0)


def _squares(stored: Any, mean: jax.Array, kinetic: Kinetic) -> jax.Array:
    """The mean of squares, where storage has rounded it away the least that there can be.

    By Cauchy and Schwarz ``(sum a d^k g_k)^2 <= sum (a d^k)^2 / w_k * sum w_k g_k^2`` with the
    weights ``w_k = (1 - b) b^k`` of the squares, which bounds any mean by its squares' mean.
    """
    squares = dequantize(stored).astype(mean.dtype)
    if not is_quantized(stored) and jnp.finfo(stored.dtype).bits >= 32:
        return squares  # and of moments that were turned, the bound does not hold
    a, b = kinetic.damping, kinetic.squares
    assert b is not None
    ratio = (1 - a) ** 2 / b
    factor = a**2 / (1 - b) / (1 - ratio)
    return jnp.where(ratio < 1, jnp.maximum(squares, mean**2 / factor), squares)
