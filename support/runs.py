"""The run folder: where each file of a run lies, its config, lock, histories and backups."""

import contextlib
from importlib import metadata
import itertools
import json
import os
from pathlib import Path
import platform
import subprocess
import time
import zipfile

import numpy as np
import tensorflow as tf

from support import optimizers, synthetic  # noqa: F401 (optimizers: where Keras finds Muon)
from support.cli import UserError
from support.files import lock, whole_file, write_json
from support.volumes import SliceGeometry

MODEL_FILES = "vqvae.keras", "pixelcnn.keras"
ROOT = Path(__file__).parents[1]
PRETRAINED = (ROOT / "assets" / "pretrained").resolve()
SHIPPED_WEIGHTS = Path("runs/shipped-weights")  # where results of PRETRAINED go
EPOCHS_FILE = "finished_epochs.json"  # in the zip archive of a backup: how many epochs its weights have had
PACKAGES = "keras", "tensorflow-probability", "numpy", "scikit-image", "scikit-learn", "pillow"
# What train.py writes into the folder; another file, a queue's log say, is no obstacle to --resume.
OURS = {"config.json", *MODEL_FILES, "vqvae_history.csv", "decoder_history.csv", "pixelcnn_history.csv",
        "ventricles.json", "metrics.json", "progress.gif", "figures", "logs", "backup"}
REQUIRED = {"settings": ("limit", "seed"), "data": ("folder", "is_demo", "fingerprints", "front", "geometry")}


class Run:
    """A run: its folder, and the dict in its config.json.

    That has `settings` (see `train.Settings`), the arguments of both models (`vqvae`, `pixelcnn`), `data`,
    `build` and `git_commit`.
    """

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.settings = config["settings"]
        self.seed = config["settings"]["seed"]  # of every random draw
        self.frames_dir = self.folder / "backup" / "frames"  # of progress.gif, while training

    @classmethod
    def load(cls, folder):
        """Reads a run's config; UserError if there is none, or it is damaged or of another version."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no run (no config.json); train.py trains one.")
        try:
            config = json.loads(path.read_text())
            config["data"].setdefault("geometry", config["data"].pop("frame", None))  # its name in older runs
            _ = [config[part][key] for part, keys in REQUIRED.items() for key in keys]
            SliceGeometry(**config["data"]["geometry"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version ({error!r}); start anew.") from error
        return cls(folder, config)

    @staticmethod
    def has_models(folder):
        """Whether a folder holds a run with both models."""
        return all((folder / name).is_file() for name in ("config.json", *MODEL_FILES))

    @staticmethod
    def is_finished(folder):
        """Whether a folder holds a finished run: what is measured on the test people is written last."""
        return Run.has_models(folder) and (folder / "metrics.json").is_file()

    @property
    def geometry(self):
        """The `SliceGeometry` of the data."""
        return SliceGeometry(**self.config["data"]["geometry"])

    @property
    def num_positions(self):
        """N, the number of slices that a head can have: 0 to N - 1."""
        return self.config["pixelcnn"]["num_positions"]

    @property
    def center(self):
        """Where the middle of people's brains lies: (down, right) in mm from the middle of the frame."""
        return tuple(self.config["data"].get("center", (0.0, 0.0)))

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
        """Where results lie if no place is named: in the run's folder, but not among our own files."""
        return (SHIPPED_WEIGHTS if self.folder.resolve() == PRETRAINED else self.folder) / name

    def model_path(self, name):
        """Where the best epoch of a stage's model lies; that of "decoder" becomes vqvae.keras in the end."""
        return self.folder / ("backup/best_decoder.keras" if name == "decoder" else f"{name}.keras")

    def backup_path(self, name):
        """Where the latest epoch of a model lies, optimiser included, to resume from."""
        return self.folder / "backup" / f"{name}.keras"

    def history_path(self, name):
        """Where what was measured after each epoch lies."""
        return self.folder / f"{name}_history.csv"

    def read_ventricles(self):
        """The dict that `train.fit_ventricles` writes; UserError if it is not there or cannot be used."""
        path = self.folder / "ventricles.json"
        try:
            ventricles = json.loads(path.read_text())
            weights = np.array(ventricles["weights"], float)
            sizes = np.array([ventricles["offset"], *ventricles["quantiles"]], float)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing, and --ventricles needs it: train.py writes it at its end, "
                            "for three people or more.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged, and --ventricles needs it; train the run again.") from error
        if not weights.any() or not np.isfinite(sizes).all():
            raise UserError(f"In {self.folder} the size of ventricles does not follow from persons: "
                            "leave out --ventricles.")
        return ventricles

    def finish_stage(self, name):
        """Notes that all epochs of a model are done: its backup is not needed any more."""
        write_json(self.folder / "backup" / f"{name}_finished.json", True)

    def finished_epochs(self, name, epochs):
        """How many of its epochs a model has had; UserError if that cannot be told."""
        path, model, history = self.backup_path(name), self.model_path(name), self.history_path(name)
        if (path.parent / f"{name}_finished.json").exists():
            return epochs
        if not path.exists():
            rows = len(history.read_text().splitlines()) - 1 if history.exists() else 0
            if model.exists() and rows == epochs:
                return epochs  # the run was finished, and lost its metrics.json
            if model.exists() and rows != 1:  # 1: killed between two files of the first epoch
                raise UserError(f"{model} has no backup to go on from; remove it to begin the stage again.")
            return 0
        try:
            with zipfile.ZipFile(path) as archive:
                return int(json.loads(archive.read(EPOCHS_FILE)))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be loaded ({error}); remove it and {model} to begin the stage "
                            "again.") from error

    def read_history(self, name):
        """A model's history as an array with a field per column."""
        return np.atleast_1d(np.genfromtxt(self.history_path(name), delimiter=",", names=True))

    def trim_history(self, name, epochs):
        """Cuts a model's history to its first rows, for epochs that were not saved are run again."""
        path = self.history_path(name)
        if epochs == 0:
            path.unlink(missing_ok=True)
            return
        lines = path.read_bytes().splitlines(keepends=True)
        with whole_file(path) as new:
            new.write_bytes(b"".join(lines[:1 + epochs]))


@contextlib.contextmanager
def take_folder(folder):
    """Makes a folder (None: runs/DATE-TIME), locks it for one training and yields its path.

    Raises:
        UserError: if another training is at work in it.
    """
    is_new = folder is None or not os.path.lexists(folder)
    folder = _make_default_folder() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, is_locked = lock(folder)
    try:
        if is_locked is False:
            raise UserError(f"Another training is at work in {folder}; wait, or give another --run-dir.")
        if is_locked is None:
            print(f"Note: the file system of {folder} has no locks: do not start a second training there.")
        yield folder
    finally:
        os.close(descriptor)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of it


def _make_default_folder():
    """Makes runs/DATE-TIME, or DATE-TIME-2 if another start in the same second has that."""
    name = time.strftime("runs/%Y%m%d-%H%M%S")
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(2):
        try:
            Path(name).mkdir()
            return Path(name)
        except FileExistsError:
            name = f"{name[:20]}-{number}"


def read_model_file(path, load):
    """What `load()` returns, which reads a .keras file; ValueError, in one line, if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # Keras seeks in the file, where Python (from 3.13 on) checks no sum
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        return load()
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise  # not the file's fault
    except Exception as error:  # Keras makes objects of what the file says, which may fail in any way
        reason = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f"{path} cannot be loaded ({reason[0][:200]})") from error


def newest():
    """The newest run in runs/ that has both models, a finished one if there is any; or None."""
    folders = [folder for folder in Path("runs").glob("*") if Run.has_models(folder)]
    ages = {folder: (Run.is_finished(folder), (folder / "config.json").stat().st_mtime) for folder in folders}
    return max(folders, key=ages.get, default=None)


def build_info():
    """What last bits depend on: `packages`, `python`, `processor`, its `cores` and `vector_instructions`."""
    # Not metadata.version: TensorFlow may be installed under another name, tensorflow-cpu say.
    versions = {item.metadata["Name"].lower(): item.version for item in metadata.distributions()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {"packages": {"tensorflow": tf.__version__, **{name: versions.get(name) for name in PACKAGES}},
            "python": platform.python_version(), "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "vector_instructions": [flag for flag in flags if flag.startswith(("sse", "avx", "fma", "amx"))]}


def git_commit():
    """The commit of this repository that is checked out, "-dirty" if files differ; None outside of git."""
    # Of this folder itself: it may be unpacked inside another repository.
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}",
               "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
