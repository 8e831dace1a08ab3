"""Ready optimizers: projection, inner rule, decay and learning rate in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._leaves import Rules
from optax_subspace._projectors import Projector, history_pca, svd
from optax_subspace._quantize import quantize_state
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
    stagger: bool | None = None,
    moments: str = "keep",
    accumulate: int | None = None,
    seed: int | None = None,
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
      projector_dtype: how the bases are stored, in float32 by default; see
        :func:`scale_by_subspace`.
      stagger, moments, accumulate, seed: see :func:`scale_by_subspace`, whose defaults None stands
        for; decay and schedule take one step per ``accumulate`` gradients.
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
    return _optimizer(
        inner,
        learning_rate,
        weight_decay,
        mask,
        accumulate,
        rank=rank,
        projector=projector,
        side=side,
        scale=scale,
        rules=rules,
        projector_dtype=projector_dtype,
        stagger=bool(stagger),
        moments=moments,
        seed=seed or 0,
    )


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    projector: Projector | None = None,
    scale: optax.ScalarOrSchedule = 0.25,
    side: str = "shorter",
    rules: Rules | None = None,
    inner: optax.GradientTransformation | None = None,
    projector_dtype: Any = None,
    stagger: bool | None = None,
    moments: str | None = None,
    accumulate: int | None = None,
    seed: int | None = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Online Subspace Descent: a basis that follows each gradient, with no SVD after the first.

    .. math::
      W_{t+1} = W_t - \eta \bigl(\alpha P_t \, \mathrm{inner}(P_t^\top G_t) + \lambda W_t\bigr),
      \qquad P_{t+1} = \mathrm{OnlinePCA}(P_t, G_t)

    It converges for any rule that moves the basis when ``inner`` is a Hamiltonian descent, as
    Adam, Lion and momentum are. The published code is ``projector=online_pca(optax.adamw(1 / 200,
    weight_decay=0.01), orthogonality=0.0, relative=False)`` with ``inner=galore``'s Adam; its
    learning rate follows the weights' with :func:`tied_rate`.

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      rank: dimension of the subspace.
      projector: the rule; :func:`history_pca` by default, with ``moments="project"``: of all rules
        that follow, the two together gave the lowest loss of a small LLaMA, and captured most of
        its gradients but for the rule alone. :func:`online_pca` as published, :func:`oja`, or one
        of your own.
      scale: factor :math:`\alpha` on the lifted update.
      moments: ``keep``, ``project`` or ``reset``; by default ``project`` with the default rule and
        ``keep``, as published, with another.
      side, rules, projector_dtype, stagger, accumulate, seed: see :func:`scale_by_subspace`.
      inner: transformation in the subspace, ``optax.scale_by_adam(eps=1e-6)`` by default.
      weight_decay: decoupled decay :math:`\lambda`, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      ValueError: what :func:`scale_by_subspace` raises.

    References:
      Liang et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024, equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = online_subspace_descent(learning_rate=0.1, rank=2)
      >>> params = {"w": jnp.ones((8, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["w"].shape
      (8, 4)
    """
    if moments is None:
        moments = "project" if projector is None else "keep"
    return _optimizer(
        optax.scale_by_adam(eps=1e-6) if inner is None else inner,
        learning_rate,
        weight_decay,
        mask,
        accumulate,
        rank=rank,
        projector=history_pca() if projector is None else projector,
        side=side,
        scale=scale,
        rules=rules,
        projector_dtype=projector_dtype,
        stagger=bool(stagger),
        moments=moments,
        seed=seed or 0,
    )


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
        quantize_state(optax.scale_by_adam(b1, b2, eps), **storage or {}),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _with_settings_of(alias: Callable[..., Any], without: Sequence[str]) -> Callable[[Any], Any]:
    """Shows the keywords of ``alias`` in place of ``**settings`` in the function's signature.

    (``optax.inject_hyperparams`` takes every argument by its name there.)
    """

    def show(function):
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind != p.VAR_KEYWORD]
        known = {p.name for p in named} | set(without)
        others = inspect.signature(alias).parameters.values()
        settings = [p for p in others if p.name not in known and p.kind == p.KEYWORD_ONLY]
        function.__signature__ = own.replace(parameters=[*named, *settings])
        return function

    return show


@_with_settings_of(galore, without=("inner", "mu_dtype", "nu_dtype"))
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
      **settings: all else that :func:`galore` takes but ``inner``; ``projector_dtype`` among them.

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
    inner = quantize_state(_scale_by_galore_adam(b1, b2, eps, None, None), **storage or {})
    return galore(learning_rate, rank, inner=inner, **settings)


@_with_settings_of(online_subspace_descent, without=("inner",))
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
    inner = quantize_state(optax.scale_by_adam(b1, b2, eps), **storage or {})
    return online_subspace_descent(learning_rate, rank, inner=inner, **settings)


def _optimizer(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    accumulate: int | None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """``inner`` in the subspace, decay in full space, then the learning rate.

    The latter two see no micro-batch but the last of each step. (``accumulate`` is None rather than
    1 by default, since ``optax.inject_hyperparams`` makes arrays of all numbers.)
    """
    accumulate = 1 if accumulate is None else accumulate
    subspace = scale_by_subspace(inner, accumulate=accumulate, **settings)
    after: Any = optax.chain(
        optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
    )
    if accumulate > 1:
        is_last = lambda step, **_: step % accumulate == accumulate - 1
        after = optax.transforms.conditionally_mask(after, is_last)
    return optax.chain(subspace, after)


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
