"""Files and folders that are whole or not there. Only what a list of ours names is replaced or removed."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time

from support.cli import can_print, file_error, UserError

WRITTEN = "files.json"  # in a folder of results: the names of what we wrote there
SETTLED = 10  # seconds after which a hidden folder that nobody locks is a killed process'
UNFINISHED = ".unfinished"  # how the names of hidden folders end in which something is being written


def lock(folder):
    """Locks a folder until its descriptor is closed or the process ends; leaves no file, unlike filelock.

    Returns (descriptor, whether it is locked now): False if another process has it, None without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor, True
    except BlockingIOError:
        return descriptor, False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP, or EBADF for a folder on NFS
        return descriptor, None


@contextlib.contextmanager
def unfinished(target):
    """Yields a free path in a hidden folder beside `target`; what is left there at the end is removed.

    So are, at first, hidden folders that nobody locks: of killed processes. Errors of writing name `target`.
    """
    target = Path(target).absolute()
    hidden = descriptor = None
    try:
        prefix = f".{target.name[:40]}-"  # cut: a name may be 255 bytes long at most
        _sweep(target.parent, prefix)
        hidden = Path(tempfile.mkdtemp(UNFINISHED, prefix, target.parent))
        descriptor, _ = lock(hidden)
        yield hidden / target.name
    except Exception as error:
        path, reason = file_error(error)
        if reason is None or path is None and not can_print():
            raise
        is_hidden = path is None or hidden is None or Path(os.fsdecode(path)).is_relative_to(hidden)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, reason, str(target) if is_hidden else path) from error
    finally:
        if hidden:
            shutil.rmtree(hidden, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _sweep(folder, prefix):
    """Removes what killed processes have left in a folder."""
    for leftover in folder.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            descriptor, is_locked = lock(leftover)
            # Another process may be about to lock what it has just made.
            if is_locked and time.time() - leftover.stat().st_mtime > SETTLED:
                shutil.rmtree(leftover, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def whole_file(path):
    """Yields a hidden path to write to, which replaces the file `path` at the end."""
    with unfinished(path) as new:
        yield new
        new.replace(path)


def write_json(path, content):
    """Writes JSON, whole or not at all."""
    with whole_file(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder, option):
    """Yields a new hidden folder, which becomes `folder` at the end; UserError if that exists."""

    def refuse_existing():
        if os.path.lexists(folder):
            raise UserError(f"{folder} exists already; give another {option}.")

    refuse_existing()
    Path(folder).absolute().parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as new:
        new.mkdir()
        yield new
        refuse_existing()  # another process may have made it meanwhile
        new.rename(folder)


@contextlib.contextmanager
def results_folder(folder, option):
    """Yields a new hidden folder, which takes the place of `folder` at the end, at one moment.

    What the list `WRITTEN` in it names goes; whatever else lies there stays.

    Raises:
        UserError: naming `option`, if `folder` holds files and no list, or a file that is not ours has the
            name of a new one.
    """
    target = Path(folder).resolve()
    _foreign_files(target, folder, option)  # refused before the work begins
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as new:
        new.mkdir()
        yield new
        names = sorted(path.name for path in new.iterdir())
        write_json(new / WRITTEN, names)
        for path in _foreign_files(target, folder, option):
            if path.name in names:
                raise UserError(f"{path} is not ours, but would be replaced; give another {option}.")
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
            else:
                _link(path, new / path.name)
        if target.exists():
            _exchange(new, target)
        else:
            new.rename(target)


def _foreign_files(target, folder, option):
    """The paths in a folder of results that are not ours."""
    if not os.path.lexists(target):
        return []
    if not target.is_dir() or os.path.ismount(target):  # a mount point cannot be exchanged
        kind = "a mount point" if target.is_dir() else "no folder"
        raise UserError(f"{folder} is {kind}; give another {option}.")
    entries = list(target.iterdir())
    if not entries:
        return entries
    try:
        ours = {WRITTEN, *json.loads((target / WRITTEN).read_text())}
    except (FileNotFoundError, ValueError, TypeError):
        raise UserError(f"{folder} holds files, but no {WRITTEN} that says which are ours; give another "
                        f"{option}.") from None
    return [path for path in entries if path.name not in ours]


def _link(source, destination):
    """A second name for a file, or a copy where the file system has no such."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _exchange(first, second):
    """Exchanges the names of two folders, at one moment where the system can."""
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    try:
        status = (libc.renamex_np(*names, exchange) if sys.platform == "darwin" else
                  libc.renameat2(here, names[0], here, names[1], exchange))
    except AttributeError:  # an old C library
        status = -1
    if status != 0:
        aside = first.with_name(f"{first.name}.old")
        second.rename(aside)
        first.rename(second)
        aside.rename(first)
