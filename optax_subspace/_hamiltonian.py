"""Hamiltonian descent: momentum defined by its kinetic energy, and the energy that it loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize, is_variable
from optax_subspace._describe import record, recorded
from optax_subspace._kinetic import Kinetic
from optax_subspace._layerwise import FusedState
from optax_subspace._leaves import LeafPlan, path_name
from optax_subspace._projection import compute_dtype
from optax_subspace._projection_state import ProjectionState


class HamiltonianState(NamedTuple):
    """State of :func:`scale_by_hamiltonian_descent`.

    Attributes:
      count: int32 scalar, steps done.
      mu: the momentum, of the parameters' shapes.
      nu: running mean of the squared gradients; None if the kinetic energy needs none.
    """

    count: jax.Array  # type: ignore[assignment]  # optax names it so too
    mu: optax.Updates
    nu: optax.Updates | None


def scale_by_hamiltonian_descent(
    kinetic: Kinetic,
    damping: float | None = None,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Momentum with a kinetic energy :math:`K` and a damping :math:`a`.

    .. math::
      S_{t+1} = (1 - a) S_t + a G_t, \qquad
      U_t = \nabla K\bigl((1 - c) S_t + c\, G_t\bigr)

    With :math:`W_{t+1} = W_t - \eta U_t` and a convex :math:`K` whose least value is at zero, what
    :func:`hamiltonian` measures, :math:`H = L(W) + \eta \frac{1 - c}{a} K(S)`, changes by no more
    than :math:`-\eta \langle P, \nabla K(P) \rangle + O(\eta^2)` in a step, :math:`P` being the
    point, if :math:`c \ge a`; and so it does within :func:`scale_by_subspace` whatever path the
    bases take. See ``docs/hamiltonian.md``.

    Args:
      kinetic: :func:`heavy_ball`, :func:`nesterov`, :func:`adam_kinetic`, :func:`lion_kinetic`,
        :func:`lion_k`, or a :class:`Kinetic` of one's own.
      damping: :math:`a`, the kinetic's own by default.
      mu_dtype, nu_dtype: dtypes in which momentum and squares are stored, the parameters' by
        default; the arithmetic is float32 (float64 for float64 parameters).

    Returns:
      A transformation with state :class:`HamiltonianState`.

    Raises:
      TypeError: ``kinetic`` is no :class:`Kinetic`.
      ValueError: ``damping`` or the kinetic's ``lookahead`` is not within (0, 1].

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_subspace import heavy_ball, subspace_project, in_subspace
      >>> momentum = scale_by_hamiltonian_descent(heavy_ball(decay=0.9))
      >>> tx = optax.chain(subspace_project(rank=2), in_subspace(momentum), optax.scale(-0.1))
      >>> tx.init({"w": jnp.ones((8, 4))})[1].inner.mu["w"].shape
      (8, 2)

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, section 4;
      Maddison et al., `Hamiltonian Descent Methods <https://arxiv.org/abs/1809.05042>`_, 2018.
    """
    if not isinstance(kinetic, Kinetic):
        raise TypeError(f"kinetic must be a Kinetic such as heavy_ball(0.9), got {kinetic!r}")
    if damping is not None:
        kinetic = kinetic._replace(damping=damping)
    for name in ("damping", "lookahead"):
        value = getattr(kinetic, name)
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise ValueError(f"{name} must be within (0, 1], got {value}")
    slope = jax.grad(kinetic.energy) if kinetic.gradient is None else kinetic.gradient
    c = kinetic.damping if kinetic.lookahead is None else kinetic.lookahead

    def init_fn(params):
        record([kinetic])
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype or p.dtype), params)
        nu = None if kinetic.squares is None else zeros(nu_dtype)
        return HamiltonianState(jnp.zeros([], jnp.int32), zeros(mu_dtype), nu)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        weights = _weights(kinetic, count)

        def on_leaf(g, s, v):
            wide = g.astype(compute_dtype(g.dtype))
            s = s.astype(wide.dtype)
            new = _mean(s, wide, 1 - kinetic.damping)
            point = new if kinetic.lookahead is None else _mean(s, wide, 1 - c)
            squares = None
            if v is not None:
                squares = _mean(v.astype(wide.dtype), wide**2, kinetic.squares)
            update = slope(point, squares, weights).astype(g.dtype)
            return update, new, squares

        structure: Any = jax.tree.structure(updates)
        leaves = structure.flatten_up_to(updates)
        mu = structure.flatten_up_to(state.mu)
        nu = [None] * len(mu) if state.nu is None else structure.flatten_up_to(state.nu)
        results = [on_leaf(*row) for row in zip(leaves, mu, nu, strict=True)]
        stored = lambda i, old: structure.unflatten(
            [row[i].astype(x.dtype) for row, x in zip(results, old, strict=True)]
        )
        new_state = HamiltonianState(
            count, stored(1, mu), None if state.nu is None else stored(2, nu)
        )
        return structure.unflatten([row[0] for row in results]), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def _mean(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    return decay * old + (1 - decay) * new


def _weights(kinetic: Kinetic, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What part of the momentum, and of the mean of squares, is gradients and not zeros."""
    t = count.astype(jnp.float32)
    squares = 0.0 if kinetic.squares is None else kinetic.squares
    return 1 - (1 - kinetic.damping) ** t, 1 - squares**t


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
    time. A learning rate that changes also changes :math:`H`.

    Args:
      loss: :math:`L(W)`.
      state: of ``tx``, or of :func:`fused_backward` with it.
      tx: the transformation; chains, masks, subspaces and quantized state are looked into.
      params: the parameters; only shapes are read.
      learning_rate: :math:`\eta` of the last step.
      kinetic: the kinetic energy, for transformations that are not made by
        :func:`scale_by_hamiltonian_descent` and keep a running mean ``mu``, such as
        ``optax.scale_by_adam`` with ``adam_kinetic``.
      previous: the Hamiltonian of the step before.

    Returns:
      A :class:`Hamiltonian` of float32 scalars (float64 if a leaf is).

    Raises:
      ValueError: the state holds no momentum, several for one parameter, or momenta of different
        kinetic energies.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_subspace import heavy_ball, scale_by_subspace
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
    with_plans, _ = recorded(tx, params)
    if kinetic is None:
        kinetic = _only(k for k in with_plans if isinstance(k, Kinetic))
    # NNX keeps each array of a state in a variable.
    state = jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, state, is_leaf=is_variable
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


def _only(kinetics: Iterator[Kinetic]) -> Kinetic:
    different = list({id(k): k for k in kinetics}.values())
    if len(different) == 1:
        if isinstance(different[0].damping, jax.core.Tracer):
            raise ValueError(
                "hamiltonian: tx makes its kinetic energy anew at every step, of hyperparameters "
                "in its state: give it with the numbers that they had, as kinetic="
            )
        return different[0]
    if different:
        raise ValueError(
            f"hamiltonian: tx holds momenta of {len(different)} different kinetic energies: "
            "measure the parts of the state one by one, each with its own part of tx"
        )
    raise ValueError(
        "hamiltonian: tx holds no scale_by_hamiltonian_descent: give the kinetic energy of its "
        "momentum, such as kinetic=adam_kinetic(b1, b2, eps) for optax.scale_by_adam"
    )


def _energies(
    state: Any, kinetic: Kinetic, scales: dict[str, Any], found: list[str]
) -> tuple[jax.Array, jax.Array]:
    """``sum scale * K(S)`` and ``sum scale * <S, grad K(S)>`` of all momenta in a state."""
    # (A projection's rules may have momenta of their own, which move bases.)
    is_part = lambda x: isinstance(x, FusedState | ProjectionState) or hasattr(x, "mu")
    steps = _steps(state)
    total = power = jnp.zeros([], jnp.float32)
    for node in jax.tree.leaves(state, is_leaf=is_part):
        if isinstance(node, FusedState):
            of_layer = lambda layer: _energies(layer, kinetic, scales, found)
            parts = [jax.tree.map(jnp.sum, jax.vmap(of_layer)(node.layers))]
            parts += [_energies(node.rest, kinetic, scales, found)]
        elif hasattr(node, "mu"):
            parts = list(_leaf_energies(node, kinetic, scales, steps, found))
        else:
            continue
        for k, p in parts:
            total, power = total + k, power + p
    return total, power


def _steps(state: Any) -> dict[str, jax.Array]:
    """Gradients seen by the projections of a state, by the paths of what they project."""
    is_projection = lambda x: isinstance(x, FusedState | ProjectionState)
    nodes = jax.tree.leaves(state, is_leaf=is_projection)
    return {
        name: node.steps
        for node in nodes
        if isinstance(node, ProjectionState) and isinstance(node.leaves, dict)
        for name in node.leaves
    }


def _leaf_energies(
    node: Any,
    kinetic: Kinetic,
    scales: dict[str, Any],
    steps: dict[str, jax.Array],
    found: list[str],
) -> Iterator[tuple[jax.Array, jax.Array]]:
    slope = jax.grad(kinetic.energy) if kinetic.gradient is None else kinetic.gradient
    means = jax.tree_util.tree_leaves_with_path(dequantize(node.mu))
    squares: list[Any] = [None] * len(means)
    if kinetic.squares is not None:
        squares = jax.tree.leaves(dequantize(node.nu))
    begun = node.count > 0
    weights = _weights(kinetic, jnp.maximum(node.count, 1))
    for (path, s), v in zip(means, squares, strict=True):
        name = path_name(path)
        found.append(name)
        scale = scales[name] if name in steps else 1.0
        if callable(scale):
            scale = scale(jnp.maximum(steps[name] - 1, 0))  # of the step that ended here
        s = s.astype(compute_dtype(s.dtype))
        v = None if v is None else v.astype(s.dtype)
        energy, power = kinetic.energy(s, v, weights), jnp.sum(s * slope(s, v, weights))
        yield jnp.where(begun, scale * energy, 0), jnp.where(begun, scale * power, 0)
