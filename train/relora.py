"""ReLoRA: from time to time the kernels take up the adapters, which then begin anew.

Source: Lialin et al. 2023 (arXiv 2307.05695), section 3. Of the optimizer state it is the adapters'
moments that begin anew, all of them, with the count that corrects their bias; the schedule goes on,
with a rise to it after each time (`train.optimizer.jagged`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import lora
from train.config import Config
from train.step import Metrics, State


def jitted_merge(config: Config, formats: State | None = None) -> Any:
    """A jitted function of the state, which is donated: that of the same model, begun anew.

    Its random numbers are a function of seed and step, so that a resumed run draws the same.
    """
    rounds = config.train.stochastic_rounding

    def merge(state: State) -> State:
        # (That of the first adapters, and of no step.)
        key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        draw, rounding = jax.random.split(jax.random.fold_in(key, state.step))
        params = lora.restart(state.params, draw, rounding if rounds else None)
        return State(state.step, params, without_moments(state.opt_state))

    # Old moments and factors are read by nothing, and yet are memory for the new ones.
    return jax.jit(merge, donate_argnums=0, keep_unused=True, out_shardings=formats)


def without_moments(opt_state: Any) -> Any:
    """The optimizer state, with Adam's part of the adapters as at the beginning."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)

    def renew(path: Any, node: Any) -> Any:
        of_adapters = any(getattr(key, "key", None) == "adapter" for key in path)
        return jax.tree.map(jnp.zeros_like, node) if is_adam(node) and of_adapters else node

    return jax.tree_util.tree_map_with_path(renew, opt_state, is_leaf=is_adam)


class MergingSteps:
    """A compiled step, and a compiled merge before each step that follows on `every` others."""

    def __init__(self, step: Any, merge: Any, every: int):
        self._step, self._merge, self._every = step, merge, every
        self._done: int | None = None  # steps

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        """One step of training."""
        if self._done is None:
            # Read from the device once. A checkpoint is from before the merge of its step.
            self._done = int(state.step)
        if self._done and self._done % self._every == 0:
            state = self._merge(state)
        self._done += 1
        return self._step(state, batch)

    def memory_analysis(self) -> Any:
        """Of the step; the merge holds one layer's product at a time beside the state."""
        return self._step.memory_analysis()
