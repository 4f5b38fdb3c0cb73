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
from support.files import unfinished, whole_file

MAX_LOSS = 1e6  # a loss above this has diverged


class Stage:
    """What both stages do: build a model, train it epoch by epoch, and return that of the best epoch.

    A subclass has `make_model`; `batches(model, name, ...)`, those of a split as `dataset.image_batches`
    orders them; and these attributes:

        title, name: printed at the start; "vqvae", "decoder" or "pixelcnn", of the files.
        plan: gets (epochs, batch size, learning rate), and weight decay if there is any, from the settings.
        monitor, better: the log that tells the best epoch; `max` or `min`, which values of it are better.
        line, advice: an epoch's logs in words, for `str.format`; what to do if the loss diverges."""

    def __init__(self, run, splits, vqvae=None):
        self.run, self.splits, self.vqvae = run, splits, vqvae
        self.epochs, batch_size, *self.rates = self.plan(run.settings)
        self.batch_size = devices.global_batch(batch_size, len(splits["train"].images))
        self.steps_per_epoch = len(splits["train"].images) // self.batch_size
        self.precision = "mixed_bfloat16" if run.settings["mixed_precision"] else "float32"

    def train(self):
        """Runs the epochs that are missing; returns the model of the best epoch on validation people."""
        devices.print_on_chief(f"{self.title}, {self.epochs} epochs.")
        keras.utils.set_random_seed(self.run.seed)  # again, for this stage may have been resumed
        first_epoch = devices.on_chief(self.run.finished_epochs, self.name, self.epochs)
        if first_epoch < self.epochs:
            model = self.resume(first_epoch) if first_epoch else self.begin()
            model.fit(self.batches(model, "train", self.batch_size, self.run.seed, first_epoch),
                      validation_data=self.batches(model, "validate", 32),
                      steps_per_epoch=self.steps_per_epoch, epochs=self.epochs, initial_epoch=first_epoch,
                      shuffle=False, verbose=0, callbacks=self.callbacks(first_epoch))
        else:
            self.build()  # so that what follows is named as after a training: see `devices.new_scope`
        best = self.read(self.run.model_path(self.name))
        if devices.is_chief():
            self.run.backup_path(self.name).unlink(missing_ok=True)
        return best

    def begin(self):
        """The model before its first epoch: new, or with the weights of the run to start from."""
        if not self.run.start_from:
            return self.build()
        path = self.run.backup_path(f"start_{self.name}")
        with devices.fail_together():
            trained = devices.is_chief() and runs.read_model_file(
                path, lambda: keras.models.load_model(path, compile=False))
        model = self.build()  # after loading: see `devices.new_scope`
        devices.on_chief(model.copy_from, trained)
        devices.broadcast_variables(model.variables)
        return model

    def build(self):
        with devices.new_scope():
            model = self.make_model()
            model.compile(new_optimizer(self.run.settings["rising_steps"], self.steps_before(self.epochs),
                                        *self.rates),
                          steps_per_execution=devices.steps_per_execution(self.steps_per_epoch))
            model.optimizer.build(model.trainable_variables)
        return model

    def resume(self, first_epoch):
        path = self.run.backup_path(self.name)
        self.read(path)
        model = self.build()  # not the saved one: how that was compiled may not suit other devices
        if devices.is_chief():
            model.load_weights(path)
        devices.broadcast_variables(model.variables + model.optimizer.variables)
        model.optimizer.iterations.assign(self.steps_before(first_epoch))
        return model

    def steps_before(self, epoch):
        """How many steps the optimiser has made before an epoch, counted in steps of the batches used now."""
        return epoch * self.steps_per_epoch

    def read(self, path):
        """The model in a file, without optimiser; UserError if it is damaged or does not fit this run."""
        # Loaded whole, for layers must have the same names in a resumed run: some last bits depend on them.
        def load():
            model = keras.models.load_model(path, compile=False)
            self.check(model)
            return model
        with devices.fail_together():
            model = (runs.read_model_file(path, load, self.run.begin_again(self.name))
                     if devices.is_chief() else self.make_model())
        devices.broadcast_variables(model.variables)
        return model

    def check(self, model):
        """Raises ValueError if a loaded model does not belong to this run."""

    def callbacks(self, first_epoch):
        """The callbacks of `fit`, in an order in which a saved epoch always has its row in the history."""
        run, name, best = self.run, self.name, None
        if not devices.is_chief():
            return [Epochs(self), Checkpoints(self)]
        if first_epoch:
            run.trim_history(name, first_epoch)
            best = self.better(run.read_history(name)[self.monitor])
        return [Epochs(self), keras.callbacks.CSVLogger(run.history_path(name), append=first_epoch > 0),
                keras.callbacks.TensorBoard(run.folder / "logs" / name, write_graph=False),
                Checkpoints(self, best)]


def new_optimizer(rising_steps, total_steps, peak, weight_decay=None):
    """Muon, whose learning rate rises to `peak`, then falls to a fiftieth of it along a cosine."""
    rising = min(rising_steps, total_steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / rising_steps, max(total_steps - rising, 1), 0.02, warmup_target=peak, warmup_steps=rising)
    return optimizers.Muon(schedule, beta_2=0.99, global_clipnorm=1.0, weight_decay=weight_decay)


class Epochs(keras.callbacks.Callback):
    """Seeds each epoch, prints its line, on a terminal a bar; stops at a loss that is NaN or above 1e6."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.seconds = stage, []

    def on_epoch_begin(self, epoch, logs=None):
        """Makes the draws of dropout depend on (seed, epoch) alone: Keras does not save their state."""
        states = (variable for variable in self.model.variables if "seed_generator_state" in variable.path)
        for index, state in enumerate(states):
            rng = np.random.default_rng([self.stage.run.seed, epoch, index])
            state.assign(rng.integers(0, 2 ** 31, state.shape))
        self.epoch, self.start = epoch, time.perf_counter()
        self.bar = tqdm(desc=f"epoch {epoch + 1}/{self.stage.epochs}", total=self.stage.steps_per_epoch,
                        unit=" steps", leave=False, disable=None if devices.is_chief() else True)

    def on_train_batch_end(self, batch, logs):
        self.bar.update(batch + 1 - self.bar.n)
        if not all(abs(value) < MAX_LOSS for value in logs.values()):
            name, path = self.stage.name, self.stage.run.model_path(self.stage.name)
            best = f" The best model before is in {path}." if path.exists() else ""
            raise UserError(f"Training {name} diverged in epoch {self.epoch + 1}, step {batch + 1}: its loss "
                            f"is not a number or above {MAX_LOSS:.0e}.{best} To do: {self.stage.advice}.")

    def on_epoch_end(self, epoch, logs):
        self.bar.close()
        logs["seconds"] = time.perf_counter() - self.start
        self.seconds.append(logs["seconds"])
        if devices.is_chief():  # the others have not measured what the line says
            epochs = self.stage.epochs
            left = tqdm.format_interval(np.mean(self.seconds) * (epochs - epoch - 1))
            print(f"  epoch {epoch + 1:{len(str(epochs))}}/{epochs}  {logs['seconds']:4.0f} s, {left} left: "
                  f"{self.stage.line.format(**logs)}", flush=True)


class Checkpoints(keras.callbacks.Callback):
    """After each epoch: saves a stage's model to resume from; and as the result, if it is the best so far."""

    def __init__(self, stage, best=None):
        super().__init__()
        self.stage, self.best = stage, best  # the best value in the epochs before, or None

    def on_epoch_end(self, epoch, logs):
        if not devices.is_chief():  # but all have to take part in saving
            with tempfile.TemporaryDirectory() as folder:
                self.model.save(f"{folder}/model.keras")
            return
        stage, value = self.stage, logs[self.stage.monitor]
        backup_path = stage.run.backup_path(stage.name)
        with unfinished(backup_path) as new:
            self.model.save(new)
            with zipfile.ZipFile(new, "a") as archive:
                archive.writestr(runs.EPOCHS_FILE, json.dumps(epoch + 1))
            # Written so that a NaN is never the best.
            if self.best is None or value != self.best and stage.better(value, self.best) == value:
                with whole_file(stage.run.model_path(stage.name)) as copy:
                    shutil.copyfile(new, copy)
                self.best = value
            new.replace(backup_path)
