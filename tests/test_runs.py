"""The run folder: its config, lock, histories, model files, and where the newest run is."""

import json
import os
import zipfile

import pytest
import tensorflow as tf

from support import cli, runs
from support.runs import Run

DATA = {"folder": "cohort", "is_demo": False, "fingerprints": {}, "front": "up", "geometry": {}}
CONFIG = {"settings": {"limit": None, "seed": 7}, "constants": {}, "vqvae": {}, "pixelcnn": {}, "data": DATA}


@pytest.fixture
def run(tmp_path):
    """A run that has begun."""
    run = Run(tmp_path / "run", CONFIG)
    with run.training(resume=False):
        pass
    return run


def test_a_new_run_writes_its_config_and_loads_as_it_was(run):
    loaded = Run.load(run.folder)
    assert loaded == run and loaded.seed == 7
    assert {path.name for path in run.folder.iterdir()} == {"config.json", "backup"} and run.frames_dir.is_dir()
    for path in (run.model_path("vqvae"), run.history_path("vqvae"), run.metrics_path):
        assert path.parent == run.folder
    assert run.backup_path("vqvae").parent == run.folder / "backup"


@pytest.mark.parametrize("text, expected", (
    ('{"settings": {"ep', "config.json is damaged"), ("[]", "config.json is damaged"),
    (json.dumps({**CONFIG, "data": {}}), "of another version .no data folder"),
    (json.dumps({key: CONFIG[key] for key in ("settings", "constants")}), "of another version .KeyError"),
    (None, "holds no run .no config.json")))
def test_what_is_no_config_is_one_sentence(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(cli.UserError, match=expected) as error:
        Run.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_two_trainings_cannot_share_a_folder_and_a_finished_run_is_not_resumed(run):
    with run.training(resume=True):
        with pytest.raises(cli.UserError, match="Another training is at work in"), run.training(resume=True):
            pass
    run.metrics_path.write_text("{}")
    with pytest.raises(cli.UserError, match="is finished; there is nothing to resume"), run.training(resume=True):
        pass
    assert not run.frames_dir.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence():
    with pytest.raises(cli.UserError, match="/proc/run cannot be written .*another --run-dir"):
        with Run(runs.Path("/proc/run"), CONFIG).training(resume=False):
            pass


def test_a_disk_that_tensorflow_finds_full_is_one_and_its_memory_is_not(run):
    with pytest.raises(cli.UserError, match="run cannot be written .*No space left on device.*--resume"), run.report_write_errors():
        raise tf.errors.ResourceExhaustedError(None, None, "logs/1.tfevents; No space left on device")
    with pytest.raises(tf.errors.ResourceExhaustedError), run.report_write_errors():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")


def test_a_history_is_cut_back_to_the_epochs_that_were_saved(run):
    path = run.history_path("vqvae")
    assert run.trim_history("vqvae", 2) == []
    path.write_text("epoch,loss\n0,0.5\n1,0.25\n2,0.125\n")
    assert run.trim_history("vqvae", 2) == [{"epoch": "0", "loss": "0.5"}, {"epoch": "1", "loss": "0.25"}]
    assert run.read_history("vqvae")["loss"].tolist() == [0.5, 0.25]
    assert run.trim_history("vqvae", 1) and run.read_history("vqvae")["loss"].tolist() == [0.5]  # of one row, still an array
    assert run.trim_history("vqvae", 0) == [] and not path.exists()


def test_finished_epochs_stand_in_the_backup(run):
    assert run.finished_epochs("vqvae") == 0
    with zipfile.ZipFile(run.backup_path("vqvae"), "w") as archive:
        archive.writestr(runs.EPOCHS_FILE, "3")
    assert run.finished_epochs("vqvae") == 3
    for spoil in (lambda path: zipfile.ZipFile(path, "w").close(), lambda path: path.write_bytes(b"PK")):
        spoil(run.backup_path("vqvae"))
        with pytest.raises(cli.UserError, match="vqvae.keras cannot be loaded .*remove it to begin this stage again"):
            run.finished_epochs("vqvae")


def test_the_newest_run_is_the_last_that_has_both_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.newest() is None
    for age, name in enumerate(("c", "a", "b", "unfinished")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file in ("config.json", *runs.MODEL_FILES)[:2 if name == "unfinished" else 3]:
            (folder / file).touch()
        os.utime(folder / "config.json", (age, age))
    assert runs.newest().name == "b"
    assert not Run.has_models(tmp_path / "runs" / "unfinished")


def test_a_run_says_on_what_machine_it_ran():
    machine = runs.build_info()
    assert machine["packages"]["tensorflow"] == tf.__version__ and machine["python"] and machine["processor"]
    assert isinstance(machine["vector_instructions"], list)
