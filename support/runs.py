"""The run folder: where each file of a run lies, its config, lock, histories and backups."""

import contextlib
import csv
import dataclasses
import fcntl
from importlib import metadata
import json
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import tensorflow as tf

from support import optimizers, synthetic  # noqa: F401 (optimizers: where Keras finds Muon)
from support.cli import UserError
from support.files import write_json
from support.volumes import SliceGeometry

MODEL_FILES = "vqvae.keras", "pixelcnn.keras"
PRETRAINED = Path(__file__).parents[1] / "assets" / "pretrained"
EPOCHS_FILE = "finished_epochs.json"  # in the zip archive of a backup: how many epochs its weights have had
PACKAGES = "tensorflow", "keras", "tensorflow-probability", "numpy", "scikit-image", "scikit-learn", "pillow"
REQUIRED = {"settings": ("limit", "seed"), "constants": (), "vqvae": (), "pixelcnn": (),
            "data": ("folder", "is_demo", "fingerprints", "front", "geometry")}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder and its config.

    Attributes:
        folder: its path.
        config: the dict in config.json: `settings`, `constants`, the arguments of both models (`vqvae`, `pixelcnn`), `data`,
            `machine` and `git_commit`.
    """

    folder: Path
    config: dict

    @classmethod
    def load(cls, folder):
        """Reads a run's config.

        Raises:
            UserError: if there is none, or it is damaged or of another version.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no run (no config.json); train one with train.py --run-dir {folder}.")
        try:
            config = json.loads(path.read_text())
            missing = [f"{part} {key}" for part, keys in REQUIRED.items() for key in keys if key not in config[part]]
            _ = missing or SliceGeometry(**config["data"]["geometry"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged, or of another version ({error!r}); start a new run.") from error
        if missing:
            raise UserError(f"{path} is damaged, or of another version (no {missing[0]}); start a new run.")
        return cls(Path(folder), config)

    @staticmethod
    def has_models(folder):
        """Whether a folder holds a run with both models."""
        return all((folder / name).is_file() for name in ("config.json", *MODEL_FILES))

    @property
    def settings(self):
        """What the options of train.py set."""
        return self.config["settings"]

    @property
    def seed(self):
        """Of every random draw."""
        return self.config["settings"]["seed"]

    @property
    def geometry(self):
        """The `volumes.SliceGeometry` of the data."""
        return SliceGeometry(**self.config["data"]["geometry"])

    @property
    def is_simulated(self):
        """Whether the people are simulated."""
        return self.config["data"].get("is_simulated", self.config["data"]["is_demo"])

    @property
    def is_synthetic(self):
        """Whether the data are heads that a model sampled."""
        return self.config["data"].get("is_synthetic", False)

    @property
    def notice(self):
        """What has to be said of the data: see `synthetic.notice`."""
        return synthetic.notice(self.is_simulated, self.is_synthetic)

    def results_path(self, name):
        """Where results go if no folder is named: into the run's own, but not among the files of this repository."""
        return Path("runs/shipped-weights" if self.folder.resolve() == PRETRAINED else self.folder) / name

    def model_path(self, name):
        """Where the best epoch of the model "vqvae" or "pixelcnn" lies."""
        return self.folder / f"{name}.keras"

    def backup_path(self, name):
        """Where the latest epoch of a model lies, optimiser included, to resume from."""
        return self.folder / "backup" / f"{name}.keras"

    def history_path(self, name):
        """Where what was measured after each epoch lies."""
        return self.folder / f"{name}_history.csv"

    @property
    def frames_dir(self):
        """Where the frames of progress.gif lie while training."""
        return self.folder / "backup" / "frames"

    @property
    def ventricles_path(self):
        """How the size of ventricles follows from a person: `weights`, `offset`, `quantiles` of training people."""
        return self.folder / "ventricles.json"

    @property
    def metrics_path(self):
        """What was measured on the test people; it is written last, so that a run with it is finished."""
        return self.folder / "metrics.json"

    def read_ventricles(self):
        """The dict of ventricles.json."""
        try:
            measure = json.loads(self.ventricles_path.read_text())
            _ = measure["weights"], measure["offset"], measure["quantiles"]
            return measure
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.ventricles_path} is missing or damaged, and --ventricles needs it; train again.") from error

    @contextlib.contextmanager
    def training(self, resume):
        """Takes the folder for a training, and writes config.json if the run is new.

        Raises:
            UserError: if another training is at work in it, the run is finished, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if not resume:
                write_json(self.folder / "config.json", self.config)
            elif self.metrics_path.exists():
                self.remove_backup()  # the training may have been killed right before it did so
                raise UserError(f"{self.folder} is finished; there is nothing to resume.")
            self.frames_dir.mkdir(parents=True, exist_ok=True)
            yield

    @contextlib.contextmanager
    def _lock(self):
        """A lock on the folder itself: it ends with the process and leaves no file, unlike that of filelock."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another training is at work in {self.folder}; wait for its end or give another --run-dir.") from error
            yield
        finally:
            os.close(descriptor)

    def remove_backup(self):
        """Removes what only an unfinished run needs."""
        shutil.rmtree(self.folder / "backup", ignore_errors=True)

    def finished_epochs(self, name):
        """How many epochs the weights in a model's backup have had; 0 without a backup.

        Raises:
            UserError: if the file does not say.
        """
        path = self.backup_path(name)
        if not path.exists():
            return 0
        try:
            with zipfile.ZipFile(path) as archive:
                return int(json.loads(archive.read(EPOCHS_FILE)))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be loaded ({error}); remove it to begin this stage again.") from error

    def read_history(self, name):
        """A model's history as an array with a field per column."""
        return np.atleast_1d(np.genfromtxt(self.history_path(name), delimiter=",", names=True))

    def trim_history(self, name, epochs):
        """Cuts a history back to its first `epochs` rows; an epoch that was not saved is run again.

        Returns:
            The rows, dicts of strings.
        """
        path = self.history_path(name)
        if not path.exists():
            return []
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))[:epochs]
        if not rows:
            path.unlink()
            return []
        unfinished = path.with_name(f".{path.name}")
        with open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(path)
        return rows

    def save(self, name, model):
        """Saves a model as the run's result, under a temporary name first, so that the file is whole or not there."""
        unfinished = self.folder / "backup" / f"unfinished-{name}.keras"
        model.save(unfinished)
        unfinished.replace(self.model_path(name))


def read_model_file(path, load):
    """What `load()` returns, which reads a .keras file.

    Raises:
        ValueError: in one line, if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # Keras reads weights by seeking, where Python (from 3.13 on) checks no sum
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        return load()
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise  # not the file's fault
    except Exception as error:  # a file from a stranger may fail in any way
        reason = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{path} cannot be loaded ({reason[0][:200]})") from error


def default_folder():
    """Where a run goes for which no folder was given."""
    return Path(time.strftime("runs/%Y%m%d-%H%M%S"))


def newest():
    """The newest finished run in runs/, else the newest that has both models, or None."""
    runs = [folder for folder in Path("runs").glob("*") if Run.has_models(folder)]
    return max(runs, default=None,
               key=lambda folder: ((folder / "metrics.json").exists(), (folder / "config.json").stat().st_mtime))


def build_info():
    """What last bits of results depend on: a dict of `packages`, `python`, `processor` and its `vector_instructions`."""
    return {"packages": {name: metadata.version(name) for name in PACKAGES}, "python": sys.version.split()[0],
            "processor": platform.processor() or platform.machine(), "vector_instructions": _vector_instructions()}


def _vector_instructions():
    """The vector instructions that the CPU says it has, as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in flags if flag.startswith(("sse", "avx", "fma", "amx"))]


def git_commit():
    """The commit of this repository that is checked out, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
