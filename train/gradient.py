"""The loss of a batch, over devices and micro-batches, and its gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import llama, lora
from models.config import LlamaConfig
from train.batches import Batch
from train.mesh import ALONE, Mesh, Work, over_rows
from train.optimizer import Optimizer


class Weighted(NamedTuple):
    """A micro-batch of a step that is fused or projects at the source."""

    batch: Batch
    weight: jax.Array  # (), its share of the step's tokens x the number of micro-batches


class Walk(NamedTuple):
    """The model in parts, of batches whose rows are split over the devices."""

    embed: Callable[[Any, Batch], Any]  # (rest, batch) -> x
    block: Callable[[Any, Any], Any]  # (layer, x) -> x
    # (rest, x, batch) -> (mean nats a token, number of tokens)
    mean: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]


def walk(model: LlamaConfig, work: Work = ALONE) -> Walk:
    """The model as a walk through its layers, for what never holds all of them as arrays."""
    parts, mesh = llama.pieces(model), work.mesh
    # Given what it reads alone: a fused step updates the rest at the other end.
    start, end = ("embed",), ("norm", "embed" if model.tie_embeddings else "head")
    pick = lambda rest, keys: {key: rest[key] for key in keys}
    embed = over_rows(mesh, lambda rest, batch: block_input(parts, rest, batch))
    mean = over_rows_mean(
        mesh, lambda part, x, batch: parts.loss(part, x[0], batch.targets, batch.mask)
    )
    return Walk(
        lambda rest, batch: embed(pick(rest, start), batch),
        over_rows(mesh, lambda layer, x: run_block(parts, layer, x), "layers/"),
        lambda rest, x, batch: mean(pick(rest, end), x, batch),
    )


def block_input(parts: llama.Pieces, rest: Any, batch: Batch) -> tuple[jax.Array, ...]:
    """What the blocks hand on: x (B, S, d), and a batch's segments (B, S), if it has any."""
    segments = () if batch.segments is None else (batch.segments,)
    return parts.embed(rest, batch.inputs), *segments


def run_block(parts: llama.Pieces, layer: Any, x: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """One block of what `block_input` begins."""
    return parts.block(layer, *x), *x[1:]


def make_mean(
    model: LlamaConfig, work: Work = ALONE
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A function of parameters and a batch: mean nats a token, the number of tokens; () each."""
    definition = llama.graphdef(model)
    return over_rows_mean(
        work.mesh,
        lambda params, batch: llama.merge(definition, params).loss(
            batch.inputs, batch.targets, batch.mask, batch.segments
        ),
    )


def make_loss(
    model: LlamaConfig, optimizer: Optimizer, work: Work = ALONE
) -> Callable[[Any, Batch], jax.Array]:
    """A function of parameters and a batch: mean nats a token, ()."""
    mean, trained = make_mean(model, work), trained_by(optimizer)
    return lambda params, batch: mean(trained(params), batch)[0]


def over_rows_mean(mesh: Mesh | None, found: Callable[..., Any]) -> Callable[..., Any]:
    """`found`, which returns a mean and the number of tokens in it, over all devices' rows."""
    if mesh is None or mesh.size == 1:
        return found

    def sums(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        mean, count = found(*arguments)
        return (mean * count)[None], count[None]

    each = over_rows(mesh, sums)

    def whole(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        totals, counts = each(*arguments)
        count = jnp.sum(counts)
        return jnp.sum(totals) / jnp.maximum(count, 1.0), count

    return whole


def make_gradient(
    model: LlamaConfig, optimizer: Optimizer, work: Work = ALONE
) -> Callable[[Any, Batch], tuple[jax.Array, Any]]:
    """A function of parameters, as arrays, and a batch: the mean loss and its gradient.

    Micro-batches are added up in float32, each with its share of the tokens that count.
    """
    loss_fn, size = make_loss(model, optimizer, work), work.micro_batch_size
    gradient = jax.value_and_grad(loss_fn)

    def in_parts(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        weighted = lambda params, part: loss_fn(params, part.batch) * part.weight
        parts = micro_batches(batch, size)
        count = parts.weight.shape[0]

        # What is frozen has no sum, but a zero in its place.
        labels = lora.labels(params, optimizer.adapters.freeze)
        is_frozen = jax.tree.map(lambda label: label == "frozen", labels)

        def add(carry: Any, part: Weighted) -> tuple[Any, None]:
            loss, found = jax.value_and_grad(weighted)(params, part)
            plus = lambda t, x, frozen: t if frozen else t + x.astype(t.dtype) / count
            return (carry[0] + loss / count, jax.tree.map(plus, carry[1], found, is_frozen)), None

        def wide(x: jax.Array, frozen: bool) -> jax.Array:
            return jnp.zeros(() if frozen else x.shape, jnp.promote_types(x.dtype, jnp.float32))

        start = (jnp.float32(0), jax.tree.map(wide, params, is_frozen))
        (loss, total), _ = jax.lax.scan(add, start, parts)
        whole = lambda g, p: jnp.broadcast_to(g, p.shape).astype(p.dtype)
        return loss, jax.tree.map(whole, total, params)

    return lambda params, batch: (in_parts if is_divided(batch, size) else gradient)(params, batch)


def is_divided(batch: Batch, size: int | None) -> bool:
    return size is not None and size < batch.inputs.shape[0]


def micro_batches(batch: Batch, size: int | None) -> Weighted:
    """A batch in parts of `size` rows, which divides its own, on a new axis in front.

    Part i has every n-th row from i on, so that rows which are split over devices stay there.
    """
    size = size or batch.inputs.shape[0]
    count = batch.inputs.shape[0] // size
    cut = lambda x: x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)
    parts = jax.tree.map(cut, batch)
    if batch.mask is None:
        return Weighted(parts, jnp.ones(count))
    tokens = jnp.sum(parts.mask.astype(jnp.float32), axis=(1, 2))
    return Weighted(parts, tokens * count / jnp.maximum(jnp.sum(tokens), 1.0))


def trained_by(optimizer: Optimizer) -> Callable[[Any], Any]:
    """What stops the gradients of weights that are not trained."""
    return functools.partial(lora.freeze, frozen=optimizer.adapters.freeze)
