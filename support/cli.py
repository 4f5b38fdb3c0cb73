"""What every script says and refuses: its command line, its errors in one sentence, and signals."""

import argparse
import contextlib
import errno
import functools
import io
import os
from pathlib import Path
import re
import signal
import sys
import threading
import traceback

MAX_SEED = 2 ** 31  # seeds are less than this, the smallest range of the libraries that take them
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141  # the last two as shells have them
DEBUG = "BRAIN_VQVAE_DEBUG"  # the environment variable that adds the traceback to every error
# What asks a program to end: kill, a closed terminal, a queue that takes the machine back
STOP_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
# What TensorFlow says of a file: "{{function_node ...}} PATH; No space left on device [Op:SaveV2]"
REASONS = "|".join(sorted(re.escape(os.strerror(number)) for number in errno.errorcode))
FILE_ERROR = re.compile(rf"(?:\{{\{{.*?\}}\}} )?(.*); ({REASONS})(?: \[Op:\w+\])?$")


class UserError(ValueError):
    """Ends the command with one sentence: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Reports a bad argument by a `UserError`, in place of the usage."""

    def error(self, message):
        raise UserError(f"{message}; see --help.")


def script_parser(doc, description=None):
    """The parser of a script by its docstring: the first line, or `description`, and the examples."""
    first, *lines = doc.split("\n")
    examples = "\n".join(["examples:", *(line for line in lines if line.startswith("    "))])
    return ArgumentParser(description=description or first, epilog=examples,
                          formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, minimum, maximum=float("inf")):
    """An argparse type: an int or a finite float of at least `minimum` and less than `maximum`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < maximum:
            name = "an integer" if kind is int else "a number"
            below = f" and less than {maximum}" if maximum < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected {name} of at least {minimum}{below}, got {text}")
        return value

    return parse


def utf8_path(text):
    """An argparse type: the name of a folder into which TensorFlow writes, which takes UTF-8 only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = f"the name {text} is not UTF-8 under this locale, as TensorFlow needs it"
        raise argparse.ArgumentTypeError(f"{reason}; choose another, or set LC_ALL=C.UTF-8") from None
    return text


def exit_on_user_error(main):
    """Wraps a script's main function: a `UserError` or a failing file system becomes one line and status 2.

    A signal becomes one line and 130; a reader of stdout that is gone (`| head -1`) 141. Every other error is
    a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
                stream.reconfigure(errors="backslashreplace")  # a file name need not be text
        # nohup has SIGHUP ignored: then the process shall go on.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        name = Path(sys.argv[0]).name
        try:
            with signal_handler(signal.default_int_handler, *handled):
                return main(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _exit(str(stop) or "Stopped.", EXIT_INTERRUPTED)
        except UserError as error:
            _exit(f"{name}: {error}", EXIT_ERROR)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is None and not can_print():
                if isinstance(error, BrokenPipeError):
                    sys.exit(EXIT_PIPE)
                _exit(f"{name}: the output cannot be written ({error.strerror}).", EXIT_ERROR)
            path, reason = file_error(error)
            if reason is None:
                raise
            _exit(f"{name}: {path}: {reason}." if path else f"{name}: {reason}.", EXIT_ERROR)

    return wrapper


def _exit(message, status):
    if os.environ.get(DEBUG):
        traceback.print_exc()
    with contextlib.suppress(OSError):  # of a closed terminal
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def file_error(error):
    """(path or None, "No space left on device") of what fails in Python's, HDF5's or TensorFlow's files.

    (None, None) of any other error.
    """
    text = str(error)
    if match := re.search(r"\berrno = (\d+)", text):  # HDF5, in whatever exception h5py raises
        return getattr(error, "filename", None), os.strerror(int(match[1]))
    if isinstance(error, OSError):
        return error.filename, error.strerror or text
    # TensorFlow's RESOURCE_EXHAUSTED means a full disk, a quota, open files or memory: its text says which.
    match = FILE_ERROR.match(text.partition("\n")[0])
    return match.groups() if match and type(error).__module__.startswith("tensorflow") else (None, None)


def can_print():
    """Whether stdout takes a line; if not, /dev/null takes all from now on, Python's last words too."""
    try:
        print(end="\r", flush=True)
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False


@contextlib.contextmanager
def signal_handler(handler, *numbers):
    """Handles some signals by `handler` inside it; in a thread, where Python allows none, nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def message_on_signals(message):
    """Gives what a signal ends in it a last line of its own."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(message) from stop
