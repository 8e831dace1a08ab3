"""Writes the model of a run as a Hugging Face folder: python -m train.export RUN OUT [--step N].

Adapters are merged into their kernels, factors multiplied out, int8 weights dequantised; the
tokenizer's file goes beside. `transformers`, and `--model OUT` here, read the folder. What stands
before a text is the tokenizer's own then: packed documents followed the end of others.
"""

import dataclasses
import math
import shutil
import sys
import tempfile
from pathlib import Path

from tyro.conf import Positional

from train.command import main


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes the model of a run as a Hugging Face folder, which transformers reads."""

    run: Positional[str]
    """Folder of the run"""
    out: Positional[str]
    """Folder to write, which must not be there yet"""
    step: int | None = None
    """Checkpoint of this step; None is the newest good one"""
    max_shard_gb: float = 5.0
    """Weights beyond so many gigabytes go into several files"""


def export(arguments: Arguments) -> Path:
    """Does what the command line says and returns the folder, whole or not there at all.

    Raises:
      UsageError: the run can't be read, or the folder not be written.
    """
    from models import huggingface
    from train import runs, weights
    from train.errors import UsageError, no_space

    run, out = Path(arguments.run), Path(arguments.out)
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; give that of a run")
    if not runs.is_run(run):
        raise UsageError(f"{run}: is no run, it has no checkpoints; give a run's folder")
    if out.exists():
        raise UsageError(f"{out}: is there already; give another folder")
    if not 0 < arguments.max_shard_gb < math.inf:
        raise UsageError(f"--max_shard_gb {arguments.max_shard_gb}: give a number above 0")
    model = runs.load(arguments.run, arguments.step)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out}: can't be made ({error.strerror}); give another folder") from None
    try:
        huggingface.write(
            temporary,
            model.config,
            model.params,
            context=model.context,
            end=model.tokenizer.end,
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        )
        weights.keep_tokenizer(model.tokenizer, temporary, model.context)
        temporary.chmod(0o755)
        temporary.rename(out)
    except Exception as error:
        reason = no_space(error)
        if reason is None:
            raise
        raise UsageError(f"{out}: {reason}; free some, or give another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{model.name}: {model.config.num_params():,} parameters, {size:,} bytes in {out}")
    return out


if __name__ == "__main__":
    sys.exit(main("train.export", Arguments, export))
