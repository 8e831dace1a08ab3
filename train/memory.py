"""Memory of a training step by part: predicted from shapes, and as the compiler lays it out."""

import math
from typing import Any, NamedTuple

import jax
import optax

from train.step import State

# With a schedule, as the trainer runs it.
_ADAMW = optax.adamw(lambda step: 1e-3)


class Predicted(NamedTuple):
    """Bytes that follow from shapes and dtypes alone."""

    weights: int
    gradients: int  # one full tree in the weights' dtypes
    optimizer_state: int
    adamw_state: int  # what full-rank AdamW would keep for the same weights
    batch: int  # the windows of one step and the step counter

    @property
    def arguments(self) -> int:
        """What the compiled step takes: weights, optimizer state and batch."""
        return self.weights + self.optimizer_state + self.batch


class Measured(NamedTuple):
    """Bytes that the compiled step uses, from `compiled.memory_analysis()`."""

    arguments: int
    outputs: int
    shared: int  # outputs that reuse the memory of donated arguments
    temporaries: int  # gradients, activations, updates, projections

    @property
    def total(self) -> int:
        """Device memory at the peak of a step, by the compiler's account."""
        return self.arguments + self.outputs - self.shared + self.temporaries


def predict(state: State, windows: Any) -> Predicted:
    """Bytes by part; `state` and `windows` may be shapes only."""
    return Predicted(
        weights=tree_bytes(state.params),
        gradients=tree_bytes(state.params),
        optimizer_state=tree_bytes(state.opt_state),
        adamw_state=tree_bytes(jax.eval_shape(_ADAMW.init, state.params)),
        batch=tree_bytes((windows, state.step)),
    )


def measure(compiled: Any) -> Measured | None:
    """The compiler's figures, or None where it gives none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return Measured(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        shared=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def mebibytes(count: int) -> str:
    """
    >>> mebibytes(3 * 2**20)
    '3.00 MiB'
    """
    return f"{count / 2**20:,.2f} MiB"
