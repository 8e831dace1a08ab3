"""Parameter trees of the tests, what their gradients are, and whether two trees are alike."""

import contextlib

import jax
import jax.numpy as jnp

from optax_subspace import MatrixSpec

RULES = [
    ("stack", MatrixSpec(1, 2)),
    ("experts", MatrixSpec(2, 3)),
    ("heads", MatrixSpec(0, (1, 2))),
]


def params(dtype=jnp.float32):
    """Leaves projected right, left, per slice, per expert, over joined axes, and not at all."""
    key = jax.random.key(0)
    shapes = {
        "tall": (20, 12),
        "wide": (12, 20),
        "square": (16, 16),
        "stack": (3, 12, 20),
        "experts": (2, 3, 20, 12),
        "heads": (16, 4, 6),
        "small": (3, 30),
        "bias": (12,),
        "embedding": (50, 16),
    }
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def grads(tree, step=0):
    """Deterministic gradients of full rank that differ from step to step."""
    return jax.tree.map(lambda w: jnp.sin(3 * w + step) + 0.1 * w, tree)


@contextlib.contextmanager
def counting_compilations():
    """Collects an entry for each compilation that the back end carries out within the block."""
    compilations = []

    def listen(event, duration, **kwargs):
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def kernels(**shapes):
    """Random matrices of the shapes given."""
    keys = jax.random.split(jax.random.key(3), len(shapes))
    return {n: jax.random.normal(k, s) / 4 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def assert_close(ours, theirs, tolerance=1e-5):
    """Leaf by leaf, the distance relative to the leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        distance = jnp.linalg.norm(jnp.ravel(a - b))
        assert distance <= tolerance * jnp.linalg.norm(jnp.ravel(b)), (path, distance)
