"""Ready optimizers: projection, inner rule, decay and learning rate in one call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._hamiltonian import scale_by_hamiltonian_descent
from optax_subspace._kinetic import adam_kinetic
from optax_subspace._leaves import leaf_names
from optax_subspace._lomo import decay_of, decays
from optax_subspace._projectors import Projector, history_pca, svd
from optax_subspace._rules import Rules, check_scale
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
      inner: another transformation than GaLore's Adam, without sign and learning rate of its own,
        so ``optax.scale_by_lion()`` rather than ``optax.lion(...)``; ``b1``, ``b2``, ``eps``,
        ``mu_dtype`` and ``nu_dtype`` are then not used.
      b1, b2: decay rates of the first and second moment.
      eps: added to the root of the second moment.
      mu_dtype, nu_dtype: dtypes in which the moments are stored, float32 by default. A second
        moment in bfloat16 rises but hardly falls: a decay of 0.999 is below its resolution.
      projector_dtype: how the bases are stored, in float32 by default; see
        :func:`scale_by_subspace`.
      stagger, moments, accumulate, seed: see :func:`scale_by_subspace`, whose defaults None stands
        for; decay and schedule take one step per ``accumulate`` gradients (those of
        ``optax.inject_hyperparams``, which counts by itself, one per gradient).
      weight_decay: decoupled decay :math:`\lambda`, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      ValueError: ``every`` and ``projector`` given together, a decay below 0, and what
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
    check_period("galore", every, projector)
    if projector is None:
        projector = svd(200 if every is None else every)
    if inner is None:
        inner = scale_by_galore_adam(b1, b2, eps, mu_dtype, nu_dtype)
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
        stagger=False if stagger is None else stagger,
        moments=moments,
        seed=0 if seed is None else seed,
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
    moments: str = "keep",
    accumulate: int | None = None,
    seed: int | None = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Online Subspace Descent: a basis that follows each gradient, found once by an SVD.

    .. math::
      W_{t+1} = W_t - \eta \bigl(\alpha P_t \, \mathrm{inner}(P_t^\top G_t) + \lambda W_t\bigr),
      \qquad P_{t+1} = \mathrm{OnlinePCA}(P_t, G_t)

    It converges for any rule that moves the basis when ``inner`` is a Hamiltonian descent, as
    Adam, Lion and momentum are. The published code is ``projector=online_pca(optax.adamw(1 / 200,
    weight_decay=0.01), orthogonality=0.0, relative=False, relative_to="gradient")`` with
    ``inner=galore``'s Adam; its learning rate follows the weights' with :func:`tied_rate`.

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      rank: dimension of the subspace.
      projector: the rule; :func:`history_pca` by default, which on a small LLaMA's gradients is
        ahead of :func:`online_pca`, as published, in captured energy and loss, and level with
        :func:`oja`, which takes longer to follow a jump. Or one of your own.
      scale: factor :math:`\alpha` on the lifted update.
      side, rules, projector_dtype, stagger, moments, accumulate, seed: see
        :func:`scale_by_subspace`.
      inner: transformation in the subspace, Adam with ``eps=1e-6`` by default; without sign and
        learning rate of its own, see :func:`galore`.
      weight_decay: decoupled decay :math:`\lambda`, in full space and times the learning rate.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    Raises:
      ValueError: a decay below 0, and what :func:`scale_by_subspace` raises.

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
    return _optimizer(
        scale_by_hamiltonian_descent(adam_kinetic(eps=1e-6)) if inner is None else inner,
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
        stagger=False if stagger is None else stagger,
        moments=moments,
        seed=0 if seed is None else seed,
    )


def _optimizer(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    accumulate: int | None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """``inner`` in the subspace, decay in full space, then the learning rate.

    (``accumulate`` is None rather than 1 by default, since ``optax.inject_hyperparams`` makes
    arrays of all numbers.)
    """
    accumulate = 1 if accumulate is None else accumulate
    subspace = scale_by_subspace(inner, accumulate=accumulate, **settings)
    return finished(subspace, learning_rate, weight_decay, mask, accumulate)


def finished(
    subspace: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """``subspace``, whose state has a ``projection``, then decay in full space and learning rate.

    The latter two see no micro-batch but the last of each step, and a leaf that was skipped for a
    gradient that is not finite does not decay either. Without decay the learning rate is handed to
    ``subspace``, which multiplies arrays of subspace shape where the chain would those of full
    shape; the state is the chain's.
    """
    check_scale("learning_rate", learning_rate)
    decay = decay_of(weight_decay, mask)
    after: Any = optax.chain(decay, optax.scale_by_learning_rate(learning_rate))
    if accumulate > 1:
        is_last = lambda step, **_: step % accumulate == accumulate - 1
        after = optax.transforms.conditionally_mask(after, is_last)

    def init_fn(params):
        return subspace.init(params), after.init(params)

    def scaled_inside(updates, state, params=None, *, step_size=1.0, **extra_args):
        rate, rest = after.update(jnp.ones([]), state[1])
        updates, first = subspace.update(
            updates, state[0], params, step_size=step_size * rate, **extra_args
        )
        return updates, (first, rest)

    if not decays(weight_decay):
        return optax.GradientTransformationExtraArgs(init_fn, scaled_inside)

    def update_fn(updates, state, params=None, **extra_args):
        updates, first = subspace.update(updates, state[0], params, **extra_args)
        if accumulate > 1 and params is not None:
            # Decay would give those of the last micro-batch another dtype than the others.
            both = lambda u, p: u.astype(jnp.result_type(u, p))
            updates = jax.tree.map(both, updates, params)
        updates, rest = after.update(updates, state[1], params, **extra_args)
        before, now = state[0].projection.skipped, first.projection.skipped
        structure: Any = jax.tree.structure(updates)
        stays = lambda name, u: jnp.where(now[name] > before[name], 0, u)
        leaves = map(stays, leaf_names(updates), jax.tree.leaves(updates))
        return structure.unflatten(leaves), (first, rest)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_period(name: str, every: int | None, projector: Projector | None) -> None:
    """Raises if a rule of one's own, which has its period, is given together with one."""
    if every is not None and projector is not None:
        raise ValueError(f"{name}: give every or projector, not both: projector=svd(every=...)")


def scale_by_galore_adam(b1, b2, eps, mu_dtype=None, nu_dtype=None) -> optax.GradientTransformation:
    """Adam as in GaLore's code: epsilon is added before the bias correction."""
    kinetic = adam_kinetic(b1, b2, eps, eps_before_correction=True)
    return scale_by_hamiltonian_descent(kinetic, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


def with_settings_of(alias: Callable[..., Any], without: Sequence[str]) -> Callable[[Any], Any]:
    """Gives the function the keywords of ``alias`` in place of ``**settings``.

    (``optax.inject_hyperparams`` takes every argument by its name in the signature.)
    """

    def named(function):
        own = inspect.signature(function)
        first = [p for p in own.parameters.values() if p.kind != p.VAR_KEYWORD]
        known = {p.name for p in first} | set(without)
        others = inspect.signature(alias).parameters.values()
        settings = [p for p in others if p.name not in known and p.kind == p.KEYWORD_ONLY]
        signature = own.replace(parameters=[*first, *settings])

        @functools.wraps(function)
        def checked(*args, **kwargs):
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            return function(*args, **kwargs)

        # (What `inspect` reads first; the types of functions do not know of it.)
        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return named
