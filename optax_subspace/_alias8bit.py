"""The ready optimizers with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from optax_subspace._alias import (
    galore,
    online_subspace_descent,
    scale_by_galore_adam,
    with_settings_of,
)
from optax_subspace._hamiltonian import scale_by_hamiltonian_descent
from optax_subspace._kinetic import adam_kinetic
from optax_subspace._lomo import decay_of
from optax_subspace._quantize import quantize_state


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    storage: dict[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``optax.adamw`` with moments kept in 8 bits, at full rank.

    Args:
      learning_rate: step size, a number or a schedule.
      b1, b2, eps: of Adam.
      weight_decay: decoupled decay, times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.
      storage: ``code``, ``block``, ``min_size`` and others of :func:`quantize_state`.

    Returns:
      The optimizer.

    References:
      Dettmers et al., `8-bit Optimizers <https://arxiv.org/abs/2110.02861>`_, 2021.

    Example:
      >>> import jax.numpy as jnp
      >>> state = adamw8bit(1e-3).init({"w": jnp.ones((64, 64))})
      >>> state[0].inner.mu["w"].codes.dtype.name
      'uint8'
    """
    return optax.chain(
        quantize_state(_scale_by_adam(b1, b2, eps), **storage or {}),
        decay_of(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Optax' own, whose energy can be measured."""
    return scale_by_hamiltonian_descent(adam_kinetic(b1, b2, eps))


@with_settings_of(galore, without=("inner", "mu_dtype", "nu_dtype"))
def galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    storage: dict[str, Any] | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """:func:`galore` with moments kept in 8 bits.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: dimension of the subspace.
      b1, b2, eps: of Adam.
      storage: ``code``, ``block``, ``min_size`` and others of :func:`quantize_state`.
      **settings: all else that :func:`galore` takes, ``projector_dtype`` among them, but ``inner``
        and the moments' dtypes.

    Returns:
      The optimizer.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3.

    Example:
      >>> import jax.numpy as jnp
      >>> state = galore_adamw8bit(1e-2, rank=32).init({"w": jnp.ones((64, 256))})
      >>> state[0].inner.inner.mu["w"].shape, state[0].inner.inner.mu["w"].codes.dtype.name
      ((32, 256), 'uint8')
    """
    inner = quantize_state(scale_by_galore_adam(b1, b2, eps), **storage or {})
    return galore(learning_rate, rank, inner=inner, **settings)


@with_settings_of(online_subspace_descent, without=("inner",))
def online_subspace_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    storage: dict[str, Any] | None = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """:func:`online_subspace_descent` with moments kept in 8 bits.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: dimension of the subspace.
      b1, b2, eps: of Adam.
      storage: ``code``, ``block``, ``min_size`` and others of :func:`quantize_state`.
      **settings: all else that :func:`online_subspace_descent` takes but ``inner``.

    Returns:
      The optimizer.

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024.

    Example:
      >>> import jax.numpy as jnp
      >>> state = online_subspace_adamw8bit(1e-2, rank=32).init({"w": jnp.ones((64, 256))})
      >>> state[0].inner.inner.nu["w"].layout.signed
      False
    """
    inner = quantize_state(_scale_by_adam(b1, b2, eps), **storage or {})
    return online_subspace_descent(learning_rate, rank, inner=inner, **settings)
