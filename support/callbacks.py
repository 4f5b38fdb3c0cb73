"""The Keras callbacks that both stages of a training share."""

import json
import shutil
import tempfile
import time
import zipfile

import keras
import numpy as np
from tqdm import tqdm

from support.cli import UserError
from support.runs import EPOCHS_FILE

MAX_LOSS = 1e6  # a loss above this has diverged


class EpochSeeds(keras.callbacks.Callback):
    """Makes every epoch's draws of dropout depend on (seed, epoch) alone, as the order of the data does.

    Keras does not save the state of its seed generators, so a resumed run would draw otherwise than an uninterrupted one.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the state of each seed generator."""
        states = [variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")]
        for index, state in enumerate(states):
            state.assign(np.random.default_rng([self.seed, epoch, index]).integers(0, 2 ** 31, state.shape))


class StopOnDivergence(keras.callbacks.Callback):
    """Stops at the first loss that is NaN, infinite or above 1e6.

    Args:
        best_path: .keras file of the best epoch so far.
        advice: what to do about it.
    """

    def __init__(self, best_path, advice):
        super().__init__()
        self.best_path, self.advice = best_path, advice

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs):
        """Looks at the loss.

        Raises:
            UserError: says at which epoch and step; what was saved before stays.
        """
        if not all(abs(value) < MAX_LOSS for value in logs.values()):
            best = f" The best model before is in {self.best_path}." if self.best_path.exists() else ""
            raise UserError(f"Training {self.best_path.stem} diverged in epoch {self.epoch + 1}, step {batch + 1}: its loss is not a "
                             f"number or above {MAX_LOSS:.0e}.{best} To do: {self.advice}.")


class Stopwatch(keras.callbacks.Callback):
    """Adds the seconds of each epoch to the logs, all that was measured before this callback's turn included."""

    def on_epoch_begin(self, epoch, logs=None):
        """Starts."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        """Stops."""
        logs["seconds"] = time.perf_counter() - self.start


class EpochLines(keras.callbacks.Callback):
    """Prints one line per epoch, and on a terminal a bar within it.

    Args:
        epochs: of the stage.
        steps: per epoch.
        line: what it says of an epoch's logs, for `str.format`.
    """

    def __init__(self, epochs, steps, line):
        super().__init__()
        self.epochs, self.steps, self.line = epochs, steps, line
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the bar."""
        self.bar = tqdm(total=self.steps, desc=f"epoch {epoch + 1}/{self.epochs}", unit=" steps", leave=False, disable=None)

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar."""
        self.bar.update(batch + 1 - self.bar.n)

    def on_epoch_end(self, epoch, logs):
        """Prints the line."""
        self.bar.close()
        self.seconds.append(logs["seconds"])
        left = np.mean(self.seconds) * (self.epochs - epoch - 1)
        print(f"  epoch {epoch + 1:{len(str(self.epochs))}}/{self.epochs}  {logs['seconds']:4.0f} s, {duration(left)} left: "
              f"{self.line.format(**logs)}", flush=True)


def duration(seconds):
    """Seconds in words: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: saves the model, to resume from; and, if it is the best on validation people, as the result.

    Args:
        run: the `runs.Run`.
        name: of the model's files.
        monitor: the log that tells the best epoch.
        mode: "max" or "min", which values of it are better.
        best: the best value in the epochs before, or None.
    """

    def __init__(self, run, name, monitor, mode, best=None):
        super().__init__()
        self.best_path, self.backup_path = run.model_path(name), run.backup_path(name)
        self.monitor, self.mode, self.best = monitor, mode, best

    def on_epoch_end(self, epoch, logs):
        """Saves once, under a temporary name; copies it if it is the best; then renames.

        Once, because on several machines all have to take part in saving, and only the chief knows whether it is the best.
        """
        unfinished, copy = (self.backup_path.with_name(f"{word}-{self.backup_path.name}") for word in ("unfinished", "copy"))
        try:
            self.model.save(unfinished)
            with zipfile.ZipFile(unfinished, "a") as archive:
                archive.writestr(EPOCHS_FILE, json.dumps(epoch + 1))
            if self._is_better(logs[self.monitor]):
                shutil.copyfile(unfinished, copy)
                copy.replace(self.best_path)
                self.best = logs[self.monitor]
            unfinished.replace(self.backup_path)
        finally:
            unfinished.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)

    def _is_better(self, value):
        if self.best is None:
            return True
        return value > self.best if self.mode == "max" else value < self.best


class SaveWithChief(keras.callbacks.Callback):
    """On machines other than the chief: takes part in saving the model, into a folder that is then removed."""

    def on_epoch_end(self, epoch, logs=None):
        """Saves and forgets."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(f"{folder}/model.keras")
