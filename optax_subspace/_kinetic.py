"""Kinetic energies: what sort of momentum method a Hamiltonian descent is."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_subspace._norms import (
    largest_entry,
    magnitude,
    matrix_axes,
    nuclear_norm,
    orthogonalized,
    p_norm,
    p_slope,
    share_of_largest,
)
from optax_subspace._projectors._base import check_count

# Muon's: five steps bring singular values above a hundredth of the norm to between 0.68 and 1.14.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Kinetic(NamedTuple):
    r"""A convex kinetic energy :math:`K(S)` of one leaf's momentum, with its damping.

    Attributes:
      energy: ``(momentum, nu, weights) -> ()``. ``nu`` is the running mean of the squared
        gradients, or None; ``weights`` are two scalars, ``1 - decay**steps`` of the momentum and of
        ``nu``: the part of a mean that is gradients and not the zeros that it began with.
      gradient: with the same arguments, :math:`\nabla K`, of the momentum's shape; None for
        ``jax.grad(energy)``.
      damping: :math:`a` in :math:`S' = (1 - a) S + a G`.
      lookahead: :math:`c` in the point :math:`(1 - c) S + c G` at which :math:`\nabla K` is taken;
        None for the damping, with which that point is :math:`S'`. Below the damping the theorem
        does not hold.
      squares: decay of the running mean of the squared gradients; None if there is none.
      bias_correction: with a ``lookahead``: that point as a sum of :math:`S'` and :math:`G`, of
        which the first is divided by ``1 - decay**(steps + 1)``, the second by
        ``1 - decay**steps``, as optax does for Nesterov's momentum; where it is the damping,
        :math:`S'` by ``1 - decay**steps``. The theorem holds once these are about one.

    Example:
      A kinetic energy of one's own is a convex function:

      >>> import jax.numpy as jnp
      >>> from optax_subspace import Kinetic, scale_by_hamiltonian_descent
      >>> huber = Kinetic(lambda s, *_: jnp.sum(jnp.sqrt(1 + s**2) - 1), damping=0.5)
      >>> tx = scale_by_hamiltonian_descent(huber)
      >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
      >>> [round(x, 4) for x in updates["w"].tolist()]
      [0.4472, 0.4472]
    """

    energy: Callable[..., jax.Array]
    gradient: Callable[..., jax.Array] | None = None
    damping: float = 0.1
    lookahead: float | None = None
    squares: float | None = None
    bias_correction: bool = False


def slope_of(kinetic: Kinetic) -> Callable[..., jax.Array]:
    """The gradient of a kinetic energy, derived where none is given."""
    return jax.grad(kinetic.energy) if kinetic.gradient is None else kinetic.gradient


def _once(function: Callable[..., Kinetic]) -> Callable[..., Kinetic]:
    """The same kinetic energy for the same numbers however spelled, so that two are equal."""
    signature = inspect.signature(function)
    made = functools.cache(function)

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Kinetic:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            return made(*bound.args, **bound.kwargs)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            return function(*args, **kwargs)

    return make


@_once
def heavy_ball(decay: float = 0.9) -> Kinetic:
    r"""Polyak's momentum, :math:`K(S) = \|S\|^2 / 2 (1 - d)`: equal to ``optax.trace(decay)``.

    ``state.mu`` is a mean, ``optax.trace``'s the sum :math:`S / (1 - d)`; so the two differ where
    ``decay`` itself follows a schedule.

    Args:
      decay: :math:`d`, of the momentum at each step.

    Returns:
      The kinetic energy, with damping :math:`1 - d`.

    Raises:
      ValueError: ``decay`` is not within [0, 1).

    Example:
      >>> heavy_ball(0.5).damping
      0.5

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, section 4.
    """
    _check_decay("heavy_ball: decay", decay)
    energy = lambda s, *_: jnp.sum(s**2) / (2 * (1 - decay))
    return Kinetic(energy, lambda s, *_: s / (1 - decay), damping=1 - decay)


@_once
def nesterov(decay: float = 0.9) -> Kinetic:
    r"""Nesterov's momentum: equal to ``optax.trace(decay, nesterov=True)``.

    The energy is that of :func:`heavy_ball`; its gradient is taken at
    :math:`d S' + (1 - d) G = d^2 S + (1 - d^2) G`.

    Args:
      decay: :math:`d`, of the momentum at each step.

    Returns:
      The kinetic energy, with damping :math:`1 - d`.

    Raises:
      ValueError: ``decay`` is not within [0, 1).

    Example:
      >>> nesterov(0.5).lookahead
      0.75

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, section 4.
    """
    _check_decay("nesterov: decay", decay)
    return heavy_ball(decay)._replace(lookahead=1 - decay**2)


@_once
def adam_kinetic(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    bias_correction: bool = True,
    eps_before_correction: bool = False,
) -> Kinetic:
    r"""Adam: :math:`K(S) = \sum S^2 / 2 (\sqrt{V} + \epsilon)`; equal to ``optax.scale_by_adam``.

    ``K`` changes with :math:`V`. The energy decreases nevertheless if
    :math:`\frac{\beta_1}{1 - \beta_1} (\beta_2^{-1/2} - 1) \le 2`, in continuous time
    :math:`1 - \beta_1 \ge (1 - \beta_2) / 4`.

    Args:
      b1, b2: decay of the momentum and of the squared gradients' mean.
      eps: :math:`\epsilon`.
      bias_correction: divide both means by ``1 - decay**steps``.
      eps_before_correction: add ``eps`` to the root of the uncorrected mean, as GaLore's code does.

    Returns:
      The kinetic energy, with damping :math:`1 - \beta_1`.

    Raises:
      ValueError: ``b1`` or ``b2`` is not within [0, 1), or ``eps`` not positive.

    Example:
      >>> adam_kinetic().squares
      0.999

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, section 4.
    """
    _check_decay("adam_kinetic: b1", b1)
    _check_decay("adam_kinetic: b2", b2)
    if not isinstance(eps, jax.Array) and not (_is_real(eps) and eps > 0):
        raise ValueError(f"adam_kinetic: eps must be positive, got {eps!r}")

    def gradient(s, nu, weights):
        of_s, of_nu = weights if bias_correction else (1.0, 1.0)
        if eps_before_correction:
            return s * jnp.sqrt(of_nu) / (of_s * (jnp.sqrt(nu) + eps))
        return (s / of_s) / (jnp.sqrt(nu / of_nu) + eps)

    energy = lambda s, nu, weights: jnp.sum(s * gradient(s, nu, weights)) / 2
    return Kinetic(energy, gradient, damping=1 - b1, squares=b2)


def lion_kinetic(b1: float = 0.9, b2: float = 0.99, *, smoothing: float = 0.0) -> Kinetic:
    r"""Lion, :math:`K(S) = \|S\|_1`: equal to ``optax.scale_by_lion``.

    Args:
      b1: of the momentum in the point whose sign is taken.
      b2: decay of the momentum.
      smoothing: :math:`\mu` of :math:`K(S) = \sum \sqrt{S^2 + \mu^2} - \mu`, whose gradient passes
        smoothly from -1 to 1; 0 is the sign.

    Returns:
      The kinetic energy, with damping :math:`1 - \beta_2`.

    Raises:
      ValueError: ``b1`` or ``b2`` is not within [0, 1), or ``smoothing`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> lion_kinetic().gradient(jnp.array([-3.0, 0.0, 0.5]), None, None).tolist()
      [-1.0, 0.0, 1.0]

    References:
      Chen et al., `Lion Secretly Solves Constrained Optimization
      <https://arxiv.org/abs/2310.05898>`_, 2023.
    """
    return lion_k(1, b1, b2, smoothing=smoothing)


def lion_k(
    norm: float | str,
    b1: float = 0.9,
    b2: float = 0.99,
    *,
    smoothing: float = 0.0,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    steps: int = 5,
    eps: float = 0.0,
    bias_correction: bool = False,
) -> Kinetic:
    r"""Lion with another norm as kinetic energy, whose gradient has length one in the dual norm.

    Leaves of two and more dimensions are matrices of their last two, each with a norm of its own;
    others are one vector, whose nuclear norm is the Frobenius norm. So a stack of vectors is one
    matrix ``(L, d)``, which :func:`fused_backward` takes for ``L`` vectors: give such leaves, and
    embeddings, a transformation of their own (``optax.partition``).

    ==================  ==================================================================
    ``norm``            gradient
    ==================  ==================================================================
    1                   the sign
    ``p`` above 1       :math:`\mathrm{sign}(S) |S|^{p-1} / \|S\|_p^{p-1}`
    ``inf``             the sign of the largest entry alone, shared where several are
    ``"frobenius"``     :math:`S / \|S\|_F`
    ``"nuclear"``       :math:`U V^\top` of :math:`S = U \Sigma V^\top`, by Newton-Schulz: Muon
    ==================  ==================================================================

    ``optax.contrib.scale_by_muon`` is
    ``lion_k("nuclear", beta**2, beta, eps=1e-8, bias_correction=True)``, and
    the same with ``beta`` for ``beta**2`` without Nesterov's momentum.

    Args:
      norm: see the table; ``"l1"``, ``"l2"`` and ``"linf"`` are names of three of them.
      b1: of the momentum in the point at which the gradient is taken.
      b2: decay of the momentum.
      smoothing: :math:`\mu`, for a gradient that passes smoothly through zero:
        :math:`\sqrt{x^2 + \mu^2}` takes the place of each magnitude (entries, singular values), a
        log-sum-exp of temperature :math:`\mu` that of the largest.
      coefficients: of the Newton-Schulz polynomial :math:`a x + b x^3 + c x^5`. With Muon's, the
        singular values of the update lie near one, without an end, so that it is not quite the
        energy's gradient; ``(1.875, -1.25, 0.375)`` converges to one with enough steps.
      steps: of Newton-Schulz.
      eps: added to the Frobenius norm by which Newton-Schulz begins; 0 keeps the update the same
        however small the momentum is.
      bias_correction: see :class:`Kinetic`.

    Returns:
      The kinetic energy, with damping :math:`1 - \beta_2`.

    Raises:
      TypeError: ``norm``, ``smoothing`` or ``steps`` is an array: they are static.
      ValueError: the norm is unknown, or below 1; ``b1`` or ``b2`` is not within [0, 1); a negative
        ``smoothing`` or ``eps``; no ``steps``; other than three ``coefficients``.

    Example:
      >>> import jax.numpy as jnp
      >>> muon = lion_k("nuclear", coefficients=(1.875, -1.25, 0.375), steps=12)
      >>> jnp.round(muon.gradient(jnp.array([[3.0, 0.0], [0.0, 0.5]]), None, None), 3).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References:
      Chen et al., `Lion Secretly Solves Constrained Optimization
      <https://arxiv.org/abs/2310.05898>`_, 2023, table 1; Jordan et al., `Muon
      <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    if isinstance(norm, str):
        norm = {"l1": 1.0, "l2": 2.0, "frobenius": 2.0, "linf": float("inf")}.get(norm, norm)
    return _lion_k(norm, b1, b2, smoothing, tuple(coefficients), steps, eps, bias_correction)


@_once
def _lion_k(
    norm: Any,
    b1: float,
    b2: float,
    smoothing: float,
    coefficients: Any,
    steps: int,
    eps: float,
    bias_correction: bool,
) -> Kinetic:
    _check_decay("lion_k: b1", b1)
    _check_decay("lion_k: b2", b2)
    check_count("lion_k: steps", steps)
    for name, number in (("norm", norm), ("smoothing", smoothing)):
        if isinstance(number, jax.Array):
            raise TypeError(
                f"lion_k: {name} must be a Python number, got {number!r}: it is static. Under "
                f"optax.inject_hyperparams pass static_args=({name!r}, ...)."
            )
    for name, number in (("smoothing", smoothing), ("eps", eps)):
        given = isinstance(number, jax.Array)
        if not given and not (_is_real(number) and 0 <= number < float("inf")):
            raise ValueError(f"lion_k: {name} must be a number of at least 0, got {number!r}")
    if len(coefficients) != 3:
        raise ValueError(f"lion_k: coefficients must be three numbers, got {coefficients!r}")
    mu = smoothing
    if norm == "nuclear":
        value = lambda s: nuclear_norm(s, mu)
        slope = lambda s: orthogonalized(s, mu, coefficients, steps, eps)
    elif not _is_real(norm) or not norm >= 1:
        raise ValueError(
            f"lion_k: unknown norm {norm!r}: give a number of at least 1, 'frobenius' or 'nuclear'"
        )
    elif norm == float("inf"):
        value, slope = (lambda s: largest_entry(s, mu)), (lambda s: share_of_largest(s, mu))
    elif norm == 1:
        value = lambda s: jnp.sum(magnitude(s, mu) - mu, axis=matrix_axes(s))
        slope = lambda s: s / magnitude(s, mu) if mu else jnp.sign(s)
    else:
        value, slope = (lambda s: p_norm(s, norm, mu)), (lambda s: p_slope(s, norm, mu))
    return Kinetic(
        lambda s, *_: jnp.sum(value(s)),
        lambda s, *_: slope(s),
        damping=1 - b2,
        lookahead=1 - b1,
        bias_correction=bias_correction,
    )


def _check_decay(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):  # a hyperparameter of optax.inject_hyperparams
        return
    if not _is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be within [0, 1), got {value!r}")


def _is_real(value: Any) -> bool:
    """Whether it is a number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
