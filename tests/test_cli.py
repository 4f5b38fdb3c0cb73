"""What other software leaves behind, and what every script prints and refuses."""

import errno
import json
import signal
import subprocess
import sys
from unittest import mock

import pytest
import tensorflow as tf

from support import cli
from tests.conftest import ROOT, script_environment


def run_python(code, cwd=None, **variables):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env=script_environment(**variables))


# The first line: as in a container that runs as a user who has no entry in /etc/passwd
SETTINGS = """
import pwd; pwd.getpwuid = {}.__getitem__
import support.environment
import train
from keras import config
import matplotlib
print(config.backend(), config.floatx(), config.image_data_format(), config.epsilon(), config.max_epochs(),
      matplotlib.rcParams["lines.linewidth"])
"""


def test_settings_of_other_software_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "keras.json").write_text(json.dumps(
        {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}))
    (tmp_path / "matplotlibrc").write_text("backend: nonsense\nlines.linewidth: 9\n")
    for name in ("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    done = run_python(SETTINGS, cwd=tmp_path, KERAS_BACKEND="torch", KERAS_HOME=str(tmp_path),
                      KERAS_MAX_EPOCHS="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.stdout == "tensorflow float32 channels_last 1e-07 None 1.5\n", done.stderr
    assert "Traceback" not in done.stderr and "absl::InitializeLog" not in done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # no folder named ~


CLOSED = """
import support.environment
import sys
with open("file", "w") as file:
    print("said")
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
    ("> /dev/full", 2, "-c: the output cannot be written (No space left on device).\n")))
def test_a_reader_that_is_gone_and_a_full_log_are_no_traceback(target, status, message):
    command = f"{sys.executable} -c \"$CODE\" {target}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], text=True, env=script_environment(CODE=PRINTS),
                          capture_output=True)
    assert (done.returncode, done.stderr) == (status, message)


def end_of(function, capsys):
    """The exit status of a command that runs a function, and what it said on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.exit_on_user_error(function)()
    return stop.value.code, capsys.readouterr().err.partition(": ")[2]


def test_names_that_are_no_text_are_printed():
    code = ("from support import cli\nimport os\n@cli.exit_on_user_error\ndef main():\n"
            "    raise cli.UserError(os.fsdecode(b'Sch\\xc3\\xa4del_\\xff.nii'))\nmain()")
    done = run_python(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and r"Sch\xe4del_\udcff.nii" in done.stderr


def test_signals_end_a_command_with_a_line(capsys):
    def wait(number):
        with cli.advise("all is saved"):
            signal.raise_signal(number)
    for number in (signal.SIGINT, *cli.STOP_SIGNALS):
        before = signal.signal(number, signal.SIG_IGN)
        cli.exit_on_user_error(wait)(number)  # what nohup started goes on
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
        assert end_of(lambda number=number: wait(number), capsys) == (130, "Stopped; all is saved.\n")
        assert signal.signal(number, before) == default


@pytest.mark.parametrize("error, expected", (
    (OSError(errno.EIO, "Input/output error", "/a/.set-x1.unfinished/set/b"), "/a/set/b: Input/output error"),
    (tf.errors.ResourceExhaustedError(None, None, "a; File too large\n more"), "a: File too large; go on."),
    (tf.errors.UnknownError(None, None, "{{function_node SaveV2}} a/v; Disk quota exceeded [Op:A]"),
     "a/v: Disk quota exceeded; go on."),
    (RuntimeError("Can't decrement id ref count (file write failed: errno = 28, error message = '...')"),
     "No space left on device; go on."),
    (tf.errors.ResourceExhaustedError(None, None, "OOM when"), "Out of memory (OOM when); free some, or"),
    (MemoryError(), "Out of memory (MemoryError()); free some, or use --cache-dir"),
    (tf.errors.UnavailableError(None, None, "b:1"), "The cluster of TF_CONFIG failed (b:1); go on."),
    (cli.UserError("It is so."), "It is so.\n")))
def test_what_is_no_bug_ends_with_one_sentence(error, expected, monkeypatch, capsys):
    def fail():
        with cli.advise("go on"):
            raise error
    monkeypatch.setenv("TF_CONFIG", "{}")
    status, said = end_of(fail, capsys)
    assert status == 2 and said.startswith(expected) and said.count("\n") == 1
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(SystemExit):
        cli.exit_on_user_error(fail)()
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(tf.errors.InvalidArgumentError):
        cli.exit_on_user_error(mock.Mock(side_effect=tf.errors.InvalidArgumentError(None, None, "a; b"),
                                         __name__="main"))()
