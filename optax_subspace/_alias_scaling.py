"""Optimizers whose gradients are scaled at full rank: APOLLO, APOLLO-Mini, Fira."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from optax_subspace._alias import (
    check_period,
    finished,
    scale_by_galore_adam,
    with_settings_of,
)
from optax_subspace._gradient_scaling import scale_by_subspace_norms
from optax_subspace._projectors import Projector, random_projection, svd
from optax_subspace._rules import Rules


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    every: int | None = None,
    projector: Projector | None = None,
    per: str = "channel",
    growth: float | None = 1.01,
    scale: optax.ScalarOrSchedule = 1.0,
    side: str = "shorter",
    rules: Rules | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    projector_dtype: Any = None,
    stagger: bool | None = None,
    moments: str = "keep",
    seed: int | None = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: gradients scaled channel by channel, by Adam in a random subspace.

    The update is the gradient itself at full rank, without momentum: what Adam's moments in the
    subspace tell is the size of each channel's step alone. The published rank is a quarter of the
    model's width.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: dimension of the random subspace.
      every: steps from one random basis to the next, 200 by default; not together with
        ``projector``.
      projector: another rule than ``random_projection(every, orthonormal=False)``. With orthonormal
        bases factors are ``sqrt(m / r)`` times as large.
      per, growth, scale, side, rules, projector_dtype, stagger, moments, seed: see
        :func:`scale_by_subspace_norms`.
      b1, b2, eps: of Adam in the subspace.
      weight_decay: decoupled decay, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      TypeError, ValueError: what :func:`scale_by_subspace_norms` raises, and ``every`` and
        ``projector`` given together.

    Example:
      >>> import jax.numpy as jnp
      >>> apollo(1e-2, rank=4).init({"w": jnp.ones((8, 32))})[0].inner.mu["w"].shape
      (4, 32)

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.
    """
    check_period("apollo", every, projector)
    if projector is None:
        projector = random_projection(200 if every is None else every, orthonormal=False)
    subspace = scale_by_subspace_norms(
        scale_by_galore_adam(b1, b2, eps),
        rank=rank,
        projector=projector,
        per=per,
        growth=growth,
        side=side,
        scale=scale,
        rules=rules,
        projector_dtype=projector_dtype,
        stagger=bool(stagger),
        moments=moments,
        seed=0 if seed is None else seed,
    )
    return finished(subspace, learning_rate, weight_decay, mask)


@with_settings_of(apollo, without=("rank", "per"))
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: optax.ScalarOrSchedule = 128**0.5,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: one factor for each matrix, from a random subspace of rank 1.

    Its state is two numbers for each row or column of a matrix, hardly more than that of plain
    gradient descent.

    Args:
      learning_rate: step size, a number or a schedule.
      scale: factor on the update, which makes up for the small rank.
      **settings: what :func:`apollo` takes, but ``rank`` and ``per``.

    Returns:
      The optimizer.

    Raises:
      TypeError, ValueError: what :func:`apollo` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> apollo_mini(1e-2).init({"w": jnp.ones((8, 32))})[0].inner.mu["w"].shape
      (1, 32)

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, section 4.2.
    """
    return apollo(learning_rate, 1, scale=scale, per="tensor", **settings)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int | None = None,
    projector: Projector | None = None,
    per: str = "channel",
    growth: float | None = 1.01,
    scale: optax.ScalarOrSchedule = 0.25,
    side: str = "shorter",
    rules: Rules | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    projector_dtype: Any = None,
    stagger: bool | None = None,
    moments: str = "keep",
    seed: int | None = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore's step, and what it leaves of the gradient scaled as Adam scales the rest.

    The residual is ``G - P P^T G``, as in the paper; the published code takes ``scale`` times the
    second term from it.

    Args:
      learning_rate: step size, a number or a schedule.
      rank: dimension of the subspace.
      every: steps from one basis to the next, 200 by default; not together with ``projector``.
      projector: another rule than ``svd(every)``, of orthonormal bases.
      scale: factor on the part of the update within the subspace.
      per, growth, side, rules, projector_dtype, stagger, moments, seed: see
        :func:`scale_by_subspace_norms`.
      b1, b2, eps: of Adam in the subspace.
      weight_decay: decoupled decay, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      TypeError, ValueError: what :func:`scale_by_subspace_norms` raises, and ``every`` and
        ``projector`` given together.

    Example:
      >>> import jax.numpy as jnp
      >>> fira(1e-2, rank=4).init({"w": jnp.ones((8, 32))})[0].norms["w"].shape
      ()

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, algorithm 1.
    """
    check_period("fira", every, projector)
    subspace = scale_by_subspace_norms(
        scale_by_galore_adam(b1, b2, eps),
        rank=rank,
        projector=svd(200 if every is None else every) if projector is None else projector,
        per=per,
        residual=True,
        growth=growth,
        side=side,
        scale=scale,
        rules=rules,
        projector_dtype=projector_dtype,
        stagger=bool(stagger),
        moments=moments,
        seed=0 if seed is None else seed,
    )
    return finished(subspace, learning_rate, weight_decay, mask)
