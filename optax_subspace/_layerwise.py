"""The fused backward pass: each layer is updated as soon as its gradient is known (LOMO)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_subspace._blocks import dequantize
from optax_subspace._dependence import check_leaves_apart
from optax_subspace._fused_checks import (
    check_clips,
    check_loss,
    check_loss_scale,
    explained,
    refuse_gradient_trees,
    refuse_integers,
    warn_if_rounded_to_nearest,
)
from optax_subspace._fused_state import (
    FusedMetrics,
    FusedState,
    LossScale,
    all_finite,
    next_scale,
)
from optax_subspace._parts import as_seen, init_part
from optax_subspace._projection import compute_dtype
from optax_subspace._projectors._base import LAYER_AXIS, check_seed, transformation
from optax_subspace._rounding import apply_updates
from optax_subspace._source import AtSource
from optax_subspace._stack import (
    Stack,
    count_layers,
    keys_read,
    parts_of_tree,
    put_slice,
    slice_of,
)


class FusedStep(NamedTuple):
    """The functions that :func:`fused_backward` makes."""

    init: Callable[[Any], FusedState]
    step: Callable[[Any, FusedState, Any], tuple[Any, FusedState, FusedMetrics]]


def fused_backward(
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    *,
    layers: str = "layers",
    clip_norm: float | None = None,
    clip_layer_norm: float | None = None,
    clip_value: float | None = None,
    grad_norm: bool = False,
    remat: bool = True,
    loss_scale: LossScale | None = None,
    at_source: bool = False,
    seed: int | None = None,
) -> FusedStep:
    r"""Updates inside of the backward pass: no more than one layer's gradient exists at a time.

    For models of an embedding, a stack of identical blocks and a head. The forward pass keeps the
    blocks' inputs; the backward pass walks from the last block to the first, computes one block
    anew, takes its gradient, updates its weights and state in place and hands the cotangent on.
    Jit the step with ``donate_argnums=(0, 1)``.

    ``tx`` sees the parameters in parts: ``{layers: one layer}``, and each other top-level key on
    its own, with paths as in the whole tree. Rules on axes are those of one layer; counted from the
    end (``MatrixSpec(-2, -1)``) they serve stacks too. What ``tx`` does to one leaf must not depend
    on another. Gradients are cast to float32 first, and it sees weights in float16 as float32,
    which its state has then; the state keeps its dtypes. Random numbers differ from part to part,
    by the keys in the state; ``stagger`` spreads the refreshes of leaves, and not of layers.

    Micro-batches: with ``accumulate=`` of :func:`scale_by_subspace` each call is one of them, and
    the last of a step updates. Data parallelism: split the batch over a mesh axis; each layer's
    gradient is then reduced within the loop.

    Args:
      embed: ``(rest, batch) -> x``; ``rest`` is the parameters without the layers.
      block: ``(layer, x) -> x``, ``x`` any tree of arrays, positions, masks and random keys among
        them.
      loss: ``(rest, x, batch) -> mean loss``, a scalar.
      tx: any transformation that keeps leaves apart.
      layers: key of the stack, whose arrays have the layers' axis in front. Weights in int8 are
        stored layer by layer: ``jax.vmap(quantize_weights)(params[layers])``.
      clip_norm: greatest global norm, of gradients that are clipped by value first if that is asked
        too; of each micro-batch, if ``tx`` accumulates. The backward pass then runs twice, as in
        LOMO: for the norm, and for the updates.
      clip_layer_norm: greatest norm of the gradients of a layer, or of a key of the rest.
      clip_value: greatest magnitude of an entry.
      grad_norm: report the global norm in the one pass that there is without the two options that
        take two; each gradient is then kept a little longer.
      remat: compute blocks anew in the backward pass; otherwise what they need of the forward pass
        is kept, except for what follows from weights alone.
      loss_scale: for float16; a step with a gradient that is not finite changes nothing but the
        scale. This too takes two passes.
      at_source: project the layers' gradients at the source, as :func:`subspace_value_and_grad`
        does, whose conditions hold: not even one layer's gradient is formed, but where a basis is
        due. Norms are then those of the low-rank gradients. Takes ``remat``.
      seed: of the stochastic rounding of weights of few bits; None rounds to nearest, which
        leaves most weights of int8, and those of bfloat16 at small rates, where they are.

    Returns:
      ``init(params) -> state`` and ``step(params, state, batch) -> (params, state, metrics)``; see
      :class:`FusedState` and :class:`FusedMetrics`.

    Raises:
      ValueError: at ``init``, ``tx`` mixes leaves, needs more than gradients and weights, keeps a
        gradient tree as ``optax.MultiSteps`` does, or has a mask of the whole tree (those of this
        library's optimizers may be, as a dict); the parameters are no plain dict or have no such
        key; the layers are a list, or their first axes differ; a weight in int8 was not stored
        layer by layer. At once, ``at_source`` without ``remat``, a number to clip to that is
        not positive, or a loss scale that can't grow and shrink. At ``step``, a loss that
        differs between devices of a ``shard_map``.
      TypeError: ``tx`` is no transformation, ``loss_scale`` no :class:`LossScale`, ``seed`` no
        integer, or what to clip to no number; at ``init``, a parameter that is no real number; at
        ``step``, a loss that is none, or a block that hands on other dtypes than it is given.

    References:
      Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023, algorithm 1 and section 3.3.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"embed": jnp.eye(4), "layers": {"w": jnp.ones((3, 4, 4))}, "head": jnp.ones(4)}
      >>> fused = fused_backward(
      ...     embed=lambda rest, batch: batch @ rest["embed"],
      ...     block=lambda layer, x: jnp.tanh(x @ layer["w"]),
      ...     loss=lambda rest, x, batch: jnp.mean(x @ rest["head"]),
      ...     tx=optax.sgd(0.1),
      ... )
      >>> step = jax.jit(fused.step, donate_argnums=(0, 1))
      >>> params, state, metrics = step(params, fused.init(params), jnp.ones((2, 4)))
      >>> params["layers"]["w"].shape, float(metrics.loss).__round__(3)
      ((3, 4, 4), 3.997)
    """
    tx = transformation("fused_backward: tx", tx)
    blocks = Stack(block, remat)
    if at_source and not remat:
        raise ValueError(
            "fused_backward: at_source=True computes each block anew in the backward pass: leave "
            "out remat=False"
        )
    check_clips(clip_norm=clip_norm, clip_layer_norm=clip_layer_norm, clip_value=clip_value)
    check_loss_scale(loss_scale)
    if seed is not None:
        check_seed("fused_backward: seed", seed)
    two_passes = clip_norm is not None or loss_scale is not None

    def init(params: Any) -> FusedState:
        stack, rest = parts_of_tree(params, layers)
        count = count_layers(stack, layers)
        one = jax.eval_shape(lambda s: as_seen(slice_of(s, 0)), stack)
        seen = {layers: one, **jax.eval_shape(as_seen, rest)}
        refuse_integers(seen)
        warn_if_rounded_to_nearest(params, seed)
        check_leaves_apart(tx, seen, _REMEDY)

        def init_layer(layer: Any) -> Any:
            return init_part(tx, {layers: layer}, jax.lax.axis_index(LAYER_AXIS))

        state = jax.vmap(init_layer, axis_name=LAYER_AXIS, axis_size=count)(stack)
        refuse_gradient_trees(state)
        return FusedState(
            step=jnp.zeros([], jnp.int32),
            layers=state,
            rest={
                key: init_part(tx, {key: rest[key]}, number)
                for key, number in _numbers(rest, count).items()
            },
            scale=jnp.asarray(loss_scale.initial if loss_scale else 1, jnp.float32),
            good=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
        )

    def step(params: Any, state: FusedState, batch: Any) -> tuple[Any, FusedState, FusedMetrics]:
        stack, rest = parts_of_tree(params, layers)
        count = count_layers(stack, layers)
        weights = dequantize(rest)
        at_start, at_end = keys_read(embed, loss, weights, batch)
        take = lambda keys: {key: weights[key] for key in keys}

        x, embed_vjp = jax.vjp(lambda part: embed({**weights, **part}, batch), take(at_start))
        with explained():
            x, saved = blocks.forward(stack, x)
        value, loss_vjp = jax.vjp(
            lambda part, x: loss({**weights, **part}, x, batch), take(at_end), x
        )
        check_loss(value)
        scale = state.scale.astype(value.dtype)  # which may round it
        end_gradients, dx = loss_vjp(scale)
        only_end = {key: g for key, g in end_gradients.items() if key not in at_start}

        def start_gradients(dx: Any) -> dict[str, Any]:
            """Of the keys that the embedding uses; a tied one has the sum of both its ends."""
            (found,) = embed_vjp(dx)
            add = lambda key, g: jax.tree.map(jnp.add, g, end_gradients[key])
            return {key: add(key, g) if key in at_end else g for key, g in found.items()}

        def gradient(layer: Any, inner: Any, saved: Any, dy: Any) -> tuple[Any, Any, Any]:
            """A layer's gradients, what was found for its bases, and its input's cotangent."""
            if not at_source:
                gradients, dx = blocks.gradient(dequantize(layer), saved, dy, x)
                return gradients, None, dx
            here = AtSource(tx, {layers: dequantize(layer)}, inner, refresh=True)
            run = lambda probes, rest, x: block(here.merge(probes, rest)[layers], x)
            with here.explained():
                *cotangents, dx = jax.vjp(run, here.probes, here.rest, saved)[1](dy)
                here.check(lambda tree: block(tree[layers], saved))
            gradients, source = here.collect(*cotangents)
            return as_seen(gradients[layers]), source, dx

        def walk(parts_of: Any, visit: Any, carry: Any) -> tuple[Any, Any]:
            """``carry = visit(i, layer, gradients, source, carry)``, the last layer first.

            ``parts_of`` the carry are the stacks of layers and of their states.
            """

            def body(turn, loop):
                carry, dy = loop
                i = count - 1 - turn
                stack, inner = parts_of(carry)
                layer = slice_of(stack, i)
                state_now = slice_of(inner, i) if at_source else None
                found, source, dx = gradient(layer, state_now, slice_of(saved, i), dy)
                return visit(i, layer, found, source, carry), dx

            return jax.lax.fori_loop(0, count, body, (carry, dx))

        def wide(gradients: Any) -> Any:
            """In float32, without the loss scale, and clipped by value."""
            gradients = jax.tree.map(
                lambda g: g.astype(compute_dtype(g.dtype)) / scale.astype(jnp.float32), gradients
            )
            if clip_value is None:
                return gradients
            # (A clipped infinity would hide an overflow.)
            clip = lambda g: jnp.where(jnp.isfinite(g), jnp.clip(g, -clip_value, clip_value), g)
            return jax.tree.map(clip, gradients)

        # (In the widest dtype, for models with float64 in some parts.)
        widest = jnp.result_type(jnp.float32, *jax.tree.leaves((stack, rest)))

        def squared(gradients: Any) -> jax.Array:
            return jnp.asarray(optax.tree.norm(wide(gradients), squared=True), widest)

        total = squared(only_end) if two_passes or grad_norm else jnp.zeros([], widest)
        # (Not by the norm, which is infinite too where squares of finite gradients overflow.)
        check = all_finite if loss_scale is not None else lambda gradients: True
        finite = jnp.bool_(True) & check(only_end)
        if two_passes:

            def add(i, layer, gradients, source, found):
                total, finite = found
                return total + squared(gradients), finite & check(gradients)

            (total, finite), start = walk(lambda _: (stack, state.layers), add, (total, finite))
            ends = start_gradients(start)
            total, finite = total + squared(ends), finite & check(ends)
        # (Else true as well, but no constant: see below.)
        enabled = finite if loss_scale is not None else state.step >= 0

        def update(
            key: str, number: Any, params: Any, gradients: Any, inner: Any, source: Any = None
        ) -> Any:
            """A part's new weights and state, in which its gradients end."""
            more = {} if source is None else {"source": source}
            draw = None
            if seed is not None:
                draw = jax.random.fold_in(jax.random.key(seed), state.step)
                draw = jax.random.fold_in(draw, number)

            def apply(params, gradients, inner):
                gradients = wide(gradients)
                if clip_norm is not None:
                    gradients = _scaled_to(gradients, jnp.sqrt(total), clip_norm)
                if clip_layer_norm is not None:
                    norm = optax.tree.norm(gradients)
                    gradients = _scaled_to(gradients, norm, clip_layer_norm)
                weights = {key: as_seen(params)}
                updates, new = tx.update({key: gradients}, inner, weights, **more)
                new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, inner)
                return apply_updates(params, updates[key], key=draw), new

            # In a branch: XLA:CPU would copy the stack of all moments, where it does not see that a
            # layer's slice is read before it is written. XLA:TPU does, and a branch would only keep
            # the layer's new weights beside the old.
            def in_branch(params, gradients, inner):
                keep = lambda params, gradients, inner: (params, inner)
                return jax.lax.cond(enabled, apply, keep, params, gradients, inner)

            def directly(params, gradients, inner):
                changed = apply(params, gradients, inner)
                if loss_scale is None:
                    return changed
                choose = lambda new, old: jnp.where(enabled, new, old)
                return jax.tree.map(choose, changed, (params, inner))

            return jax.lax.platform_dependent(
                params, gradients, inner, tpu=directly, default=in_branch
            )

        new, states = dict(rest), dict(state.rest)
        numbers = _numbers(rest, count)

        def update_rest(gradients: dict[str, Any]) -> None:
            for key, found in gradients.items():
                changed = update(key, numbers[key], rest[key], found, state.rest[key])
                new[key], states[key] = changed

        def update_layer(i, layer, gradients, source, carry):
            stack, inner, total = carry
            # XLA:TPU would keep a copy of the layer for it, from the forward pass on, where it can
            # read the stack again.
            i = jax.lax.platform_dependent(i, tpu=jax.lax.optimization_barrier, default=lambda i: i)
            layer = slice_of(stack, i)
            layer, one = update(layers, i, layer, gradients, slice_of(inner, i), source)
            if grad_norm and not two_passes:
                total += squared(gradients)
            return put_slice(stack, layer, i), put_slice(inner, one, i), total

        update_rest(only_end)
        # So that the head's gradient, the largest of all, ends before the walk begins.
        dx, new, states = jax.lax.optimization_barrier((dx, new, states))
        (stack, inner, total_now), start = walk(
            lambda carry: carry[:2], update_layer, (stack, state.layers, total)
        )
        last = start_gradients(start)
        update_rest(last)
        # What neither end uses has no gradient, and may decay.
        unused = [key for key in rest if key not in at_start and key not in at_end]
        update_rest({key: jax.tree.map(jnp.zeros_like, weights[key]) for key in unused})

        if not two_passes:
            total = total_now + squared(last) if grad_norm else jnp.full([], jnp.nan)
        norm = jnp.sqrt(total).astype(jnp.float32)
        metrics = FusedMetrics(value.astype(jnp.float32), norm, (~enabled).astype(jnp.float32))
        new_scale, good = next_scale(loss_scale, state, enabled)
        skipped = state.skipped + (~enabled).astype(jnp.int32)
        return (
            {**new, layers: stack},
            FusedState(state.step + 1, inner, states, new_scale, good, skipped),
            metrics,
        )

    return FusedStep(init, step)


_REMEDY = (
    "give what needs all gradients at once to fused_backward, as clip_norm=, clip_layer_norm= or "
    "loss_scale=, or use a plain step"
)


def _numbers(rest: dict[str, Any], count: int) -> dict[str, int]:
    """The numbers of the parts of the rest, after those of the layers."""
    return {key: count + i for i, key in enumerate(sorted(rest))}


def _scaled_to(gradients: Any, norm: jax.Array, largest: float) -> Any:
    """As optax.clip_by_global_norm, with the norm given."""
    return jax.tree.map(lambda g: jnp.where(norm < largest, g, g / norm * largest), gradients)
