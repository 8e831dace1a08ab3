"""Ready optimizers: projection, inner rule, decay and learning rate in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._leaves import Rules
from optax_subspace._projectors import Projector, svd
from optax_subspace._subspace import scale_by_subspace


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int | None = None,
    scale: optax.ScalarOrSchedule = 0.25,
    side: str = "shorter",
    projector: Projector | None = None,
    rules: Rules | None = None,
    inner: optax.GradientTransformation | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    projector_dtype: Any = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam whose moments live in a low-rank subspace of each gradient.

    Every ``every`` steps each projected matrix takes a new basis from the leading singular
    vectors of its gradient; the moments are kept. With :math:`R_t = P_t^\top G_t`,

    .. math::
      W_{t+1} = W_t - \eta \Bigl(\alpha P_t
          \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{M_t}{\sqrt{V_t} + \epsilon}
          + \lambda W_t \Bigr)

    :math:`\epsilon` is added before the bias correction of :math:`V_t`, as in the published code;
    ``optax.scale_by_adam`` adds it after. Give ``inner=optax.scale_by_adam()`` for that form.

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      rank: dimension of the subspace.
      every: steps from one basis to the next, 200 by default; not together with ``projector``.
      scale: factor :math:`\alpha` on the lifted update.
      side: side of the basis, ``shorter`` as in the published code; see :func:`plan`.
      projector: another rule than ``svd(every)``.
      rules: which leaves are projected, and how; see :func:`plan`.
      inner: another transformation than GaLore's Adam; ``b1``, ``b2``, ``eps``, ``mu_dtype`` and
        ``nu_dtype`` are then not used.
      b1, b2: decay rates of the first and second moment.
      eps: added to the root of the second moment.
      mu_dtype, nu_dtype: dtypes in which the moments are stored, float32 by default.
      projector_dtype: dtype in which the bases are stored, float32 by default.
      weight_decay: decoupled decay :math:`\lambda`, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      ValueError: ``every`` and ``projector`` given together, and what
        :func:`scale_by_subspace` raises.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = galore(learning_rate=0.1, rank=2, scale=1.0)
      >>> params = {"w": jnp.ones((8, 4))}
      >>> loss = lambda p: jnp.sum(p["w"] ** 2)
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.1 * 32)
      True
    """
    if every is not None and projector is not None:
        raise ValueError("galore: give every or projector, not both: projector=svd(every=...)")
    if projector is None:
        projector = svd(200 if every is None else every)
    if inner is None:
        inner = _scale_by_galore_adam(b1, b2, eps, mu_dtype, nu_dtype)
    return optax.chain(
        scale_by_subspace(
            inner,
            rank=rank,
            projector=projector,
            side=side,
            scale=scale,
            rules=rules,
            projector_dtype=projector_dtype,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_galore_adam(b1, b2, eps, mu_dtype, nu_dtype) -> optax.GradientTransformation:
    """Adam as in GaLore's code: epsilon is added before the bias correction."""

    def init_fn(params):
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype or p.dtype), params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(mu_dtype), zeros(nu_dtype))

    def update_fn(updates, state, params=None):
        del params
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g**2, updates, state.nu)
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        new = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        # The moments' storage dtypes are restored by scale_by_subspace.
        return new, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
