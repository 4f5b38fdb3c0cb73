"""What other software leaves behind, and what every script prints and refuses."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import dataset
import predict
from support import cli
from tests.conftest import check_refused, ROOT
import train

# As in a container that runs as a user who has no entry in /etc/passwd.
OF_NOBODY = """
import pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""
SETTINGS = OF_NOBODY + """
import json, sys
import train
import keras, matplotlib
print(json.dumps([keras.config.backend(), keras.config.floatx(), keras.config.image_data_format(), keras.config.epsilon(),
                  keras.config.max_epochs(), matplotlib.get_backend(), matplotlib.rcParams["lines.linewidth"]]))
"""


def test_settings_of_other_software_change_nothing(tmp_path):
    settings = {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    (tmp_path / "matplotlibrc").write_text("backend: nonsense\nlines.linewidth: 9\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path),
                   "KERAS_MAX_EPOCHS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for name in ("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", SETTINGS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["tensorflow", "float32", "channels_last", 1e-7, None, "Agg", 1.5]
    assert "Traceback" not in done.stderr and "absl::InitializeLog" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"keras.json", "matplotlibrc"}  # nor a folder named ~


def test_what_tensorflow_says_when_it_crashes_is_printed(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        'import os\nos.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n'
        'I0000 port.cc:153] oneDNN custom operations are on. You may see\\n'
        'F0000 cpu_feature_guard.cc:35] This machine has no AVX.\\n")\nos.abort()\n')
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", "import support.cli"], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "F0000 cpu_feature_guard.cc:35] This machine has no AVX.\n"


def test_names_that_are_no_text_are_printed(monkeypatch):
    name = os.fsdecode("Schädel_".encode() + b"\xff.nii")
    streams = {stream: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for stream in ("stdout", "stderr")}
    for stream, ascii_only in streams.items():
        monkeypatch.setattr(sys, stream, ascii_only)

    @cli.exit_on_user_error
    def main():
        print(name)
        raise cli.UserError(f"{name} is empty.")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    for stream in streams.values():
        stream.flush()
        assert rb"Sch\xe4del_\udcff.nii" in stream.buffer.getvalue()


def test_ctrl_c_sigterm_and_a_closed_terminal_end_with_a_line(capsys):
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A shell that starts the tests in the background has SIGINT ignored, and nohup SIGHUP.
        with (cli.signal_handler(signal.default_int_handler, signal.SIGINT), cli.signal_handler(signal.SIG_DFL, signal.SIGHUP),
              pytest.raises(SystemExit) as stop, cli.exit_on_signals("All is saved.")):
            signal.raise_signal(number)
        assert stop.value.code == 130
        assert capsys.readouterr().err == "All is saved.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_nohup_started_goes_on_when_the_terminal_closes():
    with cli.signal_handler(signal.SIG_IGN, signal.SIGHUP), cli.exit_on_signals("All is saved."):
        signal.raise_signal(signal.SIGHUP)


def test_a_thread_runs_without_signal_handlers():
    handlers = []

    def run():
        with cli.exit_on_signals("All is saved."):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_contact_sheet_that_cannot_be_written_is_one_sentence(cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("not a folder")
    check_refused(dataset.main, ["--data-dir", str(cohort)], "runs cannot be written", capsys)


def test_tensorflow_is_given_no_folder_whose_name_is_no_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"run_\xff")
    check_refused(train.main, ["--run-dir", name], "--run-dir: the name run_\\udcff is not valid UTF-8", capsys)
    check_refused(predict.main, ["--export", name], "--export: the name run_\\udcff is not valid UTF-8", capsys)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_whole_or_not_there_and_any_failure_is_one_sentence(tmp_path):
    before = os.umask(0o022)
    try:
        with cli.whole_folder(tmp_path / "new" / "set", "give another") as unfinished:
            (unfinished / "a.txt").write_text("a")
            assert not (tmp_path / "new" / "set").exists()
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "set").stat().st_mode & 0o777 == 0o755  # for everyone to read
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["set", "a.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, reason in ((tmp_path / "link", "exists already"), ("/proc/set", r"/proc/set cannot be written"),
                           (tmp_path / ("x" * 300), "cannot be written")):
        with pytest.raises(cli.UserError, match=reason), cli.whole_folder(folder, "give another"):
            raise AssertionError("nothing may be begun")
    with pytest.raises(cli.UserError, match="full cannot be written .*No space"), cli.whole_folder(tmp_path / "full", "") as unfinished:
        raise OSError(28, "No space left on device", str(unfinished / "x.png"))
    with pytest.raises(OSError, match="mine"), cli.whole_folder(tmp_path / "other", ""):
        raise FileNotFoundError(2, "No such file", "mine.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new"]
