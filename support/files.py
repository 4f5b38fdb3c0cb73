"""Files and folders that are whole or not there. Only what a list of ours names is ever replaced or removed."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
from pathlib import Path
import re
import shutil
import sys
import tempfile

from support.cli import UserError

WRITTEN = "files.json"  # in a folder of results: the names of what we wrote there
UNFINISHED = ".unfinished"  # how the names of hidden folders end in which something is being written
REASONS = {os.strerror(number) for number in errno.errorcode}


def file_error(error):
    """What an error of the file system says, Python's, HDF5's or TensorFlow's.

    Returns:
        (path or None, the system's reason: "No space left on device"); None of any other error.
    """
    text = str(error)
    if match := re.search(r"\berrno = (\d+)", text):  # HDF5, in whatever exception h5py raises
        return getattr(error, "filename", None), os.strerror(int(match[1]))
    if isinstance(error, OSError):
        return error.filename, error.strerror or text
    # TensorFlow's RESOURCE_EXHAUSTED means a full disk, a quota, too many open files, or memory: its text says which.
    path, _, reason = text.partition("\n")[0].rpartition("; ")
    return (path, reason) if type(error).__module__.startswith("tensorflow") and reason in REASONS else None


def lock(folder):
    """Locks a folder until its descriptor is closed or the process ends; leaves no file, unlike filelock.

    Returns:
        (descriptor, whether it is locked now: True; False if another process has it; None if this file system has no locks).
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
    """Yields a free path in a hidden folder beside `target`, on its file system; what is left there at the end is removed.

    Hidden folders of processes that were killed (nobody locks them) are removed first.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:40]}-"  # cut: a name may be 255 bytes long at most
    for leftover in target.parent.glob(f"{_literal(prefix)}*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            descriptor, is_locked = lock(leftover)
            if is_locked:
                shutil.rmtree(leftover, ignore_errors=True)
            os.close(descriptor)
    hidden, descriptor = None, None
    try:
        hidden = Path(tempfile.mkdtemp(UNFINISHED, prefix, target.parent))
        descriptor, _ = lock(hidden)
        yield hidden / target.name
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        if path and (hidden is None or path.is_relative_to(hidden)) or hidden and not path and error.errno:
            error.filename = str(target)  # what the user knows
        raise
    finally:
        if hidden:
            shutil.rmtree(hidden, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _literal(text):
    return re.sub(r"([*?[])", r"[\1]", text)


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
    """Yields a new hidden folder, which becomes `folder` at the end.

    Args:
        folder: to make.
        option: of the command line, that names it.

    Raises:
        UserError: if it exists.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; give another {option}.")
    with unfinished(folder) as new:
        new.mkdir()
        yield new
        if os.path.lexists(folder):  # made by another process meanwhile
            raise UserError(f"{folder} exists already; give another {option}.")
        new.rename(folder)


@contextlib.contextmanager
def results_folder(folder, option):
    """Yields a new hidden folder, which takes the place of `folder` at the end, at one moment.

    What the list in `WRITTEN` names goes; whatever else lies there stays.

    Args:
        folder: of results: new, empty, or with a list.
        option: of the command line, that names it.

    Raises:
        UserError: if it holds files and no list, or a file that was not ours where a new one has to go.
    """
    target = Path(folder).resolve()
    _foreign(target, folder, option)
    in_place = os.path.ismount(target)  # of a container, say: it cannot be renamed
    with unfinished(target / WRITTEN if in_place else target) as new:
        new.mkdir()
        yield new
        names = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if not path.is_dir())
        write_json(new / WRITTEN, names)
        foreign = [path for path in _foreign(target, folder, option) if not in_place or path != new.parent]
        for path in foreign:
            if (new / path.name).exists():
                raise UserError(f"{path} was not written by this program and would be replaced; move it or give another {option}.")
        if in_place:
            _fill(target, new)
            return
        for path in foreign:
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
            else:
                _link(path, new / path.name)
        _exchange(new, target) if target.exists() else new.rename(target)


def _foreign(target, folder, option):
    """What lies in a folder of results that we did not write, a list of paths."""
    if not os.path.lexists(target):
        return []
    if not target.is_dir():
        raise UserError(f"{folder} is not a folder; give another {option}.")
    entries = list(target.iterdir())
    if not (target / WRITTEN).is_file():
        if [path for path in entries if not path.name.endswith(UNFINISHED)]:
            raise UserError(f"{folder} holds files that this program did not write (it has no {WRITTEN}); give another {option}.")
        return []
    written = _read_list(target, folder, option)
    return [path for path in entries if path.name not in written]


def _read_list(target, folder, option):
    try:
        names = json.loads((target / WRITTEN).read_text())
        return {WRITTEN, *(Path(name).parts[0] for name in names)}
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{folder}/{WRITTEN} is not a list of what this program wrote; give another {option}.") from error


def _fill(target, new):
    """Moves files one by one into a folder that cannot be exchanged; then removes those of the old list that are not new."""
    old = {Path(name) for name in json.loads((target / WRITTEN).read_text())} if (target / WRITTEN).exists() else set()
    files = [path.relative_to(new) for path in new.rglob("*") if not path.is_dir()]
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(target / name)
    for name in old - set(files):
        (target / name).unlink(missing_ok=True)


def _link(source, destination):
    """A second name for a file, or a copy where the file system has no such."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _exchange(first, second):
    """Exchanges the names of two folders, at one moment where the system can."""
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    try:
        done = libc.renamex_np(*names, exchange) if sys.platform == "darwin" else libc.renameat2(
            here, names[0], here, names[1], exchange)
    except AttributeError:  # an old C library
        done = -1
    if done != 0:
        aside = first.with_name(f"{first.name}.old")
        second.rename(aside)
        first.rename(second)
        aside.rename(first)
