"""The checks on a configuration, before anything is allocated."""

import dataclasses

from train.config import (
    ADAMW,
    APOLLO,
    MOMENTA,
    PROJECTED,
    SCALED,
    SUBSPACE,
    Config,
    DataConfig,
    follows_every_gradient,
    get,
    kind_of_path,
)
from train.errors import UsageError

# Every byte is a piece, so that no text is lost; the rest is for what the corpus repeats.
LEAST_PIECES = 260
_INT32_MAX = 2**31 - 1
# Beyond these the arithmetic, which is float32, has infinity or zero.
_FLOAT32_MAX, _FLOAT32_TINY = 3.4028234e38, 1.1754944e-38

_WHOLE_NUMBERS = {
    "optimizer.rank": 1,
    "optimizer.every": 1,
    "lora.rank": 0,
    "lora.merge_every": 0,
    "lora.rewarm_steps": 1,
    "data.vocab_size": LEAST_PIECES,
    "data.split_seed": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.sequence_length": 2,
    "train.seed": 0,
    "train.eval_every": 1,
    "train.eval_batches": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "log.every": 1,
    "log.print_every": 1,
}

_OPTIONAL = ("lora.rewarm_steps", "train.micro_batch_size", "mesh.data", "mesh.fsdp")

NO_ADAPTERS = "--lora.factorize has factors in place of kernels, and no adapters"

# key: lowest, highest, whether the lowest itself is allowed.
_RANGES = {
    "optimizer.learning_rate": (0.0, _FLOAT32_MAX, False),
    "optimizer.scale": (0.0, _FLOAT32_MAX, False),
    "optimizer.b1": (0.0, 1.0, True),
    "optimizer.b2": (0.0, 1.0, True),
    "optimizer.eps": (0.0, _FLOAT32_MAX, False),
    "optimizer.weight_decay": (0.0, _FLOAT32_MAX, True),
    "optimizer.clip_norm": (0.0, _FLOAT32_MAX, False),
    "optimizer.warmup_fraction": (0.0, 1.0, True),
    "optimizer.final_fraction": (0.0, 1.0, True),
    "lora.alpha": (0.0, _FLOAT32_MAX, False),
    "lora.learning_rate": (0.0, _FLOAT32_MAX, False),
    "data.validation_fraction": (0.0, 1.0, False),
}


def validate(config: Config) -> None:
    """Raises UsageError for the first value that can't work; nothing is allocated before."""
    for key, fewest in _WHOLE_NUMBERS.items():
        value = get(config, key)
        if value is None and key in _OPTIONAL:
            continue
        if not fewest <= value <= _INT32_MAX:
            limit = "" if value < fewest else f" and at most {_INT32_MAX}"
            raise UsageError(f"--{key} {value}: give a whole number of at least {fewest}{limit}")
    for key, (low, high, closed) in _RANGES.items():
        number = get(config, key)
        if number is None and key == "optimizer.clip_norm":
            continue
        least = low if closed else max(low, _FLOAT32_TINY)
        if number is None or not least <= number <= high:
            words = f"at least {low:g}" if closed else f"above {low:g}"
            if number is not None and low < number < least:
                words = f"of at least {least:g}"
            limit = f" and at most {high:g}" if high < _FLOAT32_MAX or (number or 0) > high else ""
            raise UsageError(f"--{key} {number}: give a number {words}{limit}")
    for key in ("optimizer.b1", "optimizer.b2"):
        if get(config, key) >= 1:
            raise UsageError(f"--{key} {get(config, key)}: give a number below 1, e.g. 0.9")
    if config.optimizer.name == "adalomo" and not config.train.fused_backward:
        raise UsageError(
            "--optimizer.name adalomo: takes each layer's matrices one by one, which only the "
            "fused backward pass does here; add --train.fused_backward"
        )
    if config.log.hamiltonian and (config.optimizer.name not in MOMENTA or config.lora.adapts):
        what = (
            "adapters have a learning rate of their own"
            if config.lora.adapts
            else (f"{config.optimizer.name} has no kinetic energy that is known here")
        )
        raise UsageError(f"--log.hamiltonian: {what}; leave it out")
    if config.log.hamiltonian and config.optimizer.name in ADAMW and config.optimizer.scale != 1:
        raise UsageError(
            f"--log.hamiltonian: with --optimizer.scale {config.optimizer.scale:g} the kernels of "
            f"{config.optimizer.name} have a rate of their own; leave one of them out"
        )
    if config.log.hamiltonian and config.train.eval_every >= config.train.steps:
        raise UsageError(
            f"--log.hamiltonian: is measured at evaluations on a part of the held-out split, of "
            f"which --train.eval_every {config.train.eval_every} leaves none; give fewer than the "
            f"{config.train.steps} steps of the run"
        )
    if config.optimizer.name in SCALED and config.optimizer.side in ("both", "auto"):
        raise UsageError(
            f"--optimizer.side {config.optimizer.side}: {config.optimizer.name} scales along the "
            "axis that is not projected, and there may be none; give shorter, longer, left or right"
        )
    random = config.optimizer.projector in (None, "random_projection")
    if config.optimizer.name in APOLLO and random and config.optimizer.moments == "project":
        raise UsageError(
            f"--optimizer.moments project: the random bases of {config.optimizer.name} are not "
            "orthonormal, as turning moments needs them; give keep or reset"
        )
    if config.optimizer.moments == "reset" and follows_every_gradient(config.optimizer):
        raise UsageError(
            "--optimizer.moments reset: with a projector that follows every gradient the moments "
            "would be forgotten at every step; give keep or project"
        )
    _validate_source(config)
    _validate_micro_batches(config)
    if config.topology is not None and not config.compile_only:
        raise UsageError(f"--topology {config.topology}: is compiled for alone; add --compile_only")
    _validate_adapters(config)
    if config.data.segments and config.data.layout != "packed":
        raise UsageError(
            "--data.segments: with --data.layout documents each sequence is one document; leave it "
            "out"
        )
    most = config.data.validation_tokens
    if most is not None and most < 1:
        raise UsageError(f"--data.validation_tokens {most}: give a whole number of at least 1")
    if config.data.validation_fraction >= 1:
        raise UsageError(
            f"--data.validation_fraction {config.data.validation_fraction}: leaves nothing to "
            "train on; give a number below 1, e.g. 0.1"
        )
    if config.data.tokenizer is None and config.data.vocab_size > config.model.vocab_size:
        raise UsageError(
            f"--data.vocab_size {config.data.vocab_size}: the tokenizer would have more pieces "
            f"than the model has embeddings; give at most --model.vocab_size "
            f"{config.model.vocab_size}, or a model with more"
        )


def _validate_source(config: Config) -> None:
    if not config.train.project_at_source:
        return
    key = "--train.project_at_source"
    if config.optimizer.name not in SUBSPACE:
        raise UsageError(
            f"{key}: {config.optimizer.name} needs whole gradients; leave it out, or choose "
            f"--optimizer.name {SUBSPACE[0]}"
        )
    if config.lora.rank:
        raise UsageError(
            f"{key}: kernels with adapters are no plain products; leave one of them out"
        )
    if config.train.fused_backward and not config.model.remat:
        raise UsageError(
            f"{key}: in the fused backward pass blocks are computed anew; add --model.remat"
        )
    if config.model.dtype == "float16" and not config.train.fused_backward:
        raise UsageError(
            f"{key}: small gradients of float16 need the loss scale of --train.fused_backward; "
            "add it, or give --model.dtype bfloat16"
        )


def _validate_adapters(config: Config) -> None:
    adapters, optimizer = config.lora, config.optimizer.name
    read = ("rank", "factorize") if adapters.factorize else ("rank",)
    for field in dataclasses.fields(adapters):
        value = getattr(adapters, field.name)
        if adapters.adapts or field.name in read or value == field.default:
            continue
        if adapters.factorize and adapters.rank:
            raise UsageError(f"--lora.{field.name} {value}: {NO_ADAPTERS}; leave it out")
        raise UsageError(f"--lora.{field.name}: there are no adapters; give --lora.rank, e.g. 8")
    if adapters.factorize:
        if not adapters.rank:
            raise UsageError("--lora.factorize: the factors need a rank; give --lora.rank, e.g. 8")
        most = min(min(shape) for shape in config.model.kernel_shapes())
        if adapters.rank > most:
            raise UsageError(
                f"--lora.rank {adapters.rank}: the shortest side of the kernels is {most}, and "
                f"their factors have no higher rank; give at most {most}"
            )
        if config.train.int8_weights:
            raise UsageError(
                "--train.int8_weights: is for the kernels, in whose place --lora.factorize has "
                "factors; leave one of the two out"
            )
    takes_kernels = optimizer in (*PROJECTED, "contrib_galore", "muon")
    takes_kernels |= optimizer == "adamw" and config.optimizer.scale != 1
    if takes_kernels and (adapters.factorize or adapters.freeze == "kernels"):
        key = "--lora.factorize" if adapters.factorize else "--lora.freeze kernels"
        raise UsageError(
            f"--optimizer.name {optimizer}: is for the gradients of kernels, and with {key} there "
            "are none; give another optimizer, e.g. --optimizer.name adamw with --optimizer.scale 1"
        )
    _validate_restarts(config)


def _validate_restarts(config: Config) -> None:
    every, rewarm = config.lora.merge_every, config.lora.rewarm_steps
    if rewarm is not None and not every:
        raise UsageError(
            f"--lora.rewarm_steps {rewarm}: the adapters never begin anew; give --lora.merge_every"
        )
    if every >= config.train.steps:
        raise UsageError(
            f"--lora.merge_every {every}: no step follows in a run of {config.train.steps}; give "
            "fewer"
        )
    if rewarm is not None and rewarm > every:
        raise UsageError(
            f"--lora.rewarm_steps {rewarm}: the next merge comes after {every}; give at most that"
        )


def _validate_micro_batches(config: Config) -> None:
    size, rows = config.train.micro_batch_size, config.train.batch_size
    if size is None:
        return
    key = f"--train.micro_batch_size {size}"
    if rows % size:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - size))
        raise UsageError(
            f"{key}: does not divide --train.batch_size {rows}; give a divisor, e.g. {nearest}"
        )
    one_pass = "fused_backward" if config.train.fused_backward else "project_at_source"
    if size == rows or not getattr(config.train, one_pass):
        return
    # What is added up in such a pass is what the optimizer keeps of a gradient.
    if config.optimizer.name not in SUBSPACE or config.lora.adapts:
        what = "adapters" if config.lora.adapts else config.optimizer.name
        raise UsageError(
            f"{key}: {what} would need the whole gradient tree, which --train.{one_pass} never "
            f"has; leave one of the two out, or train without adapters by one of "
            f"{', '.join(SUBSPACE)}"
        )
    if config.optimizer.clip_norm is not None:
        raise UsageError(
            f"{key}: the gradient's norm is not known before the last micro-batch, by which "
            f"--train.{one_pass} has let go of the first; add --optimizer.clip_norm None"
        )
    if config.model.dtype == "float16":
        raise UsageError(
            f"{key}: a micro-batch that overflows would be left out of its step; with "
            f"--train.{one_pass} give --model.dtype bfloat16"
        )


def unread_data_keys(data: DataConfig) -> dict[str, str]:
    """Fields of the data's configuration that nothing reads beside the others, and why.

    >>> sorted(unread_data_keys(DataConfig(tokenizer="bytes")))
    ['bad_shards', 'tfds_dir', 'vocab_size']
    """
    unread = {}
    kinds = {kind_of_path(data.path)}
    if data.validation_path is not None:
        kinds.add(kind_of_path(data.validation_path))
    if "tfds" not in kinds:
        unread["tfds_dir"] = "no path begins with tfds:"
    if "shards" not in kinds:
        unread["bad_shards"] = "there are no JSON lines to read"
    if data.tokenizer is not None:
        unread["vocab_size"] = "--data.tokenizer has pieces of its own"
    if data.validation_path is not None or data.path is not None and data.path.startswith("tfds:"):
        unread |= dict.fromkeys(
            ("validation_fraction", "split_seed"), "the held-out documents are given"
        )
    return unread
