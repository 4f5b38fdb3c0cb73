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
import traceback

MAX_SEED = 2 ** 31  # seeds are less than this, the smallest range of the libraries that take them
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141  # the last two as shells have them
DEBUG = "BRAIN_VQVAE_DEBUG"  # the environment variable that adds the traceback to every error
UNFINISHED = ".unfinished"  # how the names of hidden folders end in which something is being written
# What asks a program to end: kill, a closed terminal, a queue that takes the machine back
STOP_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
# What TensorFlow says of a file: "{{function_node ...}} PATH; No space left on device [Op:SaveV2]"
REASONS = "|".join(sorted(re.escape(os.strerror(number)) for number in errno.errorcode))
FILE_ERROR = re.compile(rf"(?:\{{\{{.*?\}}\}} )?(.*); ({REASONS})(?: \[Op:\w+\])?$")
# What TensorFlow raises on one machine of a cluster when another one is gone, or its own port is taken
LOST = {"UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError", "InternalError",
        "UnknownError"}


class UserError(ValueError):
    """Ends the command with one sentence: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help.")


def script_parser(doc):
    return ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, minimum, maximum=float("inf")):
    """An argparse type: an int or a finite float of at least `minimum` and less than `maximum`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if minimum <= kind(text) < maximum:
                return kind(text)
        name = "an integer" if kind is int else "a number"
        below = f" and less than {maximum}" if maximum < float("inf") else ""
        raise argparse.ArgumentTypeError(f"expected {name} of at least {minimum}{below}, got {text}")
    return parse


def exit_on_user_error(main):
    """Wraps a script's main function: a `UserError`, a full disk or a signal ends it with one sentence.

    The exit status is 2, of a signal 130; 141 without a word if the reader of stdout is gone (`| head -1`).
    Every other error is a bug and keeps its traceback."""
    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
                stream.reconfigure(errors="backslashreplace")  # a file name need not be text
        before = {one: signal.signal(one, signal.default_int_handler) for one in STOP_SIGNALS
                  if signal.getsignal(one) != signal.SIG_IGN}  # as nohup sets SIGHUP
        try:
            return main(*args, **kwargs)
        except (KeyboardInterrupt, Exception) as error:
            sentence = explain(error)
            if sentence is None:
                raise
            if os.environ.get(DEBUG):
                traceback.print_exc()
            try:
                print(end="\r" if isinstance(error, OSError) else "", flush=True)  # did stdout fail?
            except OSError as failure:  # Python's own last words, the same again, go nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if isinstance(error, OSError):
                    sentence = f"the output cannot be written ({failure.strerror})."
            if isinstance(error, BrokenPipeError):
                sys.exit(EXIT_PIPE)
            with contextlib.suppress(OSError):  # of a closed terminal
                print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
            sys.exit(EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_ERROR)
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
    return wrapper


def explain(error):
    """The sentence that ends a command, if files, memory or other machines do so; None of a bug."""
    if isinstance(error, UserError):
        return str(error)
    line = (str(error).strip() or repr(error)).splitlines()[0][:300]
    kind = type(error).__name__ if type(error).__module__.startswith("tensorflow") else ""
    if isinstance(error, KeyboardInterrupt):
        sentence = "Stopped"
    elif match := re.search(r"\berrno = (\d+)", str(error)):  # HDF5, in whatever exception h5py raises
        sentence = os.strerror(int(match[1]))
    elif isinstance(error, OSError):
        path = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        sentence = path + (error.strerror or line)
    # TensorFlow's RESOURCE_EXHAUSTED means a full disk, a quota, open files or memory: its text says which.
    elif kind and (match := FILE_ERROR.match(line)):
        sentence = f"{match[1]}: {match[2]}"
    elif isinstance(error, MemoryError) or kind == "ResourceExhaustedError":
        sentence = f"Out of memory ({line}); free some, or use --cache-dir or a smaller --batch-size"
    elif kind in LOST and os.environ.get("TF_CONFIG"):
        sentence = f"The cluster of TF_CONFIG failed ({line})"
    else:
        return None
    # Under its final name, as the user knows it: see `files.unfinished`.
    sentence = re.sub(rf"\.[^/]*{re.escape(UNFINISHED)}/?", "", sentence)
    return "; ".join([sentence, *getattr(error, "__notes__", [])]) + "."


@contextlib.contextmanager
def advise(advice):
    """Adds what to do to whatever ends this block: a signal, a full disk; but a `UserError` has its own."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, UserError):
            error.add_note(advice)
        raise
