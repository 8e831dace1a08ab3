"""Optimizers of others, as the trainer runs them beside its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.llama import subspace_rules
from optax_subspace import LeafPlan, in_float32, plan
from train.config import OptimizerConfig


def make(config: OptimizerConfig, schedule: Callable[[Any], jax.Array], fused: bool = False) -> Any:
    """The named optimizer of optax, with decay as in `optax.adamw`, or None for another name.

    Adafactor is without the parameters' scale, with momentum, as GaLore's tables have it. Muon
    takes the kernels of the layers, and Adam the rest. In the fused backward pass each sees one
    layer at a time anyway.
    """
    each_layer = (lambda tx: tx) if fused else layer_by_layer
    assert config.b1 is not None and config.b2 is not None and config.scale is not None
    decay = config.weight_decay
    match config.name:
        case "adafactor":
            # Per layer, or the stacked norm scales would be taken for matrices.
            rms = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
            each = each_layer(in_float32(optax.chain(rms, optax.clip_by_block_rms(1.0))))
            momentum = optax.ema(config.b1, debias=False)
            return optax.chain(each, momentum, *_ending(schedule, decay))
        case "lion":
            return optax.lion(schedule, config.b1, config.b2, weight_decay=decay)
        case "sgd":
            return optax.chain(optax.trace(config.b1), *_ending(schedule, decay))
        case "muon":
            return optax.contrib.muon(
                schedule,
                beta=config.b1,
                weight_decay=decay,
                adam_b2=config.b2,
                adam_weight_decay=decay,
                muon_weight_dimension_numbers=_of_kernels(optax.contrib.MuonDimensionNumbers),
            )
        case "contrib_galore":
            peer = optax.contrib.galore(
                schedule,
                config.rank,
                config.every,
                config.scale,
                optax.scale_by_adam(config.b1, config.b2, config.eps),
                weight_decay=decay,
                weight_dimension_numbers=_of_kernels(optax.contrib.GaLoreDimensionNumbers),
            )
            return each_layer(_savable(peer))
    return None


def _ending(schedule: Any, decay: float) -> tuple[Any, Any]:
    return optax.add_decayed_weights(decay), optax.scale_by_learning_rate(schedule)


def _of_kernels(spec: Any) -> Callable[[Any], Any]:
    """What optax's own members take for a table of matrices: axes of the kernels, else None."""

    axes = lambda leaf: spec(leaf.reduction, leaf.output) if leaf.projected else None
    return lambda params: by_plan(axes, params)


def by_plan(function: Callable[[LeafPlan], Any], params: Any) -> Any:
    """A tree of what `function` returns for each leaf, of which the kernels are `projected`."""
    plans = iter(plan(params, subspace_rules(), rank=1))
    return jax.tree.map(lambda _: function(next(plans)), params)


def _savable(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` without empty arrays, which Orbax doesn't save; it only hands them on."""
    filled = lambda x: x if x.size else jnp.zeros(1, x.dtype)
    return optax.GradientTransformation(
        lambda params: jax.tree.map(filled, tx.init(params)), tx.update
    )


def layer_by_layer(
    tx: optax.GradientTransformation, layers: str = "layers"
) -> optax.GradientTransformation:
    """`tx` on a tree in which each layer of the stack is a subtree of its own.

    For transformations that know no batch axes.

    >>> tx = layer_by_layer(optax.scale_by_factored_rms(min_dim_size_to_factor=2))
    >>> state = tx.init({"layers": {"w": jnp.ones((3, 4, 5)), "norm": jnp.ones((3, 4))}})
    >>> [x["w"].shape for x in state.v_row["layers"]], state.v["layers"][0]["norm"].shape
    ([(4,), (4,), (4,)], (4,))
    """

    def apart(tree: Any) -> Any:
        if tree is None:
            return None
        stack = tree[layers]
        count = jax.tree.leaves(stack)[0].shape[0]
        one = lambda i: jax.tree.map(lambda x: jax.lax.index_in_dim(x, i, keepdims=False), stack)
        return {**tree, layers: [one(i) for i in range(count)]}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(apart(updates), state, apart(params))
        stack = jax.tree.map(lambda *parts: jnp.stack(parts), *updates[layers])
        return {**updates, layers: stack}, state

    return optax.GradientTransformation(lambda params: tx.init(apart(params)), update)
