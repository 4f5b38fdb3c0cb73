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
from support.files import unfinished
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


class EpochLines(keras.callbacks.Callback):
    """Prints a line per epoch, on a terminal a bar within it; stops at a loss that is NaN, infinite or above 1e6.

    Adds the seconds of each epoch to the logs, all that was measured before this callback's turn included.

    Args:
        epochs: of the stage.
        steps: per epoch.
        line: what is printed of an epoch's logs, for `str.format`; None prints nothing.
        best_path: .keras file of the best epoch so far.
        advice: what to do if the loss diverges.
    """

    def __init__(self, epochs, steps, line, best_path, advice):
        super().__init__()
        self.epochs, self.steps, self.line = epochs, steps, line
        self.best_path, self.advice = best_path, advice
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock and the bar."""
        self.epoch, self.start = epoch, time.perf_counter()
        self.bar = tqdm(total=self.steps, desc=f"epoch {epoch + 1}/{self.epochs}", unit=" steps", leave=False,
                        disable=None if self.line else True)

    def on_train_batch_end(self, batch, logs):
        """Moves the bar; raises UserError at a diverged loss: what was saved before stays."""
        self.bar.update(batch + 1 - self.bar.n)
        if not all(abs(value) < MAX_LOSS for value in logs.values()):
            best = f" The best model before is in {self.best_path}." if self.best_path.exists() else ""
            raise UserError(f"Training {self.best_path.stem} diverged in epoch {self.epoch + 1}, step {batch + 1}: its loss is "
                            f"not a number or above {MAX_LOSS:.0e}.{best} To do: {self.advice}.")

    def on_epoch_end(self, epoch, logs):
        """Stops the clock and prints the line."""
        self.bar.close()
        logs["seconds"] = time.perf_counter() - self.start
        self.seconds.append(logs["seconds"])
        left = np.mean(self.seconds) * (self.epochs - epoch - 1)
        if self.line:
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
        better: `max` or `min`: which values of it are better.
        best: the best value in the epochs before, or None.
    """

    def __init__(self, run, name, monitor, better, best=None):
        super().__init__()
        self.best_path, self.backup_path = run.model_path(name), run.backup_path(name)
        self.monitor, self.better, self.best = monitor, better, best

    def on_epoch_end(self, epoch, logs):
        """Saves once, into a hidden folder; copies the file if it is the best; then renames both.

        Once, because on several machines all have to take part in saving, and only the chief knows whether it is the best.
        """
        with unfinished(self.backup_path) as new:
            self.model.save(new)
            with zipfile.ZipFile(new, "a") as archive:
                archive.writestr(EPOCHS_FILE, json.dumps(epoch + 1))
            value = logs[self.monitor]
            if self.best is None or self.better(value, self.best) != self.best:
                copy = new.with_name(f"copy-{new.name}")
                shutil.copyfile(new, copy)
                copy.replace(self.best_path)
                self.best = value
            new.replace(self.backup_path)


class SaveWithChief(keras.callbacks.Callback):
    """On machines other than the chief: takes part in saving the model, into a folder that is then removed."""

    def on_epoch_end(self, epoch, logs=None):
        """Saves and forgets."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(f"{folder}/model.keras")
