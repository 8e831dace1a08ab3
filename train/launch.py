"""From the command line to the first step: data, optimizer, memory, folder and state."""

import logging
import os
from collections.abc import Callable
from typing import Any

import jax

from models import lora
from models.llama import pieces
from optax_subspace import FusedStep, dequantize
from train import (
    batches,
    corpus,
    devices,
    memory,
    mesh,
    placement,
    processes,
    relora,
    report,
    rundir,
    source,
    tensorboard,
    weights,
)
from train.checkpoint import Checkpoints
from train.cli import Command
from train.config import Config, flatten
from train.errors import UsageError
from train.fingerprint import fingerprint
from train.gradient import make_loss
from train.loop import Trainer
from train.optimizer import Optimizer, make
from train.screen import Screen
from train.step import State, init_state, make_fused
from train.tokenizer import check_vocabulary


def run(command: Command) -> None:
    """Does what the command line says.

    Raises:
      TrainError: the run can't begin or go on; the message is for the user.
    """
    # Orbax, tfds and grain log what the trainer tells in its own words; errors are raised as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    processes.join()
    config = command.config
    processes.compare(_shared(config), "start all processes with the same command")
    # (Open as long as the process is.)
    screen = Screen(None if processes.is_first() else open(os.devnull, "w"))  # noqa: SIM115
    if config.log.tensorboard:
        tensorboard.check()
    place = rundir.choose(command)
    grid = mesh.make(config.mesh)
    mesh.check_rows(config, grid)
    source.check(config, grid)
    work = mesh.Work(grid, config.train.micro_batch_size)
    if kind := devices.idle_accelerator():
        screen.say(f"warning: {devices.warning(kind)}")

    data, held_out, stream = processes.in_all(lambda: _read(config, screen))
    weights_key = processes.in_all(lambda: weights.key(config.weights))
    keys: dict[str, Any] = {"the digest of --data.path and its tokenizer": data.key}
    keys |= {"the digest of --weights": weights_key}
    processes.compare(keys, "give all processes the same files")
    is_fused = config.train.fused_backward
    key = jax.random.key(config.train.seed)
    optimizer, fused, begin = prepare(config, work)
    shapes = placement.place(jax.eval_shape(begin, key), optimizer, grid)
    formats = placement.formats(shapes)
    initial = jax.jit(begin, donate_argnums=1, out_shardings=formats)

    adapters = sum(leaf.size for leaf in lora.adapters(shapes.params))
    more = f" and {adapters:,} of adapters" if adapters else ""
    if config.lora.factorize:
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        more = f", {count:,} of them with kernels of rank {config.lora.rank}"
    screen.say(
        f"Model {command.model}: {config.model.num_params():,} parameters{more}. Experiment "
        f"{command.experiment} with {config.optimizer.name} on {grid}.\n{data.name}.\n"
    )
    report.print_projection(screen, optimizer, jax.eval_shape(dequantize, shapes.params))
    batch = batches.shapes(config.data, config.train.batch_size, config.train.sequence_length)
    batch = mesh.with_shardings(batch, jax.tree.map(lambda _: grid.rows, batch))
    # Compiled ahead: the memory is known before any is taken, and a second compilation, which a
    # changed shape or dtype would cost, is an error.
    steps = source.jitted_steps(config, optimizer, fused, work, formats)
    compiled = [step.lower(shapes, batch).compile() for step in steps]
    train_step = source.SourceSteps(*compiled) if len(compiled) > 1 else compiled[0]
    if config.lora.merge_every:
        merge = relora.jitted_merge(config, formats).lower(shapes).compile()
        train_step = relora.MergingSteps(train_step, merge, config.lora.merge_every)
    loss_fn = make_loss(config.model, optimizer)
    parts = pieces(config.model) if is_fused else None
    remat, frozen = config.model.remat, config.lora.freeze
    found, of_gradients = None, "of the largest part" if is_fused else "one full tree"
    if config.train.project_at_source and not is_fused:
        found = source.found(config.model, optimizer, shapes, batch)
        of_gradients = "low-rank, with what the bases need"
    predicted = memory.predict(shapes, batch, loss_fn, parts, remat, frozen, work, found)
    measured = memory.measure(train_step, shapes)
    report.print_memory(screen, predicted, measured, of_gradients)

    if config.model.dtype == "float16" and not is_fused:
        screen.say(
            "warning: without --train.fused_backward float16 has no loss scale, so that small "
            "gradients vanish; bfloat16 needs none."
        )

    place, lock = place.open(command)
    checkpoints = Checkpoints(
        place.checkpoints,
        config.checkpoint.keep,
        fingerprint(config, data.key, shapes, weights_key, grid.fsdp),
        lambda line: screen.say(f"warning: {line}"),
        config.checkpoint.keep_best,
        lambda shards: jax.eval_shape(prepare(config, work, shards)[2], key),
    )
    state = checkpoints.restore(shapes, stream) if place.resumes else None
    if state is not None:
        screen.say(f"Going on in {place.path} after step {int(state.step)}.")
    elif config.resume:
        screen.say(f"There is no checkpoint in {place.path} yet: beginning at the first step.")
    else:
        screen.say(f"Writing to {place.path}.")
    if processes.is_first():
        if state is None:
            # (A run that ended before its first checkpoint may have been of another one.)
            place.describe(command)
        report.save_memory(place.memory, predicted, measured)
    trainer = Trainer(command, screen, place, checkpoints, optimizer, held_out, train_step, work)
    if state is None:
        first = config.weights and weights.read(config.weights, config.model, "--weights")
        state = initial(key, first or None)
        del first
    if processes.is_first():
        weights.keep_tokenizer(data.tokenizer, place.path, weights.context(config))
    try:
        trainer.train(state, stream)
    finally:
        screen.stop()
        stream.close()
        checkpoints.close()
        trainer.close()
        lock.close()


# Keys that each of several processes may have its own of: where files are on its machine.
_OWN = (
    *("run_dir", "weights", "data.path", "data.validation_path", "data.tokenizer"),
    *("data.tfds_dir", "data.cache_dir"),
)


def _shared(config: Config) -> dict[str, Any]:
    """What several processes must have the same."""
    return {f"--{key}": value for key, value in flatten(config).items() if key not in _OWN}


def _read(
    config: Config, screen: Screen
) -> tuple[corpus.Corpus, batches.HeldOut | batches.HeldOutRows, Any]:
    """The documents, those held out, and the batches."""
    tokenizer = weights.tokenizer(config.weights)
    if config.weights and tokenizer is None and config.data.tokenizer is None:
        raise UsageError(
            f"--model {config.weights}: the folder has no {' or '.join(weights.TOKENIZERS)}; put "
            "the model's own there, or give --data.tokenizer"
        )
    data = corpus.load(config.data, tokenizer, screen.say)
    check_vocabulary(data.tokenizer, config.model.vocab_size, config.data.tokenizer or "None")
    held_out = batches.held_out(data, config.train.sequence_length)
    stream = batches.training(
        data, config.train.batch_size, config.train.sequence_length, config.train.seed
    )
    return data, held_out, stream


def prepare(
    config: Config, work: mesh.Work, shards: int | None = None
) -> tuple[Optimizer, FusedStep | None, Callable[..., State]]:
    """The optimizer, the fused step if there is one, and the state before the first step by key.

    Blocks of few bits keep to each of `shards` parts, by default those of the mesh.
    """
    is_fused, shards = config.train.fused_backward, shards or work.shards
    parts = config.train.batch_size // (work.micro_batch_size or config.train.batch_size)
    at_source = config.train.project_at_source
    accumulate = parts if is_fused or at_source else 1
    optimizer = make(
        config.optimizer, config.train.steps, is_fused, config.lora, shards, accumulate
    )
    seed = config.train.seed if config.train.stochastic_rounding else None
    fused = make_fused(config.model, optimizer, seed, work, at_source) if is_fused else None
    int8 = config.train.int8_weights

    def begin(key: jax.Array, params: Any = None) -> State:
        return init_state(config.model, optimizer, key, int8, fused, params, shards)

    return optimizer, fused, begin
