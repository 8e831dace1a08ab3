"""How well the rules that follow a gradient keep to its subspace, as it drifts and when it jumps.

A gradient is U diag(s) Z + noise with s_i = i^-0.7 over 4 r directions U (m, 4 r) that turn by a
constant angle a step, and are replaced once; Z (4 r, n) is drawn anew at each step. Captured energy
is that of the expected gradient, E[G G^T] = U diag(s)^2 U^T, relative to its r leading directions.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import optax_subspace as osub
from benchmarks import _timing
from optax_subspace import _refresh

PUBLISHED = osub.online_pca(
    optax.adamw(1 / 200, weight_decay=0.01),
    orthogonality=0.0,
    relative=False,
    relative_to="gradient",
)
# Steps after which a rule has left behind that its first basis is that of one gradient: as many as
# it is given after a jump.
WARM = 30
RULES = {
    "history_pca()": osub.history_pca(),
    "online_pca()": osub.online_pca(),
    "online_pca as published": PUBLISHED,
    "oja()": osub.oja(),
    "subspace_iteration(1)": osub.subspace_iteration(1),
    "svd(200)": osub.svd(200),
}
# rows, columns, dtype, noise
CASES = [
    (256, 256, "float32", 0.0),
    (512, 512, "float32", 0.0),
    (512, 1376, "float32", 0.0),
    (1376, 512, "float32", 0.0),
    (512, 512, "float32", 0.3),
    (512, 512, "bfloat16", 0.0),
    (1024, 1024, "float32", 0.0),
    (2048, 2048, "float32", 0.0),
    (4096, 4096, "float32", 0.0),
]
MARKS = (1, 20, 30, 50, 100)  # steps after the jump
# To be told apart in black and white as well.
LINES = ["-", "--", "-.", ":", (0, (8, 2)), (0, (1, 3))]
LOOKS = {
    name: {"color": f"C{i}", "linestyle": line, "marker": "os^Dvx"[i], "markersize": 4, "lw": 1}
    for i, (name, line) in enumerate(zip(RULES, LINES, strict=True))
}


class Track(NamedTuple):
    """Energy relative to the best, and the largest entry of |P^T P - I|, at each step."""

    energy: np.ndarray
    skew: np.ndarray


def track(
    rule: osub.Projector,
    rows: int,
    columns: int,
    rank: int,
    steps: int,
    jump: int,
    angle: float,
    dtype: str,
    noise: float,
    seed: int = 0,
) -> Track:
    """Follows one gradient."""
    width = 4 * rank if 8 * rank <= rows else rows // 2
    sizes = jnp.arange(1, width + 1, dtype=jnp.float32) ** -0.7
    keys = jax.random.split(jax.random.key(seed), 4)
    plane = lambda key: jnp.linalg.qr(jax.random.normal(key, (rows, 2 * width)))[0]
    planes = jnp.stack([plane(keys[0]), plane(keys[1])])
    basis = jnp.zeros((rows, rank))
    state = rule.init(keys[2], rows, columns, rank)
    best = jnp.sum(sizes[:rank] ** 2)
    matrix = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    plan = osub.plan(matrix, rank=rank, side="left")[0]

    def directions(t):
        now = planes[(t >= jump).astype(jnp.int32)]
        turn = angle * t
        return now[:, :width] * jnp.cos(turn) + now[:, width:] * jnp.sin(turn)

    def step(carry, t):
        basis, state = carry
        key = jax.random.fold_in(keys[3], t)
        u = directions(t)
        gradient = (u * sizes) @ jax.random.normal(key, (width, columns))
        if noise:  # 1.0 is as strong in all directions together as the gradient is
            spread = noise * jnp.sqrt(jnp.sum(sizes**2) / rows)
            gradient += spread * jax.random.normal(jax.random.fold_in(key, 1), gradient.shape)
        gradient = gradient.astype(dtype).astype(jnp.float32)
        every = rule.every or steps + 1
        new = jax.lax.cond(
            t % every == 0,
            lambda: _refresh.checked(rule.update, gradient, basis, state)[:2],
            lambda: (basis, state),
        )
        if rule.follow is not None:
            moves = t % every != 0
            followed = _refresh.follow(
                rule, plan, moves, gradient, "left", new[0].T @ gradient, *new, False, ~moves
            )
            new = followed.basis, followed.rule
        span = jnp.linalg.qr(new[0])[0]
        energy = jnp.sum((span.T @ (directions(t + 1) * sizes)) ** 2) / best
        skew = jnp.max(jnp.abs(new[0].T @ new[0] - jnp.eye(rank)))
        return new, (energy, skew)

    run = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps))[1])
    energy, skew = run((basis, state))
    return Track(np.asarray(energy), np.asarray(skew))


def main() -> None:
    """Prints a table per case and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--jump", type=int, default=210)
    parser.add_argument("--angle", type=float, default=2e-3, help="radians a step")
    parser.add_argument("--most_rows", type=int, default=4096)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--figure", type=Path, default=Path("benchmarks/results/tracking.png"))
    args = parser.parse_args()
    if args.jump + max(MARKS) > args.steps:
        parser.error(f"--steps must be at least --jump + {max(MARKS)}")
    print(f"{jax.default_backend()}, {_timing.versions('jax', 'optax')}")
    print(f"rank {args.rank}, {args.angle} radians a step, a jump at step {args.jump}")
    curves = {}
    for rows, columns, dtype, noise in CASES:
        if rows > args.most_rows:
            continue
        case = f"{rows} x {columns}, {dtype}" + (", noise" if noise else "")
        table = []
        for name in args.rules:
            found = track(
                RULES[name],
                rows,
                columns,
                args.rank,
                args.steps,
                args.jump,
                args.angle,
                dtype,
                noise,
            )
            curves[case, name] = found.energy
            steady = found.energy[WARM : args.jump - 1]
            after = [f"{found.energy[args.jump + k - 1]:.3f}" for k in MARKS]
            skew = found.skew.max()
            table.append([name, f"{steady.min():.4f}", *after, f"{skew:.4f}"])
        header = ["rule", f"least from {WARM} on", *(f"+{k}" for k in MARKS), "|P'P - I|"]
        print(f"\n{case}\n{_timing.table(header, table)}", flush=True)
    draw(curves, args.figure)
    print(f"\n{args.figure}")


def draw(curves: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    """A panel per case, a line per rule."""
    cases = list(dict.fromkeys(case for case, _ in curves))
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = Figure(figsize=(4.5 * across, 3 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True)).ravel()
    for axes, case in zip(panels, cases, strict=False):
        for i, (name, look) in enumerate(LOOKS.items()):
            if (case, name) in curves:
                # (Marks apart from each other, where lines lie upon one another.)
                axes.plot(curves[case, name], **look, markevery=(5 * i, 30), label=name)
        axes.set_title(case, fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel("captured energy / best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
