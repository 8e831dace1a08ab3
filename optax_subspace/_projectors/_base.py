"""The interface of a projector: a pure rule for one matrix."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_subspace._varying import varying_as

RELATIVE_TO = ("gradient", "estimate")
_SKETCHED = 8  # random directions, as many as a byte has bits
_LONGEST = 2**30  # a period, so that ages and what is added to them are numbers of 32 bits
# Stands for the energy within a basis where there is no gradient; below zero it is unknown.
NO_GRADIENT = -2.0


class Projector(NamedTuple):
    """A rule that finds the basis of one matrix' gradient, and may follow it from step to step.

    A rule sees one matrix ``G`` of shape ``(m, n)`` in float32, turned such that the basis
    ``P`` of shape ``(m, r)`` stands on its left; batches, the other side, the schedule and
    gradients that are not finite or zero are the caller's work. The rule's state holds arrays
    only.

    Attributes:
      init: ``(key, m, n, rank) -> state``.
      update: ``(gradient, basis, state) -> (basis, state)``, a new basis that serves from this very
        step on. The gradient is not zero and scaled such that its largest entry is 1 or -1. For
        the first basis of a leaf, ``basis`` is all zeros.
      every: ``update`` is applied at a leaf's first step and then every so many steps; None for
        the first step alone, and, if the rule follows, where the gradient has left the basis.
      follow: ``(product, basis, state) -> (basis, state)``, applied on every other step, with
        ``product = G G^T P / ||G||_F^2`` of shape ``(m, r)``. The basis that it returns serves from
        the next step on, so that each gradient is projected by a basis made from earlier ones, as
        the convergence theorem of Online Subspace Descent asks. None to keep the basis.
      relative_to: what ``product`` is relative to: ``gradient`` as above, or ``estimate``, of the
        same norm from what is known where the gradient is projected at the source, see
        :func:`squared_norm`.
      matrix_free: ``update`` reads its gradient by ``gradient @ a``, ``gradient.T``, ``a @
        gradient``, ``shape`` and ``dtype`` alone, so that it need not be formed at the source.
      orthonormal: whether bases are orthonormal, or nearly so, as turning moments needs them.
      cosine, longest: see :func:`adaptive_period`, which sets them; None for a constant period.

    Example:
      Rules of one's own: the rows of the gradient with the largest norm, found anew every ten
      steps, and a basis that follows the gradient by Oja's rule.

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_subspace import Projector, scale_by_subspace, svd
      >>> def largest_rows(gradient, basis, state):
      ...     rows = jnp.argsort(-jnp.linalg.norm(gradient, axis=1))[: basis.shape[1]]
      ...     return jax.nn.one_hot(rows, gradient.shape[0]).T, state
      >>> rows = Projector(lambda key, m, n, rank: (), largest_rows, every=10)
      >>> following = svd()._replace(
      ...     every=None,
      ...     follow=lambda product, basis, state: (jnp.linalg.qr(basis + product)[0], state),
      ... )
      >>> params = {"w": jnp.ones((8, 16))}
      >>> for rule in (rows, following):
      ...     tx = scale_by_subspace(optax.scale_by_adam(), rank=2, projector=rule)
      ...     print(tx.init(params).inner.mu["w"].shape)
      (2, 16)
      (2, 16)
    """

    init: Callable[[jax.Array, int, int, int], Any]
    update: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    every: int | None = 1
    follow: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]] | None = None
    relative_to: str = "gradient"
    matrix_free: bool = False
    orthonormal: bool = True
    cosine: float | None = None
    longest: int = 1


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless ``value`` is a Python integer of at least ``least``."""
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a Python int, not an array: it is static. Under "
            f"optax.inject_hyperparams pass static_args=({name!r}, ...)."
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_seed(name: str, value: Any) -> None:
    """Raises unless ``value`` is one integer, which may be traced."""
    # (An array where optax.inject_hyperparams has it in its state.)
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    if np.shape(value) or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raises unless ``value`` is a real number."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether it is one real number, which may be traced.

    Example:
      >>> is_number(1), is_number(True), is_number(jnp.float32(1)), is_number(jnp.ones(2))
      (True, False, True, False)
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        kinds = (jnp.floating, jnp.integer)
        return not value.shape and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return _is_real(value)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_projector(name: str, rule: Any) -> None:
    """Raises unless ``rule`` is a :class:`Projector`, whose period is none or a count."""
    if not isinstance(rule, Projector):
        raise TypeError(f"{name} must be a Projector such as svd(every=200), got {rule!r}")
    if rule.every is None:
        return
    check_count(f"{name}: every", rule.every)
    if rule.every * rule.longest > _LONGEST:
        raise ValueError(
            f"{name}: every must be at most {_LONGEST} steps, got {rule.every}: give every=None to "
            "keep the first basis"
        )
    if rule.every == 1 and rule.follow is not None:
        raise ValueError(
            f"{name}: with every=1 each step has a new basis by update and follow is never called: "
            "give every=None"
        )


def transformation(name: str, given: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation that takes extra arguments; raises TypeError for what is none."""
    if not (hasattr(given, "init") and hasattr(given, "update")):
        raise TypeError(
            f"{name} must be an optax transformation such as optax.scale_by_adam(), got {given!r}"
        )
    return optax.with_extra_args_support(given)


def check_relative_to(rule: str, value: str) -> str:
    """``value``, which has to be a known one of :class:`Projector`'s ``relative_to``."""
    if value not in RELATIVE_TO:
        raise ValueError(
            f"{rule}: relative_to must be one of {', '.join(RELATIVE_TO)}, got {value!r}"
        )
    return value


def directions(columns: int, dtype: Any) -> jax.Array:
    """The random signs ``(n, 8)`` by which :func:`squared_norm` sees a gradient."""
    # (From one constant byte a row, so that no step draws them again.)
    drawn = np.frombuffer(np.random.default_rng(0).bytes(columns), np.uint8)
    bits = jnp.asarray(drawn)[:, None] >> jnp.arange(_SKETCHED, dtype=jnp.uint8)[None]
    return 1 - 2 * (bits & 1).astype(dtype)


def squared_norm(
    low: jax.Array, seen: jax.Array, basis: jax.Array, directions: jax.Array
) -> jax.Array:
    r"""An estimate of ``||G||_F^2`` that does not need ``G``, unbiased for an orthonormal ``P``.

    .. math::
      \lVert P^\top G \rVert_F^2 + \tfrac{1}{8} \lVert (I - P P^\top) G \Omega \rVert_F^2

    Its first part, most of it as a rule, is exact.

    Args:
      low: ``P^T G``, ``(r, n)``.
      seen: ``G Omega``, ``(m, 8)``.
      basis: ``P``, ``(m, r)``.
      directions: ``Omega``, ``(n, 8)``, of independent signs.

    References:
      Meyer et al., `Hutch++ <https://arxiv.org/abs/2010.09649>`_, 2021, whose splitting it is.
    """
    rest = seen - basis @ (low @ directions)
    squared = lambda x: jnp.sum(x**2, axis=(-2, -1))
    return squared(low) + squared(rest) / _SKETCHED


def basis_of(rule: Projector, gradient: jax.Array, basis: jax.Array) -> jax.Array:
    """The basis ``(m, r)`` that a rule begins with, whose own state nobody keeps."""
    m, n = gradient.shape
    state = rule.init(jax.random.key(0), m, n, basis.shape[1])
    # (A product, since at the source a gradient may be known by its products alone.)
    like = (gradient @ jnp.zeros((n, 1), basis.dtype), basis)
    return rule.update(gradient, basis, varying_as(state, like))[0]


# The axis of `jax.vmap` over which the layers of a fused backward pass are initialised.
LAYER_AXIS = "layers of fused_backward"


def key_of(seed: int, name: str) -> jax.Array:
    """A random key for what has this name, another one for each layer where they are initialised
    at once."""
    number = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest())
    key = jax.random.fold_in(jax.random.key(seed), number)
    try:
        return jax.random.fold_in(key, jax.lax.axis_index(LAYER_AXIS))
    except NameError:  # there is no such axis around
        return key
