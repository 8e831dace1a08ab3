"""LOMO's optimizers, as transformations: what they save comes with the fused backward pass."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_subspace._projection import compute_dtype
from optax_subspace._projectors._base import transformation
from optax_subspace._rules import check_scale


def lomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LOMO's update: plain gradient descent, without any state.

    .. math::
      W_{t+1} = (1 - \eta \lambda) W_t - \eta G_t

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      weight_decay: decoupled decay :math:`\lambda`.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer; run it by :func:`fused_backward`, whose options are LOMO's clipping and loss
      scale.

    References:
      Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> tx, params = lomo(0.1), {"w": jnp.ones(2)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["w"].tolist()
      [-0.10000000149011612, -0.10000000149011612]
    """
    return optax.chain(decay_of(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))


def decays(weight_decay: Any) -> bool:
    """Whether there is any decay; a traced number, which may be zero, counts as one."""
    return not (isinstance(weight_decay, numbers.Real) and weight_decay == 0)


def decay_of(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """Decoupled decay; of zero nothing, so that updates need no parameters."""
    check_scale("weight_decay", weight_decay)
    if isinstance(weight_decay, numbers.Real) and not float(weight_decay) >= 0:
        raise ValueError(f"weight_decay must not be below 0, got {weight_decay!r}")
    if not decays(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, _of_parts(mask))


def _of_parts(mask: Any) -> Any:
    """A mask that also serves parts of the tree that it is of, as ``fused_backward`` has them."""
    if not isinstance(mask, dict):
        return mask

    def of(params):
        is_part = isinstance(params, dict) and len(params) == 1 and params.keys() < mask.keys()
        return {key: mask[key] for key in params} if is_part else mask

    return of


def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    clip_threshold: float = 1.0,
    eps: float = 1e-30,
    min_scale: float = 1e-3,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaLomo: a factored second moment, steps of the weights' own size.

    .. math::
      U_t = G_t / \sqrt{\hat V_t}, \qquad
      W_{t+1} = W_t - \eta \max(\epsilon_2, \mathrm{rms}(W_t))
          \Bigl(\frac{U_t}{\max(1, \mathrm{rms}(U_t) / d)} + \lambda W_t\Bigr)

    :math:`\hat V_t` comes from the running means of the squared gradient's rows and columns, which
    decay by :math:`1 - t^{-0.8}`; of vectors it is the running mean itself. Each leaf is taken for
    one matrix; :func:`fused_backward` takes stacks apart, whose layers share one scale otherwise.
    Means and arithmetic are float32 for weights of 16 bits as well.

    Args:
      learning_rate: step size :math:`\eta`, a number or a schedule.
      decay_rate: exponent of the running means' decay.
      clip_threshold: root mean square :math:`d` above which an update is scaled down.
      eps: added to squared gradients.
      min_scale: least root mean square :math:`\epsilon_2` of the weights that counts.
      weight_decay: decoupled decay :math:`\lambda`, scaled as the step.
      mask: tree of booleans, or a function from parameters to one: which leaves decay.

    Returns:
      The optimizer.

    References:
      Lv et al., `AdaLomo <https://arxiv.org/abs/2310.10195>`_, 2023, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> tx, params = adalomo(0.1), {"w": jnp.ones((4, 3))}
      >>> state = tx.init(params)
      >>> state[0].v_row["w"].shape, state[0].v_col["w"].shape
      ((3,), (4,))
    """
    tx = optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=1, epsilon=eps),
        optax.clip_by_block_rms(clip_threshold),
        optax.add_decayed_weights(weight_decay, _of_parts(mask)),
        optax.scale_by_param_block_rms(min_scale),
        optax.scale_by_learning_rate(learning_rate),
    )
    return in_float32(tx)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Shows leaves of 16 bits to a transformation as float32, so that its state is float32.

    Of optax's transformations many keep second moments in the weights' dtype. Squares vanish in
    float16, and in bfloat16 a mean stands still once it moves by less than 2^-9 of itself.

    Args:
      tx: any transformation.

    Returns:
      One whose updates have the dtypes of the gradients, as those of ``tx`` have.

    Raises:
      TypeError: ``tx`` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx, params = in_float32(optax.scale_by_rms()), {"w": jnp.ones(2, jnp.bfloat16)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> str(state.nu["w"].dtype), str(updates["w"].dtype)
      ('float32', 'bfloat16')
    """
    tx = transformation("in_float32: tx", tx)

    def wide(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, compute_dtype(dtype))
        return jnp.asarray(x, compute_dtype(dtype))

    def init_fn(params):
        return tx.init(jax.tree.map(wide, params))

    def update_fn(updates, state, params=None, **extra_args):
        gradients, weights = jax.tree.map(wide, (updates, params))
        found, state = tx.update(gradients, state, weights, **extra_args)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), found, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
