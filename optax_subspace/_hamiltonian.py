"""Hamiltonian descent: momentum that is defined by its kinetic energy and its damping."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._describe import record
from optax_subspace._kinetic import Kinetic, slope_of
from optax_subspace._leaves import leaf_names
from optax_subspace._projection import compute_dtype
from optax_subspace._varying import varying_as


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
        default; the arithmetic is float32 (float64 for float64 parameters). Squares in bfloat16
        rise but hardly fall, as a decay of 0.999 is below its resolution: for bfloat16 parameters
        outside a subspace ask for ``nu_dtype=jnp.float32``.

    Returns:
      A transformation with state :class:`HamiltonianState`.

    Raises:
      TypeError: ``kinetic`` is no :class:`Kinetic`; ``mu_dtype`` or ``nu_dtype`` is no
        floating-point dtype; at ``init``, a complex or integer leaf.
      ValueError: ``damping``, or the kinetic's ``lookahead``, is no number within (0, 1], its
        ``squares`` none within [0, 1); a ``bias_correction`` whose look-ahead needs the momentum
        that a damping of one forgets.

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
    for name in ("damping", "lookahead", "squares"):
        _check_share(name, getattr(kinetic, name), optional=name != "damping")
    given = isinstance(kinetic.lookahead, numbers.Real) and kinetic.lookahead < 1
    if kinetic.bias_correction and given and _forgets(kinetic):
        raise ValueError(
            f"damping=1 keeps nothing of the momentum, of which a lookahead={kinetic.lookahead} "
            "with bias_correction takes a part: take a smaller damping"
        )
    for name, dtype in (("mu_dtype", mu_dtype), ("nu_dtype", nu_dtype)):
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} must be a floating-point dtype, got {jnp.dtype(dtype).name}: for 8 bits "
                "wrap the transformation in quantize_state"
            )
    slope = slope_of(kinetic)

    def init_fn(params):
        record([kinetic])
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"parameter {name} has dtype {jnp.result_type(leaf)}: a kinetic "
                    "energy is one of real floating-point numbers; mask it (optax.masked)"
                )

        def zeros(dtype):
            one = lambda p: varying_as(jnp.zeros(jnp.shape(p), dtype or jnp.result_type(p)), p)
            return jax.tree.map(one, params)

        nu = None if kinetic.squares is None else zeros(nu_dtype)
        return HamiltonianState(jnp.zeros([], jnp.int32), zeros(mu_dtype), nu)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def on_leaf(g, s, v):
            g = jnp.asarray(g)
            if not g.size:
                return g, s, v
            wide = g.astype(compute_dtype(g.dtype))
            s = s.astype(wide.dtype)
            new = _mean(s, wide, 1 - kinetic.damping)
            squares = None
            if v is not None:
                squares = _mean(v.astype(wide.dtype), wide**2, kinetic.squares)
            point = _point(kinetic, s, wide, new, count)
            weights = weights_of(kinetic, count, wide.dtype)
            return slope(point, squares, weights).astype(g.dtype), new, squares

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


def _check_share(name: str, value: Any, optional: bool) -> None:
    """Of the weight that a new gradient has in the momentum, or an old square in the squares."""
    if isinstance(value, jax.Array) or (optional and value is None):
        return
    within = "[0, 1)" if name == "squares" else "(0, 1]"
    number = isinstance(value, numbers.Real)
    if not number or not (0 <= value < 1 if name == "squares" else 0 < value <= 1):
        raise ValueError(f"{name} must be a number within {within}, got {value!r}")


def _forgets(kinetic: Kinetic) -> bool:
    return not isinstance(kinetic.damping, jax.Array) and kinetic.damping == 1


def _mean(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    return decay * old + (1 - decay) * new


def _point(
    kinetic: Kinetic, old: jax.Array, gradient: jax.Array, new: jax.Array, count: jax.Array
) -> jax.Array:
    """Where the kinetic energy's gradient is taken."""
    a, c = kinetic.damping, kinetic.lookahead
    if c is None:
        return new
    if not kinetic.bias_correction:
        return _mean(old, gradient, 1 - c)
    if not isinstance(c - a, jax.Array) and c == a:
        return new / weights_of(kinetic, count, new.dtype)[0]
    # A sum of the new mean and of the gradient, each without its bias.
    share = (1 - c) / (1 - a)
    ahead, now = (weights_of(kinetic, n, new.dtype)[0] for n in (count + 1, count))
    return share * new / ahead + (c - a * share) * gradient / now


def weights_of(kinetic: Kinetic, count: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What part of the momentum, and of the mean of squares, is gradients and not zeros."""
    t = count.astype(dtype)
    squares = 0.0 if kinetic.squares is None else kinetic.squares
    return 1 - (1 - kinetic.damping) ** t, 1 - squares**t
