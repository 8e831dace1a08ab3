"""The time of one basis update by every rule against `jnp.linalg.svd`, and what it captures.

The gradient has singular values 1/i. Rules that start from a basis get that of a gradient before,
whose singular vectors were turned by a tenth. Rules that follow need two products of the gradient;
the second row leaves the first of them out, since a training step has it: it is the projection.
(At one step of ten such a rule's drift is measured besides, which is not timed here.)
"""

import argparse
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

import optax_subspace as osub
from benchmarks import _timing
from optax_subspace import _refresh

SHAPES = {"60m": (512, 1376, 128), "350m": (1024, 2736, 256), "1b": (2048, 5461, 512)}
PEER = "jnp.linalg.svd"


def gradients(m: int, n: int, turn: float) -> tuple[jax.Array, jax.Array]:
    """Two gradients (m, n) with singular values 1/i, the second one's vectors turned a little."""
    keys = jax.random.split(jax.random.key(0), 4)
    orthonormal = lambda x: jnp.linalg.qr(x)[0]
    u = orthonormal(jax.random.normal(keys[0], (m, m)))
    v = orthonormal(jax.random.normal(keys[1], (n, m)))
    sigma = 1 / jnp.arange(1, m + 1, dtype=jnp.float32)
    noise = jax.random.normal(keys[2], (m, m)) / jnp.sqrt(m)
    later = orthonormal(u + turn * u @ noise)
    return (u * sigma) @ v.T, (later * sigma) @ v.T


def energy(basis: jax.Array, gradient: jax.Array) -> float:
    """Share of the squared norm within the basis' span."""
    span = jnp.linalg.qr(basis)[0]
    return float(jnp.sum((span.T @ gradient) ** 2) / jnp.sum(gradient**2))


def rules(rank: int) -> dict[str, osub.Projector]:
    """What is timed."""
    return {
        "svd()": osub.svd(),
        "subspace_iteration()": osub.subspace_iteration(),
        "online_pca()": osub.online_pca(),
        "history_pca()": osub.history_pca(),
        "oja()": osub.oja(),
    }


def one_update(
    rule: osub.Projector, gradient: jax.Array, basis: jax.Array, within: bool = False
) -> Callable[[], jax.Array]:
    """A compiled call of the rule, as a training step makes it."""
    m, n = gradient.shape
    state = rule.init(jax.random.key(0), m, n, basis.shape[1])
    if rule.follow is None:
        compiled = jax.jit(lambda g, p, s: _refresh.checked(rule.update, g, p, s)[0])
    else:
        # The state of a rule that has seen the gradient before.
        _, state = rule.update(gradient / jnp.max(jnp.abs(gradient)), basis, state)
        moves = jnp.array(True)
        plan = osub.plan(gradient, rank=basis.shape[1], side="left")[0]
        follow = lambda g, p, s, c: (
            _refresh.follow(rule, plan, moves, g, "left", c, p, s, False, ~moves).basis
        )
        if within:
            known = jax.jit(follow)
            low = basis.T @ gradient
            return lambda: jax.block_until_ready(known(gradient, basis, state, low))
        compiled = jax.jit(lambda g, p, s: follow(g, p, s, p.T @ g))
    return lambda: jax.block_until_ready(compiled(gradient, basis, state))


def main() -> None:
    """Prints a table per shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, {_timing.versions('jax', 'optax')}")
    for name in args.shapes:
        m, n, rank = SHAPES[name]
        before, gradient = gradients(m, n, turn=0.1)
        basis = jnp.linalg.svd(before, full_matrices=False)[0][:, :rank]
        lapack = jax.jit(lambda g: jnp.linalg.svd(g, full_matrices=False))
        calls = {PEER: lambda f=lapack, g=gradient: jax.block_until_ready(f(g)[0])}
        calls |= {k: one_update(r, gradient, basis) for k, r in rules(rank).items()}
        for k, r in rules(rank).items():
            if r.follow is not None:
                calls[f"{k}, projection given"] = one_update(r, gradient, basis, within=True)
        best = energy(calls[PEER]()[:, :rank], gradient)
        found = {k: energy(call()[:, :rank], gradient) / best for k, call in calls.items()}
        repeat = {k: 1 if k in (PEER, "svd()") else 8 for k in calls}
        timings = _timing.alternate(calls, rounds=args.rounds, repeat=repeat, warmup=1, rest=0.3)
        peer = timings[PEER].median
        rows = [
            [
                k,
                f"{t.median * 1e3:.1f}",
                f"{t.spread:.2f}",
                f"{peer / t.median:.1f}",
                f"{found[k]:.5f}",
            ]
            for k, t in timings.items()
        ]
        print(f"\n{name}: {m} x {n}, rank {rank}; the basis before: {energy(basis, gradient):.5f}")
        print(_timing.table(["rule", "ms", "spread", "times faster", "energy / best"], rows))


if __name__ == "__main__":
    main()
