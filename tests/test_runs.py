"""The run folder: its config, lock, histories, model files, and where the newest run is."""

import json
import os
import subprocess
import zipfile

import pytest

from support import cli, files, runs
from support.files import write_json
from support.runs import Run

CONFIG = {"settings": {"limit": None, "seed": 7}, "vqvae": {}, "pixelcnn": {"num_positions": 32},
          "data": {"folder": "cohort", "is_demo": False, "fingerprints": {}, "front": "up", "geometry": {}}}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    run.frames_dir.mkdir(parents=True)
    write_json(run.folder / "config.json", CONFIG)
    return run


def test_a_run_loads_as_it_was(run):
    loaded = Run.load(run.folder)
    assert loaded.config == run.config == CONFIG and loaded.folder == run.folder and loaded.seed == 7
    assert loaded.num_positions == 32 and loaded.center == (0, 0)
    assert run.results_path("a") == run.folder / "a"
    (run.folder / "link").symlink_to(runs.PRETRAINED)
    assert Run(run.folder / "link", CONFIG).results_path("a") == runs.SHIPPED_WEIGHTS / "a"


@pytest.mark.parametrize("text, expected", (
    ('{"settings": {"ep', "config.json is damaged"), ("[]", "config.json is damaged"),
    (json.dumps({**CONFIG, "data": {}}), r"of another version \(KeyError\('geometry'"),
    (None, "holds no run .no config.json")))
def test_what_is_no_config_is_one_sentence(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(cli.UserError, match=expected):
        Run.load(tmp_path)


def test_two_trainings_cannot_share_a_folder_and_one_of_no_result_leaves_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda _: "runs/20260102-030405")
    for folder in (tmp_path / "run", None):  # or two that start in one second
        with runs.take_folder(folder) as taken:
            with pytest.raises(cli.UserError, match="Another training is at work"), runs.take_folder(folder):
                pass
        assert not taken.exists()
    def refuse(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    tmp_path.joinpath("run").mkdir()  # the user's
    with runs.take_folder("run") as taken:
        assert "has no locks" in capsys.readouterr().out
    assert taken.exists()


def test_a_history_is_cut_back_to_the_epochs_that_were_saved(run):
    path = run.history_path("vqvae")
    path.write_text("epoch,loss\n0,0.5\n1,0.25\n2,0.125\n")
    run.trim_history("vqvae", 2)
    assert path.read_text() == "epoch,loss\n0,0.5\n1,0.25\n"
    assert run.read_history("vqvae")["loss"].tolist() == [0.5, 0.25]
    run.trim_history("vqvae", 1)
    assert run.read_history("vqvae")["loss"].tolist() == [0.5]  # of one row, still an array


def test_finished_epochs_stand_in_the_backup_and_a_finished_model_is_never_trained_over(run):
    """Without a backup it counts as finished if its history is whole; else it is refused."""
    assert run.finished_epochs("vqvae", 4) == 0
    backup = run.backup_path("vqvae")
    with zipfile.ZipFile(backup, "w") as archive:
        archive.writestr(runs.EPOCHS_FILE, "3")
    assert run.finished_epochs("vqvae", 4) == 3
    backup.write_bytes(b"PK")
    with pytest.raises(cli.UserError, match="vqvae.keras cannot be loaded .*; remove .* to begin"):
        run.finished_epochs("vqvae", 4)
    backup.unlink()
    run.model_path("vqvae").touch()
    for rows, expected in ((4, 4), (1, 0), (0, None), (2, None), (5, None)):
        run.history_path("vqvae").write_text("epoch\n" + "0\n" * rows)
        if expected is not None:  # 1: killed between two files of the first epoch
            assert run.finished_epochs("vqvae", 4) == expected
            continue
        with pytest.raises(cli.UserError, match="vqvae.keras has no backup to go on from; remove .* begin"):
            run.finished_epochs("vqvae", 4)


def test_the_newest_run_is_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.newest() is None
    both = ["config.json", *runs.MODEL_FILES]
    for age, (name, names) in enumerate((("begun", both[:2]), ("stopped", both),
                                         ("finished", [*both, "metrics.json"]), ("stopped later", both))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in names:
            (tmp_path / "runs" / name / file).touch()
        os.utime(tmp_path / "runs" / name / "config.json", (age, age))
    assert runs.newest().name == "finished"


def test_a_run_without_a_measure_of_ventricles_says_so(run):
    for weights in (None, [0, 0]):
        if weights:
            write_json(run.folder / "ventricles.json", {"weights": weights})
        with pytest.raises(cli.UserError, match="does not follow from persons: leave out --ventricles"):
            run.read_ventricles()


def test_the_commit_is_that_of_this_repository_alone(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "outer"]):
        name = "-c", "user.name=a", "-c", "user.email=a"
        subprocess.run(["git", "-C", str(tmp_path), *name, *command], check=True)
    monkeypatch.setattr(runs, "ROOT", inside)
    assert runs.git_commit() is None  # unpacked inside another repository
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    commit = runs.git_commit()
    (inside / "a.py").write_text("2")
    assert len(commit) == 40 and runs.git_commit() == f"{commit}-dirty"
