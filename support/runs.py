"""The run folder: where each file of a run lies, its config, lock, histories and backups."""

import contextlib
from importlib import metadata
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
from support.files import lock, UNFINISHED, whole_file
from support.volumes import SliceGeometry

MODEL_FILES = "vqvae.keras", "pixelcnn.keras"
ROOT = Path(__file__).parents[1]
PRETRAINED = (ROOT / "assets" / "pretrained").resolve()
SHIPPED_WEIGHTS = Path("runs/shipped-weights")  # where results of PRETRAINED go
EPOCHS_FILE = "finished_epochs.json"  # in the zip archive of a backup: how many epochs its weights have had
PACKAGES = "keras", "tensorflow-probability", "numpy", "scikit-image", "scikit-learn", "pillow"
# What train.py writes into the folder
OURS = {"config.json", *MODEL_FILES, "vqvae_history.csv", "decoder_history.csv", "pixelcnn_history.csv",
        "ventricles.json", "metrics.json", "progress.gif", "figures", "logs", "backup"}


class Run:
    """A run: its folder, and its config.json: `settings`, both models' arguments, `data`, `build`."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.settings, self.seed = config["settings"], config["settings"]["seed"]  # of every random draw
        self.start_from = config.get("start_from")  # the run whose weights it begins with: a dict
        self.frames_dir = self.folder / "backup" / "frames"  # of progress.gif, while training

    @classmethod
    def load(cls, folder):
        """Reads a run's config; UserError if there is none, or it is damaged or of another version."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no run (no config.json); train.py trains one.")
        try:
            run = cls(folder, json.loads(path.read_text()))
            _ = run.geometry, run.config["data"]["fingerprints"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged or of another version ({error!r}); start anew.") from error
        return run

    @staticmethod
    def has_models(folder):
        return all((folder / name).is_file() for name in ("config.json", *MODEL_FILES))

    @staticmethod
    def is_finished(folder):
        """Whether a folder holds a finished run, whose metrics are written last; or the shipped weights."""
        is_measured = (folder / "metrics.json").is_file() or folder.resolve() == PRETRAINED
        return Run.has_models(folder) and is_measured

    @property
    def geometry(self):
        return SliceGeometry(**self.config["data"]["geometry"])

    @property
    def num_positions(self):
        return self.config["pixelcnn"]["num_positions"]

    @property
    def center(self):
        """The middle of training people's brains, (down, right) in mm from the middle of the frame."""
        is_known = self.config["data"]["front"] and "center" in self.config["data"]  # not in older runs
        return tuple(self.config["data"]["center"]) if is_known else (0.0, 0.0)

    @property
    def is_simulated(self):
        return self.config["data"].get("is_simulated", self.config["data"]["is_demo"])

    @property
    def notice(self):
        """What has to be said of the data: see `synthetic.notice`."""
        return synthetic.notice(self.is_simulated, self.config["data"].get("is_synthetic", False))

    def results_path(self, name):
        """Where results lie if no place is named: in the run's folder, but not among our own files."""
        return (SHIPPED_WEIGHTS if self.folder.resolve() == PRETRAINED else self.folder) / name

    def model_path(self, name):
        """Where the best epoch of a stage's model lies; that of "decoder" becomes vqvae.keras in the end."""
        return self.folder / ("backup/best_decoder.keras" if name == "decoder" else f"{name}.keras")

    def has_final_vqvae(self):
        """Whether vqvae.keras is already that of the end, whose decoder sees neighbours."""
        try:
            with zipfile.ZipFile(self.model_path("vqvae")) as archive:
                return json.loads(archive.read("config.json"))["config"]["sees_neighbours"]
        except (OSError, zipfile.BadZipFile, KeyError, ValueError):
            return False

    def backup_path(self, name):
        """Where the latest epoch of a model in training lies, optimiser included, to resume from."""
        return self.folder / "backup" / f"{name}.keras"

    def begin_again(self, name):
        """Advice for a model whose files cannot be used."""
        return f"remove {self.model_path(name)} and {self.backup_path(name)} to begin this stage again"

    def history_path(self, name):
        return self.folder / f"{name}_history.csv"

    def finished_epochs(self, name, epochs):
        """How many of its epochs a model has had; UserError if that cannot be told."""
        path, model, history = self.backup_path(name), self.model_path(name), self.history_path(name)
        if path.exists():
            return read_model_file(path, lambda: int(zipfile.ZipFile(path).read(EPOCHS_FILE)),
                                   self.begin_again(name))
        rows = len(history.read_text().splitlines()) - 1 if history.exists() else 0
        if model.exists() and rows == epochs:
            return epochs
        if model.exists() and rows != 1:  # 1: killed between two files of the first epoch
            raise UserError(f"{model} has no backup to go on from; {self.begin_again(name)}.")
        return 0

    def read_history(self, name):
        """A model's history as an array with a field per column."""
        return np.atleast_1d(np.genfromtxt(self.history_path(name), delimiter=",", names=True))

    def trim_history(self, name, epochs):
        """Cuts a model's history to its first rows, for epochs that were not saved are run again."""
        lines = self.history_path(name).read_bytes().splitlines(keepends=True)
        with whole_file(self.history_path(name)) as new:
            new.write_bytes(b"".join(lines[:1 + epochs]))

    def read_ventricles(self):
        """The dict that `train.fit_ventricles` writes; UserError if it is not there, or says nothing."""
        path = self.folder / "ventricles.json"
        ventricles = json.loads(path.read_text()) if path.is_file() else {"weights": []}
        if not any(ventricles["weights"]):
            raise UserError(f"{path} is missing, or says that the size of ventricles does not follow from "
                            "persons: leave out --ventricles (train.py writes it for three people or more).")
        return ventricles


@contextlib.contextmanager
def take_folder(folder, resume=False):
    """Makes a folder (None: runs/DATE-TIME), locks it for one training and yields its path."""
    folder = Path(folder or time.strftime("runs/%Y%m%d-%H%M%S"))
    is_new = not os.path.lexists(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) as is_locked:
        if is_locked is False:
            raise UserError(f"Another training is at work in {folder}; wait, or give another --run-dir.")
        if is_locked is None:
            print(f"Note: the file system of {folder} has no locks: do not start a second training there.")
        names = {path.name for path in folder.iterdir() if not path.name.endswith(UNFINISHED)}
        if resume:  # a queue's log, say, is no obstacle
            names = set() if "config.json" in names else names & OURS
        if names:
            raise UserError(f"{folder} holds {min(names)}, so no run can begin there; give another --run-dir"
                            f"{'' if resume else ', or --resume to go on with its run'}.")
        try:
            yield folder
        finally:
            if is_new and not any(folder.iterdir()):
                folder.rmdir()  # nothing came of it


def read_model_file(path, load, advice=""):
    """What `load()` returns, which reads a .keras file; UserError, with advice, if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # Keras seeks in it, where Python from 3.13 on checks no sum
                raise ValueError(f"{damaged} in it is damaged")
        return load()
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise  # not the file's fault
    except Exception as error:  # Keras makes objects of what the file says, which may fail in any way
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(f"{path} cannot be loaded ({reason}){advice and f'; {advice}.'}") from error


def newest():
    """The newest finished run in runs/, or None."""
    return max(filter(Run.is_finished, Path("runs").glob("*")), default=None,
               key=lambda folder: (folder / "config.json").stat().st_mtime)


def build_info():
    """What last bits depend on: `packages`, `python`, `processor`, its `cores` and `vector_instructions`."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"packages": {"tensorflow": tf.__version__, **versions},  # it may be installed as tensorflow-cpu
            "python": platform.python_version(), "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "vector_instructions": np.show_config(mode="dicts")["SIMD Extensions"]["found"]}


def git_commit():
    """The commit of this repository that is checked out, "-dirty" if files differ; None outside of git."""
    # Of this folder itself: it may be unpacked inside another repository.
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}",
               "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
