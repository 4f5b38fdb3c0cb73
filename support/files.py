"""Files and folders that are whole or not there. Only what a list of ours names is replaced or removed."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time

import numpy as np

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
        number = getattr(error, "errno", None) or errno.EIO
        if hidden is None:  # it could not be made
            path = target.parent if number in (errno.EACCES, errno.EPERM, errno.EROFS) else target
        elif path is None or Path(os.fsdecode(path)).is_relative_to(hidden):
            inside = hidden / target.name
            path = os.fsdecode(path or inside).replace(str(inside), str(target), 1)  # what the user knows
        raise OSError(number, reason, str(path)) from error
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


def scratch_array(shape, folder):
    """uint8 zeros: in memory, or, if a folder is given, mapped from a file without a name in it."""
    if not folder:
        return np.zeros(shape, np.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A full disk fails here; when a page is written to, it would kill the process (SIGBUS).
        reserve = getattr(os, "posix_fallocate", lambda descriptor, _, size: os.truncate(descriptor, size))
        reserve(file.fileno(), 0, max(1, math.prod(shape)))
        return np.memmap(file, np.uint8, "r+", shape=shape)


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
def results_folder(folder, option, made_by):
    """Yields a new hidden folder, which takes the place of `folder` at the end, at one moment.

    The list `WRITTEN` in it names the files that are ours: they go. The user's own files in it stay.

    Args:
        folder: of results.
        option: of the command line that names it.
        made_by: the command; results of another one are not replaced.

    Raises:
        UserError: if `folder` holds anything but our list, what it names, and plain files of the user's.
    """
    target = check_results_folder(folder, option, made_by)  # before the work begins
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as new:
        new.mkdir()
        yield new
        names = [path.name for path in new.iterdir()]
        write_json(new / WRITTEN, {"made_by": made_by, "files": sorted(names)})
        if not target.exists():
            new.rename(target)
            return
        kept = _user_files(target, folder, option, made_by)
        for path in kept:
            if path.name in names:
                raise UserError(f"{path} is not ours, but would be replaced; give another {option}.")
            if path.is_dir():  # hidden: of an editor or Jupyter
                shutil.copytree(path, new / path.name, symlinks=True)
                continue
            try:
                os.link(path, new / path.name, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(path, new / path.name, follow_symlinks=False)
        shutil.copymode(target, new)
        before = {path.name for path in target.iterdir()}
        _exchange(new, target)
        for path in new.iterdir():
            if path.name not in before:  # came a moment ago
                path.rename(target / path.name)


def check_results_folder(folder, option, made_by):
    """The path that `results_folder` would replace; UserError if it would refuse."""
    target = Path(os.path.realpath(folder))
    _user_files(target, folder, option, made_by)
    return target


def _user_files(target, folder, option, made_by):
    """The files in a folder of results that are the user's; UserError if results cannot take its place."""
    def refuse(what):
        raise UserError(f"{what}; give another {option}.")

    if not os.path.lexists(target):
        return []
    if not target.is_dir():
        refuse(f"{folder} is no folder")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        refuse(f"{folder} is a mount point or where you are now, so no other folder can take its place")
    try:
        written = json.loads((target / WRITTEN).read_text())
        maker, ours = written["made_by"], {WRITTEN, *written["files"]}
    except FileNotFoundError:
        maker, ours = made_by, set()
    except (ValueError, TypeError, KeyError):
        refuse(f"{folder}/{WRITTEN} is not ours")
    if maker != made_by:
        refuse(f"{folder} holds what {maker} wrote")
    kept = [path for path in target.iterdir() if path.name not in ours]
    if not ours and any(not path.name.startswith(".") for path in kept):
        refuse(f"{folder} holds files, but no {WRITTEN} that says which are ours")
    for path in kept:
        is_folder = path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        if path.lstat().st_uid != os.getuid() or is_folder:
            refuse(f"{path} is a folder or somebody else's, so it cannot be kept beside new results")
    return kept


def _exchange(first, second):
    """Exchanges the names of two folders, at one moment where the system can."""
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    try:
        status = (libc.renamex_np(*names, exchange) if sys.platform == "darwin" else
                  libc.renameat2(here, names[0], here, names[1], exchange))
    except AttributeError:  # an old C library
        status = -1
    if status != 0:  # NFS, say
        aside = second.with_name(f".{second.name[:40]}-{os.getpid()}.old")  # a name that is never swept
        try:
            second.rename(aside)
            first.rename(second)
        except BaseException:
            if aside.exists() and not second.exists():
                aside.rename(second)
            raise
        aside.rename(first)
