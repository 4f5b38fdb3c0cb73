"""What other software leaves behind, and what every script prints and refuses."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading

import h5py
import pytest
import tensorflow as tf

import predict
from support import cli
from tests.conftest import check_refused, ROOT, script_environment
import train


def run_python(code, *arguments, cwd=None, **variables):
    """Runs code in a Python of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True,
                          env=script_environment(**variables))


# The first line: as in a container that runs as a user who has no entry in /etc/passwd
SETTINGS = """
import pwd; pwd.getpwuid = {}.__getitem__
import support.environment
import json
import train
from keras import config
import matplotlib
print(json.dumps([config.backend(), config.floatx(), config.image_data_format(), config.epsilon(),
                  config.max_epochs(), matplotlib.rcParams["lines.linewidth"]]))
"""


def test_settings_of_other_software_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text(json.dumps(
        {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}))
    (tmp_path / "matplotlibrc").write_text("backend: nonsense\nlines.linewidth: 9\n")
    for name in ("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    done = run_python(SETTINGS, cwd=tmp_path, KERAS_BACKEND="torch", KERAS_HOME=str(tmp_path),
                      KERAS_MAX_EPOCHS="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["tensorflow", "float32", "channels_last", 1e-7, None, 1.5]
    assert "Traceback" not in done.stderr and "absl::InitializeLog" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # no folder named ~


NOTEBOOK = """
import os
before = dict(os.environ)
import modules, dataset, predict, train
changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
print(sorted(name for name in changed if name.startswith(("KERAS", "MPL", "XLA"))), before.get("MPLBACKEND"))
"""


def test_importing_the_networks_changes_nothing_of_a_notebook(tmp_path):
    done = run_python(NOTEBOOK, MPLBACKEND="svg", KERAS_HOME=str(tmp_path), KERAS_BACKEND="tensorflow")
    assert done.stdout.strip() == "[] svg", done.stderr


def test_what_tensorflow_says_when_it_crashes_is_printed(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        'import os\nos.write(2, b"WARNING: All log messages before absl::InitializeLog() is called\\n'
        'I0000 port.cc:153] oneDNN custom operations are on. You may see\\n'
        'F0000 cpu_feature_guard.cc:35] This machine has no AVX.\\n")\nos.abort()\n')
    done = run_python("import support.environment", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "F0000 cpu_feature_guard.cc:35] This machine has no AVX.\n"


CLOSED = """
import support.environment
import sys
with open("file", "w") as file:
    print("said")
    print("said", file=sys.stderr)
    file.write(f"{file.fileno() > 2} {sys.stdin.read()}")
"""


def test_a_script_runs_with_all_streams_closed(tmp_path):
    (tmp_path / "tensorflow.py").touch()  # as it is not at work here
    subprocess.run(["sh", "-c", f'{sys.executable} -c "$CODE" <&- >&- 2>&-'], cwd=tmp_path, check=True,
                   env=script_environment(CODE=CLOSED, PYTHONPATH=f"{tmp_path}:{ROOT}"))
    assert (tmp_path / "file").read_text() == "True "


PRINTS = """
from support import cli
@cli.exit_on_user_error
def main():
    for _ in range(100_000):
        print("a line", flush=True)
main()
"""


@pytest.mark.parametrize("target, status, message", (
    ("| head -1 > /dev/null", cli.EXIT_PIPE, ""),
    ("> /dev/full", 2, "the output cannot be written (No space left on device)")))
def test_a_reader_that_is_gone_and_a_full_log_are_no_traceback(target, status, message):
    command = f"{sys.executable} -c \"$CODE\" {target}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], text=True, env=script_environment(CODE=PRINTS),
                          capture_output=True)
    assert done.returncode == status
    assert message in done.stderr and len(done.stderr.splitlines()) == bool(message)


def end_of(function, capsys=None):
    """The exit status of a command that runs a function, and what it said on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_on_user_error(function)()
    return stop.value.code, capsys.readouterr().err if capsys else None


def test_names_that_are_no_text_are_printed(monkeypatch):
    name = os.fsdecode("Schädel_".encode() + b"\xff.nii")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for stream, ascii_only in streams.items():
        monkeypatch.setattr(sys, stream, ascii_only)

    def main():
        print(name, flush=True)
        raise cli.UserError(f"{name} is empty.")

    assert end_of(main) == (2, None)
    for stream in streams.values():
        assert rb"Sch\xe4del_\udcff.nii" in stream.buffer.getvalue()


def test_signals_end_a_command_with_a_line(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def wait(number):
        with cli.message_on_signals("All is saved."):
            signal.raise_signal(number)

    for number in (signal.SIGINT, *cli.STOP_SIGNALS):
        # A shell that starts the tests in the background has SIGINT ignored, and nohup SIGHUP.
        with (cli.signal_handler(signal.default_int_handler, signal.SIGINT),
              cli.signal_handler(signal.SIG_DFL, signal.SIGHUP)):
            assert end_of(lambda number=number: wait(number), capsys) == (130, "All is saved.\n")
    assert signal.getsignal(signal.SIGTERM) == before
    with cli.signal_handler(signal.SIG_IGN, signal.SIGHUP):
        cli.exit_on_user_error(wait)(signal.SIGHUP)  # what nohup started goes on


def test_a_thread_runs_without_signal_handlers():
    handlers = []
    main = cli.exit_on_user_error(lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("error, path, reason", (
    (OSError(errno.ENOSPC, "No space left on device", "a/b.png"), "a/b.png", "No space left on device"),
    (tf.errors.ResourceExhaustedError(None, None, "a; File too large\n more"), "a", "File too large"),
    (tf.errors.UnknownError(None, None, "a; Input/output error"), "a", "Input/output error"),
    (tf.errors.ResourceExhaustedError(None, None, "{{function_node SaveV2}} a/v; Disk quota exceeded [Op:A]"),
     "a/v", "Disk quota exceeded"),
    (RuntimeError("Can't decrement id ref count (file write failed: errno = 28, error message = '...')"),
     None, "No space left on device"),
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), None, None),
    (tf.errors.InvalidArgumentError(None, None, "a; b"), None, None),
    (ValueError("a; Input/output error"), None, None), (AttributeError("None"), None, None)))
def test_what_fails_in_the_file_system_is_told_from_all_else(error, path, reason, capsys):
    assert cli.file_error(error) == (path, reason)

    def fail():
        raise error

    if reason:
        assert end_of(fail, capsys)[1].endswith(f": {f'{path}: ' if path else ''}{reason}.\n")
    else:  # a bug keeps its traceback
        with pytest.raises(type(error)):
            cli.exit_on_user_error(fail)()


def test_hdf5_says_why_it_cannot_write(tmp_path, small_files, capsys):
    def write():
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["data"] = range(100_000)

    status, said = end_of(write, capsys)
    assert status == 2 and said.endswith("File too large.\n") and "Traceback" not in said


def test_a_traceback_is_to_be_had(monkeypatch, capsys):
    def fail():
        raise cli.UserError("No.") from ZeroDivisionError("the cause")

    assert "Traceback" not in end_of(fail, capsys)[1]
    monkeypatch.setenv(cli.DEBUG, "1")
    said = end_of(fail, capsys)[1]
    assert "the cause" in said and "Traceback" in said and said.endswith(": No.\n")


def test_tensorflow_is_given_no_folder_whose_name_is_no_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"run_\xff")
    for main, option in ((train.main, "--run-dir"), (predict.main, "--export")):
        check_refused(main, [option, name], f"{option}: the name run_\\udcff is not UTF-8", capsys)
    assert not list(tmp_path.iterdir())
