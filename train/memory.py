"""Memory of a training step by part: predicted from shapes, and as the compiler lays it out."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.extend.core import Var

from models import lora
from models.config import Frozen
from models.llama import Pieces
from optax_subspace import dequantize
from train.gradient import block_input, run_block
from train.mesh import ALONE, Mesh, Work, local_bytes
from train.placement import taken_alone
from train.step import State, without_adapters

# With a schedule, as the trainer runs it.
_ADAMW = optax.adamw(lambda step: 1e-3)


class Predicted(NamedTuple):
    """Bytes that follow from shapes and dtypes alone."""

    weights: int
    # One full tree, in a fused step of its largest part, at the source low-rank ones; of int8
    # weights, as arrays. Micro-batches are added up in a second full one, in float32.
    gradients: int
    activations: int  # kept for the backward pass; a block that is recomputed is not counted
    optimizer_state: int
    adamw_state: int  # what full-rank AdamW would keep for the model with plain kernels
    batch: int  # the tokens of one step and the step counter

    @property
    def arguments(self) -> int:
        """What the compiled step takes: weights, optimizer state and batch."""
        return self.weights + self.optimizer_state + self.batch

    @property
    def temporaries(self) -> int:
        """What it holds beside them: gradients and activations."""
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        """The peak of a step if nothing is held twice."""
        return self.arguments + self.temporaries


class Measured(NamedTuple):
    """Bytes on the device, from `compiled.memory_analysis()`."""

    weights: int
    optimizer_state: int
    arguments: int
    outputs: int
    shared: int  # outputs that reuse the memory of donated arguments
    temporaries: int  # gradients, activations, updates, projections

    @property
    def batch(self) -> int:
        """The arguments that are neither weights nor optimizer state."""
        return self.arguments - self.weights - self.optimizer_state

    @property
    def total(self) -> int:
        """Device memory at the peak of a step, by the compiler's account."""
        return self.arguments + self.outputs - self.shared + self.temporaries


def predict(
    state: State,
    batch: Any,
    loss_fn: Callable[[Any, Any], Any],
    parts: Pieces | None = None,
    remat: bool = False,
    frozen: Frozen = "nothing",
    work: Work = ALONE,
    found: Any = None,
) -> Predicted:
    """Bytes by part on one device; `state` and `batch` may be shapes only, with their shardings.

    `loss_fn` is the function of parameters and a batch that the step differentiates. A fused
    backward pass takes the model by its `parts`, and keeps of its layers their inputs alone with
    `remat`. What is frozen has no gradient. `found` are the shapes of what a backward pass finds in
    place of gradients, which the state adds up over micro-batches (`train.source.found`).
    """
    arrays = jax.eval_shape(dequantize, state.params)
    plain = jax.eval_shape(without_adapters, arrays)
    own, plain = (x if work.mesh is None else _own_part(x, work.mesh) for x in (arrays, plain))
    whole_batch, batch = batch, _at_a_time(batch, work)
    trained = functools.partial(lora.trained, frozen=frozen)
    if parts is None:
        gradients = tree_bytes(trained(own) if found is None else found)
        activations = _saved_bytes(loss_fn, arrays, batch)
        size = work.micro_batch_size
        if found is None and size and size < whole_batch.inputs.shape[0]:
            gradients += sum(4 * math.prod(x.shape) for x in trained(own))
    else:
        layers = jax.eval_shape(lambda p: jax.tree.map(lambda x: x[0], p["layers"]), arrays)
        rest = {name: part for name, part in arrays.items() if name != "layers"}
        count = jax.tree.leaves(arrays["layers"])[0].shape[0]
        of_rest = (tree_bytes(trained(part)) for name, part in own.items() if name != "layers")
        gradients = max(tree_bytes(trained(own["layers"])) // count, *of_rest)
        x = jax.eval_shape(lambda p, b: block_input(parts, p, b), arrays, batch)
        one = _saved_bytes(lambda layer, x: run_block(parts, layer, x), layers, x)
        head = lambda part, b: parts.loss(part[0], part[1][0], b.targets, b.mask)[0]
        end = _saved_bytes(head, (rest, x), batch)
        # The loss ends before the walk begins, which has one block's at a time.
        activations = count * tree_bytes(x) + max(one, end) if remat else count * one + end
    return Predicted(
        weights=local_bytes(state.params),
        gradients=gradients,
        activations=activations,
        optimizer_state=local_bytes(state.opt_state),
        adamw_state=tree_bytes(jax.eval_shape(_ADAMW.init, plain)),
        batch=local_bytes((whole_batch, state.step)),
    )


def _own_part(arrays: Any, mesh: Mesh) -> Any:
    """Shapes of what one device holds of each parameter."""
    shape = lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype)
    return jax.tree.map(shape, arrays, mesh.of_params(arrays))


def _at_a_time(batch: Any, work: Work) -> Any:
    """Shapes of the rows that one device computes at a time."""
    devices = 1 if work.mesh is None else work.mesh.size
    rows = lambda x: (work.micro_batch_size or x.shape[0]) // devices
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows(x), *x.shape[1:]), x.dtype), batch)


def measure(compiled: Any, state: State) -> Measured | None:
    """The compiler's figures for a step and for the state's parts, or None if it gives none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None

    def laid_out(tree: Any) -> int:
        parts = taken_alone(tree).memory_analysis()
        assert parts is not None  # as for the step
        return parts.argument_size_in_bytes

    return Measured(
        weights=laid_out(state.params),
        optimizer_state=laid_out(state.opt_state),
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        shared=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )


def _saved_bytes(loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> int:
    """Bytes of all that `jax.vjp` of the loss keeps, the parameters and the batch apart."""
    traced = jax.make_jaxpr(
        lambda params, batch: jax.vjp(lambda params: loss_fn(params, batch), params)
    )(params, batch).jaxpr
    saved = {out for out in traced.outvars if isinstance(out, Var)} - set(traced.invars)
    return tree_bytes([out.aval for out in saved])


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def mebibytes(count: int) -> str:
    """
    >>> mebibytes(3 * 2**20)
    '3.00 MiB'
    """
    return f"{count / 2**20:,.2f} MiB"
