"""Files and folders that are whole or not there. Only what a list of ours names is replaced or removed."""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time

from support.cli import UNFINISHED, UserError

WRITTEN = "files.json"  # in a folder of results: the names of what we wrote there
SETTLED = 10  # seconds after which a hidden folder that nobody locks is a killed process'


@contextlib.contextmanager
def lock(folder):
    """Locks a folder, yields True; False if another process has it; None on a file system without locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP, or EBADF for a folder on NFS: no locks
        is_locked = False if isinstance(error, BlockingIOError) else None
    try:
        yield is_locked
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unfinished(target):
    """Yields a free path in a hidden folder beside `target`, which is removed at the end."""
    target = Path(target).absolute()
    prefix = f".{target.name[:40]}-"  # cut: a name may be 255 bytes long at most
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):  # of killed processes
        with contextlib.suppress(OSError), lock(leftover) as is_locked:
            # Another process may be about to lock what it has just made.
            if is_locked and time.time() - leftover.stat().st_mtime > SETTLED:
                shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(UNFINISHED, prefix, target.parent, ignore_cleanup_errors=True) as hidden:
        try:
            with lock(hidden):
                yield Path(hidden) / target.name
        except OSError as error:
            error.filename = error.filename or str(target)  # of a full disk Python does not say where
            raise


@contextlib.contextmanager
def whole_file(path):
    """Yields a hidden path to write to, which replaces the file `path` at the end."""
    with unfinished(path) as new:
        yield new
        new.replace(path)


def write_json(path, content):
    with whole_file(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(folder, option):
    """Yields a new hidden folder, which becomes `folder` at the end; UserError if that exists."""
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; give another {option}.")
    Path(folder).absolute().parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder) as new:
        new.mkdir()
        yield new
        new.rename(folder)  # fails if another process has filled one of that name meanwhile


@contextlib.contextmanager
def results_folder(folder, option, made_by):
    """Yields a new hidden folder, which takes the place of `folder` at the end, at one moment.

    The list `WRITTEN` in it names the files that are ours: they go. The user's files beside them stay.
    UserError, which names `option`, if it holds files and no list, what another command than `made_by` wrote,
    what cannot stay (a folder, a file within one of ours), or a file of the user's with a new one's name."""
    target, _ = check_results_folder(folder, option, made_by)  # before the work begins
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as new:
        new.mkdir()
        yield new
        names = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
        write_json(new / WRITTEN, {"made_by": made_by, "files": sorted(names)})
        if not target.exists():
            new.rename(target)
            return
        _, others = check_results_folder(folder, option, made_by)  # there may be more now
        shutil.copymode(target, new)
        for name in others:
            if (new / name).exists():
                raise UserError(f"{folder}/{name} is not ours, but would be replaced; give another {option}.")
            # A second name of the same file: who still writes to it goes on.
            os.link(target / name, new / name, follow_symlinks=False)
        _exchange(new, target)


def check_results_folder(folder, option, made_by):
    """(The folder, the user's files in it, which stay); UserError where `results_folder` would refuse."""
    target, maker, ours, reason, others = Path(os.path.realpath(folder)), None, set(), None, []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no list, or another program's
        written = json.loads((target / WRITTEN).read_text())
        maker, ours = written["made_by"], {WRITTEN, *written["files"]}
    if target.exists() and not target.is_dir():
        reason = "is no folder"
    elif os.path.ismount(target) or Path.cwd().is_relative_to(target):
        reason = "is a mount point or where you are now, so no other folder can take its place"
    elif maker not in (made_by, None):
        reason = f"holds what {maker} wrote"
    elif not maker and target.exists() and any(not path.name.startswith(".") for path in target.iterdir()):
        reason = f"holds files, but no {WRITTEN} of ours that says which are results"
    else:
        for path in sorted(target.rglob("*")):
            name = path.relative_to(target).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if name in ours or is_folder and any(own.startswith(f"{name}/") for own in ours):
                continue
            if path.parent != target or not (path.is_file() or path.is_symlink()):
                reason = f"holds {name}, which is not ours and could not stay"
                break
            others.append(name)
    if reason:
        raise UserError(f"{folder} {reason}; give another {option}.")
    return target, others


def _exchange(first, second):
    """Exchanges the names of two folders, at one moment where the system can."""
    libc, names = ctypes.CDLL(None), (os.fsencode(first), os.fsencode(second))
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    try:
        failed = (libc.renamex_np(*names, exchange) if sys.platform == "darwin" else
                  libc.renameat2(here, names[0], here, names[1], exchange))
    except AttributeError:  # glibc before 2.28
        failed = True
    if failed:  # NFS, say
        aside = second.with_name(f".{second.name[:40]}-{os.getpid()}.old")  # a name that is never swept
        second.rename(aside)
        first.rename(second)
        aside.rename(first)
