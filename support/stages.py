"""What both stages of a training share: the run through the epochs, its optimiser and its Keras callbacks."""

import json
import shutil
import tempfile
import time
import zipfile

import keras
import numpy as np
from tqdm import tqdm

from support import devices, optimizers, runs
from support.cli import UserError
from support.files import unfinished

MAX_LOSS = 1e6  # a loss above this has diverged


class Stage:
    """What both stages do: build a model, train it epoch by epoch, and return that of the best epoch.

    A subclass says with what: `make_model`, `batches`, `validation_batches`, and the attributes here.

    Attributes:
        title: printed at the start.
        name: "vqvae" or "pixelcnn", of the files.
        monitor, better: the log that tells the best epoch; `max` or `min`, which values of it are better.
        line: what is printed of an epoch's logs.
        advice: what to do if the loss diverges.
    """

    def __init__(self, run, splits, settings, epochs, batch_size, learning_rate):
        self.run, self.splits, self.settings = run, splits, settings
        self.epochs, self.learning_rate = epochs, learning_rate
        self.batch_size = devices.global_batch(batch_size, len(splits["train"].images))
        self.steps_per_epoch = len(splits["train"].images) // self.batch_size

    def train(self):
        """Runs the epochs that are missing; returns the model of the best epoch on validation people."""
        devices.print_on_chief(f"{self.title}, {self.epochs} epochs.")
        keras.utils.set_random_seed(self.run.seed)  # again, for this stage may have been resumed
        first_epoch = devices.on_chief(self.run.finished_epochs, self.name)
        if first_epoch < self.epochs:
            model = self.resume(first_epoch) if first_epoch else self.begin()
            model.fit(self.batches(model, first_epoch), validation_data=self.validation_batches(model),
                      steps_per_epoch=self.steps_per_epoch, epochs=self.epochs, initial_epoch=first_epoch,
                      shuffle=False, verbose=0, callbacks=self.callbacks(first_epoch))
        return self.load_best()

    def begin(self):
        """The model before its first epoch."""
        with devices.new_scope():
            return self.build()

    def build(self):
        """The model with its optimiser, before any training."""
        model = self.make_model()
        model.compile(new_optimizer(self.settings, self.learning_rate, self.steps_before(self.epochs)),
                      steps_per_execution=devices.steps_per_execution(self.steps_per_epoch))
        return model

    def resume(self, first_epoch):
        """Builds the model, then loads weights and optimiser state from the backup.

        Not the saved model itself: Keras saves how it was compiled, which may not suit other devices.
        """
        with devices.new_scope():
            model = self.build()
            model.optimizer.build(model.trainable_variables)
        self.load_on_chief(model, self.run.backup_path(self.name), "remove it to begin this stage again")
        model.optimizer.iterations.assign(self.steps_before(first_epoch))
        return model

    def steps_before(self, epoch):
        """How many steps the optimiser has made before an epoch, counted in steps of the batches used now."""
        return epoch * self.steps_per_epoch

    def callbacks(self, first_epoch):
        """The callbacks of `fit`: what is measured goes into the logs, then logs are written, then the model.

        In this order a saved epoch always has its row in the history.
        """
        run, name = self.run, self.name
        line = self.line if devices.is_chief() else None
        lines = EpochLines(self.epochs, self.steps_per_epoch, line, run.model_path(name), self.advice)
        if not devices.is_chief():
            return [EpochSeeds(run.seed), lines, SaveWithChief()]
        history = run.trim_history(name, first_epoch)
        best = self.better((float(row[self.monitor]) for row in history), default=None)
        return [EpochSeeds(run.seed), *self.measurements(), lines,
                keras.callbacks.CSVLogger(run.history_path(name), append=bool(history)),
                keras.callbacks.TensorBoard(run.folder / "logs" / name, write_graph=False),
                Checkpoints(run, name, self.monitor, self.better, best)]

    def measurements(self):
        """Callbacks that add to the logs."""
        return []

    def load_best(self):
        """The model of the best epoch, without optimiser."""
        model = self.make_model()
        self.load_on_chief(model, self.run.model_path(self.name), "put back the file, or start a new run")
        return model

    def load_on_chief(self, model, path, advice):
        """Loads a file that the chief alone has; the other machines get copies of all variables."""
        with devices.fail_together():
            try:
                if devices.is_chief():
                    runs.read_model_file(path, lambda: model.load_weights(path))
            except ValueError as error:
                raise UserError(f"{error}; {advice}.") from error
        optimizer = getattr(model, "optimizer", None)
        devices.broadcast_variables(model.variables + (optimizer.variables if optimizer else []))


def new_optimizer(settings, peak, total_steps):
    """Muon, whose learning rate rises to `peak`, then falls to a fiftieth of it along a cosine."""
    rising = min(settings.rising_steps, total_steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / settings.rising_steps, max(total_steps - rising, 1), alpha=0.02, warmup_target=peak,
        warmup_steps=rising)
    return optimizers.Muon(schedule, beta_2=0.99, global_clipnorm=1.0)


class EpochSeeds(keras.callbacks.Callback):
    """Makes every epoch's draws of dropout depend on (seed, epoch) alone, as the order of the data does.

    Keras does not save the state of its seed generators, so a resumed run would draw otherwise than an
    uninterrupted one.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the state of each seed generator."""
        states = (variable for variable in self.model.variables if "seed_generator_state" in variable.path)
        for index, state in enumerate(states):
            state.assign(np.random.default_rng([self.seed, epoch, index]).integers(0, 2 ** 31, state.shape))


class EpochLines(keras.callbacks.Callback):
    """Prints a line per epoch, on a terminal a bar too; stops at a loss that is NaN, infinite or above 1e6.

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
            where = f"epoch {self.epoch + 1}, step {batch + 1}"
            raise UserError(f"Training {self.best_path.stem} diverged in {where}: its loss is not a number "
                            f"or above {MAX_LOSS:.0e}.{best} To do: {self.advice}.")

    def on_epoch_end(self, epoch, logs):
        """Stops the clock and prints the line."""
        self.bar.close()
        logs["seconds"] = time.perf_counter() - self.start
        self.seconds.append(logs["seconds"])
        left = np.mean(self.seconds) * (self.epochs - epoch - 1)
        if self.line:
            print(f"  epoch {epoch + 1:{len(str(self.epochs))}}/{self.epochs}  {logs['seconds']:4.0f} s, "
                  f"{duration(left)} left: {self.line.format(**logs)}", flush=True)


def duration(seconds):
    """Seconds in words: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: saves the model to resume from; and as the result, if it is the best one so far.

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

        Once, because on several machines all have to take part in saving, and only the chief knows whether it
        is the best.
        """
        with unfinished(self.backup_path) as new:
            self.model.save(new)
            with zipfile.ZipFile(new, "a") as archive:
                archive.writestr(runs.EPOCHS_FILE, json.dumps(epoch + 1))
            value = logs[self.monitor]
            if self.best is None or self.better(value, self.best) != self.best:
                copy = new.with_name(f"copy-{new.name}")
                shutil.copyfile(new, copy)
                copy.replace(self.best_path)
                self.best = value
            new.replace(self.backup_path)


class SaveWithChief(keras.callbacks.Callback):
    """On machines but the chief: takes part in saving the model, into a folder that is then removed."""

    def on_epoch_end(self, epoch, logs=None):
        """Saves and forgets."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(f"{folder}/model.keras")
