"""The run folder: its config, lock, histories, model files, and where the newest run is."""

import json
import os
import subprocess
import zipfile

import keras
import pytest
import tensorflow as tf

from support import cli, files, runs
from support.files import write_json
from support.runs import Run

DATA = {"folder": "cohort", "is_demo": False, "fingerprints": {}, "front": "up", "geometry": {}}
CONFIG = {"settings": {"limit": None, "seed": 7}, "vqvae": {}, "pixelcnn": {}, "data": DATA}


@pytest.fixture
def run(tmp_path):
    """A run that has begun."""
    run = Run(tmp_path / "run", CONFIG)
    run.frames_dir.mkdir(parents=True)
    write_json(run.folder / "config.json", CONFIG)
    return run


def test_a_new_run_writes_its_config_and_loads_as_it_was(run):
    loaded = Run.load(run.folder)
    assert loaded.config == run.config == CONFIG and loaded.folder == run.folder and loaded.seed == 7
    assert {path.name for path in run.folder.iterdir()} == {"config.json", "backup"}
    assert run.model_path("vqvae").parent == run.history_path("vqvae").parent == run.folder
    assert run.backup_path("vqvae").parent == run.folder / "backup"
    assert run.results_path("a") == run.folder / "a"
    (run.folder / "link").symlink_to(runs.ROOT)
    for folder in (runs.PRETRAINED, run.folder / "link" / "assets" / "pretrained"):
        assert Run(folder, CONFIG).results_path("a") == runs.SHIPPED_WEIGHTS / "a"


@pytest.mark.parametrize("text, expected", (
    ('{"settings": {"ep', "config.json is damaged"), ("[]", "config.json is damaged"),
    (json.dumps({**CONFIG, "data": {}}), r"of another version \(KeyError\('folder'"),
    (json.dumps({"settings": CONFIG["settings"]}), r"of another version \(KeyError\('data'"),
    (None, "holds no run .no config.json")))
def test_what_is_no_config_is_one_sentence(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(cli.UserError, match=expected) as error:
        Run.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_two_trainings_cannot_share_a_folder_and_one_of_no_result_leaves_none(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with runs.take_folder(folder):
        with pytest.raises(cli.UserError, match="Another training is at work in"), runs.take_folder(folder):
            pass
    assert not folder.exists()
    folder.mkdir()  # the user's
    with runs.take_folder(folder):
        pass
    assert folder.exists()

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with runs.take_folder(folder):
        write_json(folder / "config.json", CONFIG)
    assert "has no locks" in capsys.readouterr().out and folder.exists()


def test_two_starts_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda _: "runs/20260102-030405")
    with runs.take_folder(None) as first, runs.take_folder(None) as second, runs.take_folder(None) as third:
        assert (first.name, second.name) == ("20260102-030405", "20260102-030405-2")
        assert third.name == "20260102-030405-3"


def test_a_history_is_cut_back_to_the_epochs_that_were_saved(run):
    path = run.history_path("vqvae")
    run.trim_history("vqvae", 0)
    path.write_text("epoch,loss\n0,0.5\n1,0.25\n2,0.125\n")
    run.trim_history("vqvae", 2)
    assert path.read_text() == "epoch,loss\n0,0.5\n1,0.25\n"
    assert run.read_history("vqvae")["loss"].tolist() == [0.5, 0.25]
    run.trim_history("vqvae", 1)
    assert run.read_history("vqvae")["loss"].tolist() == [0.5]  # of one row, still an array
    run.trim_history("vqvae", 0)
    assert not path.exists()


def test_finished_epochs_stand_in_the_backup(run):
    assert run.finished_epochs("vqvae", 4) == 0
    with zipfile.ZipFile(run.backup_path("vqvae"), "w") as archive:
        archive.writestr(runs.EPOCHS_FILE, "3")
    assert run.finished_epochs("vqvae", 4) == 3
    for spoil in (lambda path: zipfile.ZipFile(path, "w").close(), lambda path: path.write_bytes(b"PK")):
        spoil(run.backup_path("vqvae"))
        with pytest.raises(cli.UserError, match="vqvae.keras cannot be loaded .*remove it and .* to begin"):
            run.finished_epochs("vqvae", 4)
    run.finish_stage("vqvae")
    assert run.finished_epochs("vqvae", 4) == 4  # a finished stage needs no backup


def test_a_finished_model_is_never_trained_over(run):
    """Without metrics.json and backup: it counts as finished if its history is whole, else it is refused."""
    run.model_path("vqvae").touch()
    for rows, expected in ((4, 4), (1, 0)):  # 1: killed between two files of the first epoch
        run.history_path("vqvae").write_text("epoch\n" + "0\n" * rows)
        assert run.finished_epochs("vqvae", 4) == expected
    for rows in (0, 2, 3, 5):
        run.history_path("vqvae").write_text("epoch\n" + "0\n" * rows)
        with pytest.raises(cli.UserError, match="vqvae.keras has no backup to go on from; remove it"):
            run.finished_epochs("vqvae", 4)


def test_the_newest_run_is_a_finished_one_if_there_is_any(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.newest() is None
    both = ["config.json", *runs.MODEL_FILES]
    for age, (name, files_of_run) in enumerate({
            "begun": both[:2], "stopped": both, "old": [*both, "metrics.json"],
            "finished": [*both, "metrics.json"], "stopped later": both}.items()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file in files_of_run:
            (folder / file).touch()
        os.utime(folder / "config.json", (age, age))
    assert runs.newest().name == "finished"
    for name in ("finished", "old"):
        (tmp_path / "runs" / name / "metrics.json").unlink()
    assert runs.newest().name == "stopped later"


@pytest.mark.parametrize("text, expected", (
    (None, "ventricles.json is missing.*three people"), ("{", "is damaged"),
    ('{"weights": [1], "offset": 0}', "is damaged"),
    ('{"weights": [0, 0], "offset": 1, "quantiles": [1]}', "does not follow from persons")))
def test_a_run_without_a_measure_of_ventricles_says_so(run, text, expected):
    if text is not None:
        (run.folder / "ventricles.json").write_text(text)
    with pytest.raises(cli.UserError, match=expected):
        run.read_ventricles()
    ventricles = {"weights": [1, 0], "offset": 1.5, "quantiles": [1, 2]}
    (run.folder / "ventricles.json").write_text(json.dumps(ventricles))
    assert run.read_ventricles() == ventricles


def test_a_run_says_on_what_machine_it_ran():
    build = runs.build_info()
    assert build["packages"]["tensorflow"] == tf.__version__
    assert build["packages"]["keras"] == keras.__version__
    assert build["python"] and build["processor"] and build["cores"] == len(os.sched_getaffinity(0))


def test_the_commit_is_that_of_this_repository_alone(tmp_path, monkeypatch):
    def git(*command):
        name = "-c", "user.name=a", "-c", "user.email=a"
        subprocess.run(["git", "-C", str(tmp_path), *name, *command], check=True)

    git("init", "-q")
    monkeypatch.setattr(runs, "ROOT", tmp_path / "inside")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "outer")
    assert runs.git_commit() is None  # unpacked inside another repository
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    commit = runs.git_commit()
    assert len(commit) == 40
    (tmp_path / "inside" / "a.py").write_text("2")
    assert runs.git_commit() == f"{commit}-dirty"
