"""From the configuration to an optax transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import lora
from models.llama import subspace_rules
from optax_subspace import (
    Kinetic,
    ProjectionState,
    Projector,
    adalomo,
    adam_kinetic,
    adamw8bit,
    apollo,
    apollo_mini,
    fira,
    galore,
    galore_adamw8bit,
    heavy_ball,
    history_pca,
    lion_kinetic,
    lomo,
    nesterov,
    oja,
    online_pca,
    online_subspace_adamw8bit,
    online_subspace_descent,
    random_projection,
    scale_by_hamiltonian_descent,
    subspace_iteration,
    svd,
)
from train import baselines
from train.config import (
    APOLLO,
    FIRST_MOMENTS_ALONE,
    MOMENTA,
    PROJECTED,
    READ_BY,
    SUBSPACE,
    LoraConfig,
    OptimizerConfig,
    follows_every_gradient,
)

NO_ADAPTERS = LoraConfig()
# Values of a leaf whose moments in 8 bits are decoded at once: 16 MiB in float32.
SLICE_SIZE = 2**22
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


class Optimizer(NamedTuple):
    """An optimizer with what the log says about it."""

    tx: optax.GradientTransformation
    schedule: Schedule  # step, counted from 0 -> learning rate
    scale: float  # learning rate x scale is the effective rate of projected matrices
    projects: bool
    clip_norm: float | None  # what the step has to clip gradients to, where tx does not
    adapters: LoraConfig
    kinetic: Kinetic | None  # of its momenta, where tx itself does not tell


def make(
    config: OptimizerConfig,
    steps: int,
    fused: bool = False,
    adapters: LoraConfig = NO_ADAPTERS,
    shards: int = 1,
    accumulate: int = 1,
) -> Optimizer:
    """Clipping by global norm, then the named optimizer under the warm-up and cosine schedule.

    In the fused backward pass no transformation sees all gradients: the step clips, and
    `accumulate` micro-batches are added up in the subspace. Blocks of 8-bit states keep to each of
    `shards` parts of an axis.
    """
    # (The rate may be a traced number.)
    assert config.learning_rate is not None, "train.config.resolve fills it in"
    assert config.scale is not None
    schedule = warmup_cosine(
        config.learning_rate, steps, config.warmup_fraction, config.final_fraction
    )
    # As in ReLoRA's own code, the rates of all that is trained fall and rise together.
    schedule = jagged(schedule, adapters)
    projects = config.name in PROJECTED
    if projects:
        settings: dict[str, Any] = {
            "scale": config.scale,
            "side": config.side,
            "rules": subspace_rules(),
            "projector_dtype": config.projector_dtype,
            "weight_decay": config.weight_decay,
        }
        if config.name in SUBSPACE:
            settings["accumulate"] = accumulate
        if config.moments is not None:
            settings["moments"] = config.moments
        if config.projector is not None:
            settings["projector"] = _projector(config)
        elif not follows_every_gradient(config):
            settings["every"] = config.every
    betas: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    adam = dict(betas)
    # (Slices of a leaf that is split over devices would be gathered.)
    slice_size = SLICE_SIZE if shards == 1 else None
    storage: dict[str, Any] = {"code": config.code, "shards": shards, "slice_size": slice_size}
    if config.code in FIRST_MOMENTS_ALONE:
        storage["rules"] = [("(^|/)nu/", "dynamic")]
    kinetic = None
    match config.name:
        case "galore":
            within = None if config.kinetic == "adam" else _momentum(config)
            adam |= {"mu_dtype": config.moment_dtype, "nu_dtype": config.moment_dtype}
            inner = galore(schedule, config.rank, inner=within, **adam, **settings)
        case "galore_adamw8bit":
            inner = galore_adamw8bit(schedule, config.rank, **adam, storage=storage, **settings)
        case "online_subspace_descent":
            inner = online_subspace_descent(
                schedule, config.rank, inner=_momentum(config), **settings
            )
        case "online_subspace_adamw8bit":
            inner = online_subspace_adamw8bit(
                schedule, config.rank, **adam, storage=storage, **settings
            )
        case "adamw":
            # (Of `optax.adamw`, which this is, the kernels' updates before decay.)
            inner = optax.chain(
                _kernels_scaled(optax.scale_by_adam(**adam), config.scale),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(schedule),
            )
            kinetic = adam_kinetic(**adam)
        case "adamw8bit":
            inner = adamw8bit(schedule, **adam, weight_decay=config.weight_decay, storage=storage)
        case "lomo":
            inner = lomo(schedule, weight_decay=config.weight_decay)
        case "adalomo":
            inner = adalomo(schedule, weight_decay=config.weight_decay)
        case "apollo":
            inner = apollo(schedule, config.rank, **adam, **settings)
        case "apollo_mini":
            inner = apollo_mini(schedule, **adam, **settings)
        case "fira":
            inner = fira(schedule, config.rank, **adam, **settings)
        case _:
            inner = baselines.make(config, schedule, fused)
    if adapters.adapts:
        rate = jagged(
            warmup_cosine(
                adapters.learning_rate, steps, config.warmup_fraction, config.final_fraction
            ),
            adapters,
        )
        # Those of another optimizer than Adam are not for it.
        of_adapters = betas if config.name in MOMENTA else {"eps": config.eps}
        parts = {
            "base": optax.set_to_zero() if adapters.freeze == "all" else inner,
            "adapter": optax.adamw(rate, **of_adapters, weight_decay=config.weight_decay),
            "frozen": optax.set_to_zero(),
        }
        labels = functools.partial(lora.labels, frozen=adapters.freeze)
        inner = optax.multi_transform(parts, labels)
        if adapters.freeze == "all":
            schedule, projects = rate, False
    scale = config.scale if config.name in READ_BY["scale"] and adapters.freeze != "all" else 1.0
    if fused or config.clip_norm is None:
        return Optimizer(inner, schedule, scale, projects, config.clip_norm, adapters, kinetic)
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)
    return Optimizer(tx, schedule, scale, projects, None, adapters, kinetic)


def _kernels_scaled(tx: optax.GradientTransformation, scale: float) -> optax.GradientTransformation:
    """`tx` with the updates of the layers' kernels scaled, as a subspace would."""
    if scale == 1:
        return tx

    kernels = lambda params: baselines.by_plan(lambda leaf: leaf.projected, params)
    return optax.chain(tx, optax.masked(optax.scale(scale), kernels))


def _projector(config: OptimizerConfig) -> Projector:
    match config.projector:
        case "svd":
            return svd(config.every)
        case "subspace_iteration":
            return subspace_iteration(config.every)
        case "random_projection":
            return random_projection(config.every, orthonormal=config.name not in APOLLO)
        case "online_pca":
            return online_pca()
        case "online_pca_lion":
            return online_pca(optax.lion(0.02, weight_decay=0.0))
        case "online_pca_sgd":
            return online_pca(optax.sgd(0.1), relative=False)
        case "oja":
            return oja()
    return history_pca()


def _momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    numbers: Any = (config.b1, config.b2)  # once the configuration is resolved
    b1, b2 = numbers
    kinetics = {
        "adam": lambda: adam_kinetic(b1, b2, config.eps),
        "heavy_ball": lambda: heavy_ball(b1),
        "nesterov": lambda: nesterov(b1),
        "lion": lambda: lion_kinetic(b1, b2),
    }
    dtype = config.moment_dtype
    return scale_by_hamiltonian_descent(kinetics[config.kinetic](), mu_dtype=dtype, nu_dtype=dtype)


def warmup_cosine(
    peak: float, steps: int, warmup_fraction: float, final_fraction: float
) -> Schedule:
    """Linear rise over the first steps, then a cosine to `final_fraction` of the peak.

    No step is lost: the first one has peak / W, the W-th the peak, the last the final rate.

    >>> rate = warmup_cosine(1.0, 20, 0.1, 0.1)
    >>> [round(float(rate(step)), 3) for step in (0, 1, 19)]
    [0.5, 1.0, 0.1]
    """
    warmup = max(1, round(warmup_fraction * steps)) if warmup_fraction else 0
    rest = max(1, steps - max(warmup, 1))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        rising = (t + 1) / max(warmup, 1)
        progress = jnp.clip((t - max(warmup - 1, 0)) / rest, 0.0, 1.0)
        cosine = final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(t < warmup, rising, cosine)

    return schedule


def jagged(schedule: Schedule, adapters: LoraConfig) -> Schedule:
    """The schedule with a linear rise to it after each time that the adapters begin anew.

    Step 0 of W after it has 1 / W of the schedule's rate, step W - 1 all of it.

    Source: Lialin et al. 2023 (arXiv 2307.05695), section 3, the jagged schedule.

    >>> rate = jagged(lambda step: 1.0, LoraConfig(8, merge_every=5, rewarm_steps=2))
    >>> [float(rate(step)) for step in (0, 4, 5, 6, 9, 10, 11)]
    [1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0]
    """
    every, rewarm = adapters.merge_every, adapters.rewarm_steps
    if not every:
        return schedule
    assert rewarm is not None, "train.config.resolve fills it in"

    def with_restarts(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.int32)
        rising = jnp.minimum((t % every + 1).astype(jnp.float32) / rewarm, 1.0)
        return schedule(step) * jnp.where(t < every, 1.0, rising)

    return with_restarts


def skipped_gradients(opt_state: Any) -> int:
    """How many gradients of single leaves were not finite, by what the subspaces have counted."""
    is_projection = lambda node: isinstance(node, ProjectionState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_projection)
    counts = jax.tree.leaves([node.skipped for node in nodes if is_projection(node)])
    return sum(int(np.sum(count)) for count in counts)
