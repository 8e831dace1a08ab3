"""The loop: steps, evaluations and checkpoints, and what is written on the way."""

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import (
    batches,
    mesh,
    processes,
    records,
    report,
    rundir,
    tensorboard,
    throughput,
)
from train.checkpoint import Checkpoints
from train.cli import Command
from train.clock import Clock
from train.errors import DivergedError, Interrupted, UsageError, one_line
from train.optimizer import Optimizer, skipped_gradients
from train.screen import Screen, duration
from train.signals import Signals
from train.step import (
    Metrics,
    State,
    all_finite,
    everywhere,
    make_eval_step,
    make_hamiltonian_step,
    make_subspace_step,
)


class _BrokenOff(Exception):
    """An evaluation that a signal ends; nothing of it was written."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Trainer:
    """The loop and what it writes on the way."""

    def __init__(
        self,
        command: Command,
        screen: Screen,
        place: rundir.RunDir,
        checkpoints: Checkpoints,
        optimizer: Optimizer,
        held_out: batches.HeldOut | batches.HeldOutRows,
        train_step: Any,
        work: mesh.Work,
    ):
        self.command, self.config = command, command.config
        self.screen, self.place, self.checkpoints = screen, place, checkpoints
        self.optimizer, self.held_out = optimizer, held_out
        assert work.mesh is not None
        self.train_step, self.mesh = train_step, work.mesh
        self.eval_step = make_eval_step(self.config.model, work)
        self.subspace_step = make_subspace_step(self.config.model, optimizer, work)
        self.hamiltonian_step = make_hamiltonian_step(optimizer, work)
        self.finite = jax.jit(all_finite, out_shardings=everywhere(work))
        self.files: list[records.Records | tensorboard.Board] = []
        self.input_wait = 0.0  # seconds

    def train(self, state: State, stream: Any) -> None:
        """All steps that are left, the final evaluation and the report."""
        config, done = self.config, int(state.step)
        steps = config.train.steps
        self._open_files(done)
        self.clock = Clock(config.train.batch_size * config.train.sequence_length)
        self.screen.start(steps, done)
        self.stop = processes.Shared(self.mesh)
        if jax.process_count() > 1:
            stream = processes.Together(stream, self.mesh)
        late = None  # the metrics of the step before: read while the device does the next one
        with Signals(self._interrupted_again) as signals:
            self._evaluate_again(done, state, signals)
            for step in range(done + 1, steps + 1):
                batch = self.mesh.put(self._take(stream, step, state, late))
                if step == done + 1:
                    self._compile(state, batch)
                state, metrics = self.train_step(state, batch)
                self._record(late)
                self.checkpoints.poll()
                late = (step, metrics)
                received = self.stop.update(signals.received)
                evaluates = step % config.train.eval_every == 0 and step < steps
                saves = step % config.checkpoint.every == 0 or step == steps
                if evaluates or saves or received:
                    # The step's own metrics first: a loss that is no number is never saved.
                    self._record(late)
                    late = None
                    score = None
                    with self.clock.paused():
                        if evaluates:
                            try:
                                more = self._captured(step, state, batch)
                                score = self._evaluate_part(step, state, signals, more)
                                saves = saves or self.checkpoints.is_among_best(score)
                            except _BrokenOff as broken:
                                received = broken.number
                        if saves or received:
                            self._check(step, state)
                            self.metrics.sync()
                            self.checkpoints.save(step, state, stream, score)
                if received and step < steps:
                    self.checkpoints.wait()
                    raise Interrupted(self._how_to_resume(step), received)
            self.screen.stop()
            speed = throughput.row(steps, done, self.clock, config)
            self._finish(steps, state, speed, signals)

    def _compile(self, state: State, batch: Any) -> None:
        """Runs once what comes between steps: a signal must not wait for a compiler.

        (Of a program that is compiled ahead a call would not be the same program.)
        """
        config = self.config.train
        with self.clock.paused():
            for part in self.held_out.batches(config.batch_size, config.sequence_length, 1):
                self.eval_step(state.params, self.mesh.put(part))
            if config.eval_every < config.steps and self._has_gradients():
                self.subspace_step(state, batch)
            if self.config.log.hamiltonian:
                self.hamiltonian_step(state, jnp.float32(0))
            self.finite(state)

    def _has_gradients(self) -> bool:
        """Whether there is a gradient tree whose part in the subspaces can be measured."""
        # (In a fused backward pass, and at the source, there is none.)
        has_tree = not (self.config.train.fused_backward or self.config.train.project_at_source)
        return self.optimizer.projects and has_tree

    def _take(self, stream: Any, step: int, state: State, late: tuple[int, Metrics] | None) -> Any:
        """The next batch; where the documents end badly, what was trained on is saved."""
        began = time.perf_counter()
        try:
            return next(stream)
        except Interrupted:
            raise
        except Exception as error:
            self._record(late)
            with self.clock.paused():
                self._check(step - 1, state)
                self.metrics.sync()
                if step > 1:
                    self.checkpoints.save(step - 1, state, stream)
                    self.checkpoints.wait()
                    if isinstance(error, UsageError | processes.Elsewhere):
                        story = f"{error} ({self._how_to_resume(step - 1)})"
                        raise type(error)(story) from None
            raise
        finally:
            self.input_wait += time.perf_counter() - began

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def _open_files(self, done: int) -> None:
        """The rows of metrics and of speed, and TensorBoard's events of both if asked for."""
        self.done, place, mirror = done, self.place, None
        self.metrics: records.Records = records.NoRecords()
        self.throughput: records.Records = self.metrics
        if not processes.is_first():
            return
        if self.config.log.tensorboard:
            board = tensorboard.Board(place.tensorboard)
            self.files.append(board)
            mirror = board.write
        if done >= self.config.log.every:
            self._miss_rows(*records.scan(place.metrics))
        self.metrics = records.Records(place.metrics, done, mirror=mirror)
        self.files.append(self.metrics)
        self.throughput = records.Records(place.throughput, done, keep_later=True, mirror=mirror)
        self.files.append(self.throughput)

    def _miss_rows(self, rows: list[records.Row], damaged: int | None) -> None:
        """Says that rows of the steps before are lost, if they are."""
        if damaged or not rows:
            what = f"is damaged at line {damaged}" if damaged else "is missing or empty"
            self.screen.say(
                f"warning: {self.place.metrics} {what}: the run goes on, but rows of steps before "
                f"{self.done + 1} are lost to its figures and reports"
            )

    def _record(self, late: tuple[int, Metrics] | None) -> None:
        """Writes and shows a step's metrics; ends the run if they are no numbers."""
        if late is None:
            return
        config, (step, metrics) = self.config, late
        loss, grad_norm, rate, skipped = (float(value) for value in metrics)
        # Where float16 overflowed there is no norm, and the loss scale is smaller now.
        if not (math.isfinite(loss) and (skipped or math.isfinite(grad_norm))):
            name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise DivergedError(self._diverged(step, f"the {name} is {value}"))
        self.clock.count()
        # Every skipped step has a row, so that they can be counted.
        if step % config.log.every == 0 or step == config.train.steps or skipped:
            self.metrics.write(
                {
                    "kind": "train",
                    "step": step,
                    "tokens": step * self.clock.tokens_per_step,
                    "loss": loss,
                    "grad_norm": None if skipped else grad_norm,
                    "learning_rate": rate,
                    "effective_learning_rate": rate * self.optimizer.scale,
                    "skipped": bool(skipped),
                }
            )
        steps = config.train.steps
        milestone = step % config.log.print_every == 0 or step == steps
        speed, left = self.clock.speed(), self.clock.left(steps - step)
        status = f"loss {loss:.3f}  {speed:,.0f} tokens/s  {duration(left)} left"
        self.screen.progress(step, steps, status, milestone)
        if milestone:
            row = throughput.row(step, self.done, self.clock, config)
            # How long the device had nothing to do for want of a batch, since the run began.
            self.throughput.write(row | {"input_wait_seconds": round(self.input_wait, 3)})

    def _check(self, step: int, state: State) -> None:
        """Ends the run before a state that holds no numbers is saved over good ones.

        A step's loss and gradient are those of the parameters before its update.
        """
        if not self.finite(state):
            raise DivergedError(self._diverged(step, "a parameter or moment is not finite"))

    def _captured(self, step: int, state: State, batch: Any) -> str:
        """Writes what the subspaces hold of a gradient, and returns it in words.

        Before the evaluation, which a run that goes on may have to repeat without the batch.
        """
        if not self._has_gradients():
            return ""
        found = self.subspace_step(state, batch)._asdict()
        row = {k: v.item() for k, v in found.items()}
        self.metrics.write({"kind": "subspace", "step": step, **row})
        return f", {row['captured_energy']:.0%} of the gradient in the subspaces"

    def _evaluate_again(self, step: int, state: State, signals: Signals) -> None:
        """The evaluation that belongs to the last step, if a signal broke it off."""
        config = self.config.train
        if not step or step % config.eval_every or step >= config.steps:
            return

        def is_written() -> bool:
            rows = records.read(self.place.metrics)
            return any(row["kind"] == "validation" and row["step"] == step for row in rows)

        if processes.from_first(is_written):
            return
        try:
            with self.clock.paused():
                self.checkpoints.rate(step, self._evaluate_part(step, state, signals))
        except _BrokenOff as broken:
            raise Interrupted(self._how_to_resume(step), broken.number) from None

    def _evaluate_part(self, step: int, state: State, signals: Signals, more: str = "") -> float:
        """Scores a part of the held-out split, and returns its loss; says `more` beside it."""
        loss, tokens = self._evaluate(state, signals, self.config.train.eval_batches)
        if not math.isfinite(loss):
            raise DivergedError(self._diverged(step, f"the validation loss is {loss}"))
        row = {"kind": "validation", "step": step, "validation_loss": loss, "scored": tokens}
        self.metrics.write(row)
        line = (
            f"step {step:,}: validation loss {loss:.3f}, perplexity {report.perplexity(loss):.1f} "
            f"({tokens:,} tokens){more}"
        )
        if self.config.log.hamiltonian:
            line += f", Hamiltonian {self._energy(step, state, loss):.3f}"
        self.screen.say(line)
        return loss

    def _energy(self, step: int, state: State, loss: float) -> float:
        """Writes the Hamiltonian at an evaluation, and what a step took of it since the last."""
        found = self.hamiltonian_step(state, jnp.float32(loss))
        row = {k: getattr(found, k).item() for k in ("total", "potential", "kinetic", "predicted")}
        if not math.isfinite(row["total"]):
            raise DivergedError(self._diverged(step, f"the Hamiltonian is {row['total']}"))
        # Read from the file, where a run that goes on finds it too.
        rows = [r for r in records.read(self.place.metrics) if r["kind"] == "hamiltonian"]
        lost = (rows[-1]["total"] - row["total"]) / (step - rows[-1]["step"]) if rows else None
        self.metrics.write({"kind": "hamiltonian", "step": step, **row, "dissipation": lost})
        return row["total"]

    def _evaluate(
        self, state: State, signals: Signals, most: int | None = None
    ) -> tuple[float, int]:
        """Mean loss over the held-out stream, or over `most` batches of it, and their tokens.

        Raises:
          _BrokenOff: a signal came to one of the processes.
        """
        config = self.config.train
        total, count = 0.0, 0
        for batch in self.held_out.batches(config.batch_size, config.sequence_length, most):
            nats, tokens = self.eval_step(state.params, self.mesh.put(batch))
            # Summed in double precision, in a fixed order.
            total, count = total + float(nats), count + int(tokens)
            if received := self.stop.update(signals.received):
                raise _BrokenOff(received)
        return total / count, count

    def _finish(self, step: int, state: State, speed: records.Row, signals: Signals) -> None:
        """Scores the whole held-out split, draws and prints; the last checkpoint is saved."""
        try:
            loss, tokens = self._evaluate(state, signals)
        except _BrokenOff as broken:
            self.checkpoints.wait()
            raise Interrupted(self._how_to_resume(step), broken.number) from None
        if not math.isfinite(loss):
            raise DivergedError(self._diverged(step, f"the validation loss is {loss}"))
        self.checkpoints.wait()
        unigram = batches.unigram_entropy(self.held_out.targets)
        # (None where documents were cut.)
        text_bytes = self.held_out.text_bytes
        final: records.Row = {
            "kind": "final",
            "step": step,
            "tokens": step * self.clock.tokens_per_step,
            "validation_loss": loss,
            # JSON has no infinity.
            "validation_perplexity": report.perplexity(loss) if loss < report.HIGHEST else None,
            "bits_per_byte": text_bytes and batches.bits_per_byte(loss * tokens, text_bytes),
            "unigram_loss": unigram,
            "unigram_perplexity": float(np.exp(unigram)),
            "scored": tokens,
            "skipped_gradients": skipped_gradients(state.opt_state),
        }
        self.metrics.write(final)
        self.metrics.sync()
        if not processes.is_first():
            return
        report.draw(records.read(self.place.metrics), self.place.figure)
        paths = {
            "checkpoint": self.checkpoints.path(step),
            "metrics": self.place.metrics,
            "figure": self.place.figure,
        }
        report.print_result(self.screen, final, speed, paths)

    def _how_to_resume(self, step: int) -> str:
        return f"the checkpoint of step {step} is saved; go on with: {self._resume_line()}"

    def _interrupted_again(self) -> str:
        saved = self.checkpoints.steps()
        if not saved:
            return "no checkpoint was saved before the last interruption"
        return (
            f"interrupted before another checkpoint was saved; that of step {saved[-1]} is there; "
            f"go on with: {self._resume_line()}"
        )

    def _resume_line(self) -> str:
        words = [word for word in self.command.arguments if word != "--resume"]
        if self.config.run_dir is None:
            words += ["--run_dir", str(self.place.path)]
        # The interpreter that runs this, since `python` may be another one or none.
        interpreter = Path(sys.executable or "python")
        if interpreter.is_relative_to(Path.cwd()):
            interpreter = interpreter.relative_to(Path.cwd())
        return shlex.join([str(interpreter), "-m", "train", *words, "--resume"])

    def _diverged(self, step: int, what: str) -> str:
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is {self.checkpoints.path(saved[-1])}"
            if saved
            else "no checkpoint had been saved yet"
        )
        key = "lora" if self.config.lora.freeze == "all" else "optimizer"
        rate = getattr(self.config, key).learning_rate
        return one_line(
            f"{what} at step {step}; {kept}; begin a new run with a lower "
            f"--{key}.learning_rate (it is {rate:g})"
        )
