"""A tiny cohort, a run trained on it, and how a test starts a script or sees it refuse."""

import fcntl
import os
from pathlib import Path
import resource

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # to the bit: on the CPU, in the processes of tests too

ROOT = Path(__file__).parents[1]
# They begin first, so that the others fill what time is left; the first two do not both wait for `trained`.
LONGEST = ("test_number_of_slices", "test_predict", "test_devices", "test_train", "test_recipes",
           "test_benchmarks", "test_sampler")


def pytest_collection():
    """Prepares TensorFlow: in each process that runs tests, not in the one that hands them out."""
    import support.environment  # noqa: F401 (first: what TensorFlow and Keras read when they are imported)

    import tensorflow as tf

    # As many devices as any test needs, here and now: TensorFlow takes no more once it is at work.
    cpu, = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture
def cohort(tmp_path):
    """A fresh tiny cohort that the test may spoil."""
    from benchmarks.tiny import write_cohort

    return write_cohort(tmp_path / "cohort")


def script_environment(**variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OASIS_DIR": "", **variables}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny cohort and runs/tiny. All of pytest's processes share it: no test writes there."""
    from benchmarks.tiny import write_cohort
    from tests.small import new_run
    import train

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            write_cohort(folder / "cohort")
            train.main(["--run-dir", str(new_run(folder / "runs" / "tiny", folder / "cohort")), "--resume"])
    return folder


@pytest.fixture
def small_files():
    """Lets no file grow over 100 kB, which stands for a full disk: it fails at the same call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_refused(main, arguments, expected, capsys):
    """Asserts that a script's main ends with status 2 and one sentence that contains what is expected."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert expected in said and "\n" not in said and "Traceback" not in said
