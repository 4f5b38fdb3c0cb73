"""What every script says and refuses: the command line, errors in one sentence, files that are whole or not there."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import threading

if sys.platform == "win32":
    sys.exit("This code runs on Linux, macOS and WSL2, not on Windows itself; see README.")

# What other software has set must change neither the numbers nor the pictures. TensorFlow, Keras and matplotlib read these
# settings once, when they are imported. So a script imports this file before them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
for _name in [name for name in os.environ if name.startswith("KERAS_")]:
    del os.environ[_name]
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["KERAS_HOME"] = os.devnull  # no keras.json there: float32 and channels_last, Keras' defaults
os.environ["MPLBACKEND"] = "Agg"  # no display needed

# What TensorFlow 2.21 prints at each import. TF_CPP_MIN_LOG_LEVEL does not reach it.
IMPORT_CHATTER = r"absl::InitializeLog\(\)|oneDNN custom operations are on|Could not find cuda drivers"
MAX_SEED = 2 ** 31  # seeds are less than this, the smallest range of the libraries that take them
EXIT_INTERRUPTED = 130  # exit status after Ctrl-C, SIGTERM or SIGHUP, as shells have it after the first


def import_tensorflow():
    """Imports TensorFlow without its lines of `IMPORT_CHATTER` on stderr; all other lines pass.

    The filter is a process of its own, so that the last words of an import that crashes pass too.
    """
    if sys.stderr is None or shutil.which("grep") is None:
        return
    stderr = os.dup(2)
    with subprocess.Popen(["grep", "-vE", IMPORT_CHATTER], stdin=subprocess.PIPE, stdout=stderr) as grep:
        os.dup2(grep.stdin.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


import_tensorflow()


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Reports a bad argument as the scripts report all bad input: in one sentence."""

    def error(self, message):
        """Raises `InputError` in place of printing the usage."""
        raise InputError(f"{message}; see --help.")


def script_parser(doc, description=None):
    """The parser of a script by its docstring: the first line (unless `description` is given) and the indented examples."""
    lines = doc.split("\n")
    examples = "\n".join(line for line in lines[1:] if line.startswith("    "))
    return ArgumentParser(description=description or lines[0], epilog=f"examples:\n{examples}",
                          formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, minimum, maximum=float("inf")):
    """An argparse type: an int or a finite float of at least `minimum` and less than `maximum`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < maximum:
            below = f" and less than {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected {'an integer' if kind is int else 'a number'} "
                                             f"of at least {minimum}{below}, got {text}")
        return value

    return parse


def utf8_path(text):
    """An argparse type: the name of a folder into which TensorFlow writes, which takes UTF-8 only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"the name {text} is not valid UTF-8, as TensorFlow needs it; choose another") from None
    return text


def exit_on_input_error(main):
    """Wraps a script's main function: an `InputError` becomes one line on stderr and exit status 2, Ctrl-C one line and 130.

    What stdout and stderr cannot encode is printed with backslashes: a file name need not be text.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)

    return wrapper


@contextlib.contextmanager
def signal_handler(handler, *numbers):
    """Handles some signals by `handler` inside it. In a thread Python allows no handlers: there nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def exit_on_signals(message):
    """Ends the process with a line and exit status 130 if Ctrl-C, SIGTERM or SIGHUP (a closed terminal) arrives inside it."""
    # nohup has SIGHUP ignored: then the process shall go on.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    try:
        with signal_handler(signal.default_int_handler, *numbers):
            yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # of a closed terminal
            print(message, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def report_write_errors(folder, advice, also=()):
    """Turns a failure to write into `folder` (full, forbidden, gone) into an `InputError` that ends in `advice`.

    Args:
        folder: for the message.
        advice: what to do.
        also: further kinds of errors that mean so. `tf.errors.OpError` belongs here where TensorFlow writes, and only around
            that: its computations fail with the same errors.
    """
    try:
        yield
    except (OSError, *also) as error:
        message, named = str(error), getattr(error, "filename", None)
        if type(error).__name__ == "ResourceExhaustedError" and "No space left" not in message:
            raise  # memory, not the disk
        if isinstance(named, str) and not any(Path(one).absolute().is_relative_to(Path(other).absolute())
                                              for one, other in ((named, folder), (folder, named))):
            raise  # of another file
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{folder} cannot be written ({reason}); {advice}.") from error


@contextlib.contextmanager
def whole_folder(folder, advice):
    """Yields a hidden folder beside `folder`, which takes its name at the end, or is removed if the end is not reached.

    Args:
        folder: to make.
        advice: what to do if it cannot be made: see `report_write_errors`.

    Raises:
        InputError: if it exists, or cannot be written.
    """
    target = Path(folder).absolute()
    with report_write_errors(folder, advice):
        if os.path.lexists(target):
            raise InputError(f"{folder} exists already; {advice}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}-{os.getpid()}")
        try:
            unfinished.mkdir()
            try:
                yield unfinished
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            if unfinished.name in Path(str(error.filename)).parts:
                error.filename = str(folder)  # what the user knows
            raise


def write_json(path, content):
    """Writes JSON to a temporary name, then renames it, so that the file is whole or not there."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
