"""What happens between the steps of a training: the bar, the log, checkpoints, the best, and stopping on a signal.

Keras callbacks, so that they go into any `fit`.
"""

import contextlib
import math
import os
import signal
import time
from typing import NamedTuple

import keras
import numpy as np
from tqdm import tqdm

import parallel
from checkpoint import RunFolder, assign, collect, named_variables
from metrics import FEWEST_FOR_FLOOR, Estimate

SHOW_EVERY = 10  # steps between two readings of the loss, which make an accelerator wait
MOST_SKIPPED = 10  # steps in a row whose gradient is not finite, after which a training stops


class Interrupted(BaseException):
    """A signal (`signal`, its number) asked the process to stop.

    Like KeyboardInterrupt no `Exception`: those that cross a layer's `call` Keras makes anew, from their text.
    """

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Diverged(Exception):
    """Steps in a row had no finite gradient; `step` is the last of them."""

    def __init__(self, step):
        super().__init__(f"{MOST_SKIPPED} steps in a row, the last of them step {step}, were not finite")
        self.step = step


class Signals:
    """Turns Ctrl-C and SIGTERM into `Interrupted`, but never in the middle of a step.

    Use it as a context; within, `shield()` and `release()` bracket what must not be cut in two.
    """

    def __init__(self):
        self._shielded, self._received, self._former = False, None, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self._shielded:
            raise Interrupted(number)
        if self._received is None:
            _say_at_once(
                f"{signal.Signals(number).name} received: stopping when the step under way ends, then saving. "
                "The first step of a stage takes longest."
            )
        self._received = number

    def shield(self):
        """Holds signals back."""
        self._shielded = True

    def release(self):
        """Lets signals through again, and raises `Interrupted` if one came meanwhile."""
        self._shielded = False
        if self._received is not None:
            number, self._received = self._received, None
            raise Interrupted(number)


def _say_at_once(text):
    """A line on standard error from within a signal's handler, where what `print` does may be half done."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class Measured(NamedTuple):
    """What an epoch is chosen by.

    Attributes:
        estimate: of the monitored metric, smaller is better.
        state: what the best keeps of how it was measured, such as its "protocol".
        tensors: arrays by name that the best keeps beside the weights, or None.
        change: of the metric, from the best so far to this epoch, or None where that was not measured.
    """

    estimate: Estimate
    state: dict
    tensors: dict[str, np.ndarray] | None = None
    change: Estimate | None = None


class Keeper(keras.callbacks.Callback):
    """Keeps a training in its run folder: each epoch a row of the log and a checkpoint, and the best one.

    Make it when the stage begins: its seconds count from there.

    Args:
        run: the `RunFolder`.
        stage: name of the stage there.
        steps_per_epoch: steps of a whole epoch.
        signals: the `Signals` of the process.
        epochs: all epochs of the stage.
        before_test: function of the step, called before the trainer's `evaluate`.
        finish_row: function of (epoch, logs) -> dict of more entries for the epoch's row.
        choose: function of the row -> what it is chosen by, a `Measured`, or None where that was not measured.
        act: function of the row, called when the best is kept and before the checkpoint is: it may change the trainer.
            It returns a dict of more entries for the row; one named "stopped", a sentence, ends the training.
        kid_every: epochs between two measurements of KID; the first and the last epoch have one anyway.
        snapshots: the steps whose power averages are kept, see `averages`.
    """

    def __init__(
        self,
        run: RunFolder,
        stage,
        steps_per_epoch,
        signals,
        epochs,
        before_test=None,
        finish_row=None,
        choose=None,
        act=None,
        kid_every=1,
        snapshots=(),
    ):
        super().__init__()
        self.snapshots = frozenset(snapshots)
        self.run, self.stage, self.signals = run, stage, signals
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.before_test, self.finish_row = before_test, finish_row
        self.choose, self.act, self.kid_every = choose, act, kid_every
        self.step, self.pending, self.logs, self.stopped = 0, False, {}, False
        self._metrics, self._seconds, self._started = {}, 0.0, time.monotonic()
        self._first = True

    def restore(self, trainer):
        """Sets the trainer to the newest checkpoint, if there is one, and drops what the log says of later steps."""
        saved = self.run.latest(self.stage)
        if saved is not None:
            for prefix, variables in trainer.kept_variables.items():
                assign(variables, saved.tensors, prefix, source=self.run.path)
            self.step, self.pending = saved.step, saved.state["pending"]
            self.logs, self._seconds = saved.state["logs"], saved.state["seconds"]
            self._metrics, self.stopped = saved.state["metrics"], saved.state["stopped"]
        self.run.truncate_log(self.stage, self.step - self.pending)

    def save(self, trainer):
        """Writes a checkpoint of where the trainer is."""
        tensors = {}
        for prefix, variables in trainer.kept_variables.items():
            tensors.update(collect(variables, prefix))
        metrics = {} if self.pending else _metric_values(trainer)
        state = {"pending": self.pending, "logs": self.logs, "seconds": self._elapsed(), "metrics": metrics}
        self.run.save(self.stage, self.step, tensors, state | {"stopped": self.stopped})

    @property
    def is_done(self):
        """Whether all steps are, or something has ended the training before."""
        return self.stopped or self.step >= self.epochs * self.steps_per_epoch

    def on_epoch_begin(self, epoch, logs=None):
        # `fit` has just reset the metrics: an epoch that was cut goes on with what it had gathered.
        for name, values in self._metrics.items():
            for variable, value in zip(self.model.trackers[name].variables, values, strict=True):
                variable.assign(value)
        self._metrics = {}
        self.model.kid_due = epoch == 0 or (epoch + 1) % self.kid_every == 0 or epoch + 1 == self.epochs

    def on_train_batch_begin(self, batch, logs=None):
        self.signals.shield()

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self.pending = self.step % self.steps_per_epoch == 0
        if self.pending:
            self.logs = {name: float(value) for name, value in logs.items()}
        if self._first:
            self._first = False
            tqdm.write(f"   first step {self._elapsed() - self._seconds:.1f} s after the start of the stage")
        if self.step in self.snapshots:
            self.run.save_average(
                self.stage, self.step, collect(self.model.power_averages.variables, "average")
            )
        # Reading makes an accelerator wait, so there it is looked for now and then only.
        looks = parallel.on_cpu() or self.step % MOST_SKIPPED == 0
        if looks and skipped_in_row(self.model) >= MOST_SKIPPED:
            raise Diverged(self.step)
        self.signals.release()

    def on_test_begin(self, logs=None):
        if self.before_test:
            self.before_test(self.step)

    def on_epoch_end(self, epoch, logs=None):
        self.signals.shield()
        row = {"stage": self.stage, "epoch": epoch + 1, "step": self.step, **self.logs, **(logs or {})}
        row |= _of_optimizers(self.model)
        row.update(self.finish_row(epoch, row) if self.finish_row else {})
        row["seconds"] = round(self._elapsed(), 2)
        row["best"] = self._keep_best(row)
        row |= self.act(row) if self.act else {}
        self.run.log(row)
        self.pending, self.logs, self.stopped = False, {}, "stopped" in row
        self.model.stop_training = self.stopped
        self.model.reset_metrics()
        self.save(self.model)
        tqdm.write(describe(row))
        self.signals.release()

    def _keep_best(self, row):
        measured = self.choose(row) if self.choose else None
        if measured is None:
            return False
        tensors = dict(measured.tensors or {})
        for name, network in self.model.networks.items():
            tensors.update(collect(named_variables(network), name))
        state = {**measured.state, "epoch": row["epoch"], "step": row["step"]}
        change_high = None if measured.change is None else measured.change.high
        self.run.save_best(self.stage, *measured.estimate, tensors, state, change_high)
        # Not what `save_best` returns: after a crash this epoch may have been kept already.
        best = self.run.best_state(self.stage)
        return best is not None and best["step"] == row["step"]

    def _elapsed(self):
        return self._seconds + time.monotonic() - self._started


def _of_optimizers(trainer):
    """What a row says of the trainer's optimizers."""
    own, *others = trainer.optimizers_in_use
    scale = np.asarray(own.rate_scale) if hasattr(own, "rate_scale") else 1.0
    entries = {"learning_rate": float(own.learning_rate) * float(scale)}
    skipped = sum(int(np.asarray(optimizer.skipped)) for optimizer in (own, *others) if _counts(optimizer))
    return entries | ({"skipped_steps": skipped} if skipped else {})


def skipped_in_row(trainer):
    """How many steps in a row one of a trainer's optimizers has skipped up to now."""
    return max(skips_in_row(optimizer) for optimizer in trainer.optimizers_in_use)


def skips_in_row(optimizer):
    """How many steps in a row an optimizer has skipped up to now; 0 of one that does not count them."""
    return int(np.asarray(optimizer.skipped_in_row)) if _counts(optimizer) else 0


def _counts(optimizer):
    """Whether an optimizer counts the steps that it skips, as those of `optimizers` do."""
    return hasattr(optimizer, "skipped_in_row")


def _metric_values(trainer):
    return {
        name: [float(variable) for variable in tracker.variables]
        for name, tracker in trainer.trackers.items()
    }


def describe(row):
    """A row of the log as one line for the console."""
    parts = [f"epoch {row['epoch']}"]
    for name, value in row.items():
        if name in ("loss", "val_loss", "val_psnr", "val_ssim", "val_rkid"):
            parts.append(f"{name} {value:.4g}")
    if math.isfinite(row.get("val_kid", math.nan)):
        low, high, floor = (row[f"val_kid_{end}"] for end in ("low", "high", "floor"))
        has_floor = floor is not None and math.isfinite(floor)
        told = (
            f"floor {floor:.4f}"
            if has_floor
            else f"no floor (it takes {FEWEST_FOR_FLOOR} validation pictures)"
        )
        parts.append(f"KID {row['val_kid']:.4f} [{low:.4f}, {high:.4f}], {told}")
    parts.append(f"after {row['seconds']:.0f} s")
    told = [row[name] for name in ("guard", "rate", "stopped") if name in row]
    if "skipped_steps" in row:
        told.append(f"{row['skipped_steps']} steps so far were not finite and are skipped")
    return "\n      ".join(["   ".join(parts) + ("   best so far" if row.get("best") else ""), *told])


class Bar(keras.callbacks.Callback):
    """A tqdm bar over all steps of a stage, with rate, time left, loss and the last KID.

    Args:
        label: what stands before it.
        total: all steps of the stage.
        keeper: the `Keeper`, which knows the step.
    """

    def __init__(self, label, total, keeper):
        super().__init__()
        self.label, self.total, self.keeper, self.bar, self.kid = label, total, keeper, None, None

    def on_train_begin(self, logs=None):
        self.bar = tqdm(
            total=self.total, initial=self.keeper.step, desc=self.label, unit="step", disable=None
        )

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()
        if not self.bar.disable and self.bar.n % SHOW_EVERY == 0:
            shown = {"loss": f"{float(logs['loss']):.4f}"}
            self.bar.set_postfix({**shown, "KID": f"{self.kid:.4f}"} if self.kid else shown)

    def on_epoch_end(self, epoch, logs=None):
        self.kid = (logs or {}).get("val_kid", self.kid)

    def on_train_end(self, logs=None):
        self.bar.close()
