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
    """Writes JSON, whole or not at all."""
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

    The list `WRITTEN` in it names the files that are ours: they go. All else in it, the user's own, stays.
    UserError, which names `option`, if it holds files and no list, what another command than `made_by` wrote,
    or a file of the user's with a new one's name.
    """
    target, _ = check_results_folder(folder, option, made_by)  # before the work begins
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as new:
        new.mkdir()
        yield new
        names = sorted(path.name for path in new.iterdir())
        write_json(new / WRITTEN, {"made_by": made_by, "files": names})
        if not target.exists():
            new.rename(target)
            return
        _, ours = check_results_folder(folder, option, made_by)  # there may be others now
        for name in set(os.listdir(target)).difference(ours).intersection(names):
            raise UserError(f"{folder}/{name} is not ours, but would be replaced; give another {option}.")
        shutil.copytree(target, new, symlinks=True, dirs_exist_ok=True,
                        ignore=lambda inside, _: ours if inside == str(target) else ())
        _exchange(new, target)


def check_results_folder(folder, option, made_by):
    """(What `results_folder` would replace, which names in it are ours); UserError if it would refuse."""
    target, maker, ours, reason = Path(os.path.realpath(folder)), None, set(), None
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
    if reason:
        raise UserError(f"{folder} {reason}; give another {option}.")
    return target, ours


def _exchange(first, second):
    """Exchanges the names of two folders, at one moment where the system can."""
    libc, names = ctypes.CDLL(None), (os.fsencode(first), os.fsencode(second))
    here, exchange = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    failed = (libc.renamex_np(*names, exchange) if sys.platform == "darwin" else
              libc.renameat2(here, names[0], here, names[1], exchange))
    if failed:  # NFS, say
        aside = second.with_name(f".{second.name[:40]}-{os.getpid()}.old")  # a name that is never swept
        second.rename(aside)
        first.rename(second)
        aside.rename(first)
