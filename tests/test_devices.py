"""What a GPU box switches on, as far as a CPU can show it: XLA, several devices, several machines, bfloat16."""

import functools
import json
import shutil
import signal
import socket
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.tiny import write_cohort
import dataset
from dataset import CodedSplit
import modules
from support import cli, devices, optimizers, stages
from support.runs import Run
from tests.conftest import check_refused, ROOT, script_environment
from tests.small import new_run, small_vqvae
import train


def make_split(count):
    """Random images of 8x8 blocks, and random codes with their conditions."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    split = dataset.Split("train", images, np.arange(count, dtype=np.int32) // 8, np.arange(count, dtype=np.int32) % 8)
    codes = rng.integers(0, 16, (1, count, 8, 8), np.int32)
    return split, CodedSplit(codes, split.positions, dataset.context_indices(split, (1, 2, 4, 8)), np.ones((1, count, 24)), 16)


def train_both(split, coded, clip, batch_size=8, epochs=1, steps_per_epoch=6, validate=False, **compile_options):
    """Trains small networks of both kinds: (dict of histories, list of weights, the codebook's counts)."""
    keras.utils.set_random_seed(0)
    vqvae = small_vqvae()
    prior = modules.PixelCNN(8, 16, 8, num_filters=8, num_layers=3, dropout=0.0)  # each device would drop out its own
    for model in (vqvae, prior):
        model.compile(optimizers.Muon(1e-3, global_clipnorm=clip), **compile_options)
    train.start_codebook(vqvae, dataset.image_batches(split, batch_size, 1), autoencoder_steps=4, fit_batches=2)
    vqvae.quantizer.restart_below = 0.9  # so that many codes restart
    history = {}
    for model, batches, validation in (
            (vqvae, dataset.image_batches(split, batch_size, 0), dataset.image_batches(split, batch_size)),
            (prior, dataset.code_batches(coded, batch_size, 0), dataset.code_batches(coded, batch_size))):
        history |= model.fit(batches, validation_data=validation if validate else None, steps_per_epoch=steps_per_epoch,
                             epochs=epochs, verbose=0, shuffle=False).history
    weights = [variable.numpy() for variable in vqvae.trainable_variables + prior.trainable_variables]
    return history, [*weights, vqvae.quantizer.embeddings.numpy()], vqvae.quantizer.counts.numpy()


# One GPU: XLA, several steps at once, bfloat16


def test_xla_and_several_steps_at_once_train_as_plain_steps():
    data = make_split(24)
    _, plain, _ = train_both(*data, clip=1.0, jit_compile=False)
    _, compiled, _ = train_both(*data, clip=1.0, jit_compile=True, steps_per_execution=3)
    for one, two in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-4)


def test_steps_at_once_divide_the_epoch(monkeypatch):
    assert devices.steps_per_execution(520) == 1  # a CPU
    monkeypatch.setattr(devices, "kind", lambda: "GPU")
    assert [devices.steps_per_execution(steps) for steps in (1, 7, 16, 520, 521)] == [1, 7, 16, 13, 1]


def test_bfloat16_is_saved_and_loaded_as_bfloat16(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype(np.float32)
    vqvae = modules.VQVAE(64, 16, 4, width=8, dtype="mixed_bfloat16")
    prior = modules.PixelCNN(8, 16, 4, num_filters=8, num_layers=3, dtype="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"  # that of the process stays
    vqvae.save(tmp_path / "vqvae.keras")
    prior.save(tmp_path / "prior.keras")
    loaded, loaded_prior = (modules.load_model(tmp_path / f"{name}.keras") for name in ("vqvae", "prior"))
    assert loaded.encode(images).dtype == tf.bfloat16
    assert {block.vertical_conv.compute_dtype for block in loaded_prior.blocks} == {"bfloat16"}
    assert {weight.dtype for weight in loaded.trainable_variables + loaded_prior.trainable_variables} == {"float32"}
    np.testing.assert_array_equal(loaded(images), vqvae(images))
    as_float32 = modules.VQVAE(64, 16, 4, width=8)
    as_float32.set_weights(vqvae.get_weights())
    assert np.abs(as_float32(images) - vqvae(images)).max() > 0  # another network: what loading has to avoid


def gpu(monkeypatch, capability):
    """Lets TensorFlow claim a GPU."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [types.SimpleNamespace(name="GPU:0")])
    monkeypatch.setattr(tf.config.experimental, "get_device_details",
                        lambda _: {"compute_capability": capability, "device_name": "A card"})


def test_bfloat16_wants_a_gpu_that_has_it(monkeypatch, capsys):
    devices.check_precision(True)
    assert "slower" in capsys.readouterr().out
    gpu(monkeypatch, (8, 0))
    devices.check_precision(True)
    gpu(monkeypatch, (7, 5))
    devices.check_precision(False)
    assert not capsys.readouterr().out
    with pytest.raises(cli.UserError, match="8.0 or more, for bfloat16, but A card has 7.5"):
        devices.check_precision(True)


def test_a_driver_whose_gpu_tensorflow_does_not_see_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert devices.prepare() == "CPU" and not capsys.readouterr().out  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.prepare()
    assert devices.CUDA_COMMAND in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(devices, "Path", lambda name: types.SimpleNamespace(exists=lambda: False))
    devices.prepare()
    assert not capsys.readouterr().out


# Several devices: of the virtual ones that conftest.py makes


def replicas(monkeypatch, count):
    """Lets the strategy have so many replicas."""
    monkeypatch.setattr(devices, "strategy", lambda: types.SimpleNamespace(num_replicas_in_sync=count))


def test_batches_are_shared_out_evenly_by_any_number_of_devices(monkeypatch):
    for count in range(1, 9):
        replicas(monkeypatch, count)
        for wanted, available in ((8, 100), (8, 9), (1, 8), (8, 8)):
            batch = devices.global_batch(wanted, available)
            assert batch % count == 0 and 0 < batch <= available
            assert batch >= min(wanted, available - count + 1)
    replicas(monkeypatch, 4)
    with pytest.raises(cli.UserError, match="3 training images cannot be shared out among 4 devices"):
        devices.global_batch(8, 3)


@functools.cache
def three_devices():
    """A strategy of three devices; one for all tests, since TensorFlow lets a process have groups of one size only."""
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(3)])


def test_three_devices_train_as_one_with_the_same_batches():
    data = make_split(28)  # in batches of 9, two devices get none of the last one
    ends = []
    for strategy in (tf.distribute.get_strategy(), three_devices()):
        with strategy.scope():
            ends.append(train_both(*data, clip=0.1, batch_size=9, steps_per_epoch=3, epochs=2, validate=True))
    (alone, weights, counts), (together, weights_of_three, counts_of_three) = ends
    restarted = 16 - len(np.unique(counts))  # what restarted in the last step has one count
    assert restarted == 16 - len(np.unique(counts_of_three)) > 0
    assert alone.keys() == together.keys() and len(alone) == 12
    for name in alone.keys() - {"val_perplexity"}:  # it counts the black image in place of an empty part; train.py has its own
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, err_msg=name)
    for one, three in zip(weights, weights_of_three, strict=True):
        np.testing.assert_allclose(three, one, atol=1e-3)


def test_a_run_goes_on_with_other_numbers_of_devices(tmp_path, monkeypatch):
    folder = new_run(tmp_path / "run", write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=5))
    resume, run, save = ["--run-dir", str(folder), "--resume"], Run.load(folder), stages.Checkpoints.on_epoch_end
    for strategy, stage in ((three_devices(), "vqvae"), (tf.distribute.get_strategy(), "pixelcnn")):

        def save_and_stop(self, epoch, logs, stage=stage):
            save(self, epoch, logs)
            if self.backup_path.stem == stage:
                raise cli.UserError("Stopped.")

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(devices, "strategy", lambda strategy=strategy: strategy)
            patch.setattr(stages.Checkpoints, "on_epoch_end", save_and_stop)
            train.main(resume)
        assert run.finished_epochs(stage) == 1
    monkeypatch.setattr(devices, "strategy", three_devices)
    train.main(resume)
    assert json.loads((run.folder / "metrics.json").read_text())["num_images"] == 10
    for name in ("vqvae", "pixelcnn"):
        assert run.read_history(name)["epoch"].tolist() == [0, 1]


# Several machines


def start_machine(index, addresses, folder, *command):
    """Starts `python command` as one machine of a cluster."""
    config = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=script_environment(TF_CONFIG=config), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ends_of(processes, timeout):
    """What processes printed, and their exit statuses."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return printed, [process.returncode for process in processes]


def free_addresses(count):
    """Addresses on this machine alone."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def test_two_machines_end_with_the_weights_of_one(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=8)
    # Each machine has a dropout mask of its own, so that without dropout alone they can end as one does.
    alone, together = (new_run(tmp_path / name, cohort, "--prior-epochs", "1", dropout=0.0) for name in ("alone", "together"))
    addresses = free_addresses(2)
    script = ROOT / "train.py"
    printed, statuses = ends_of([start_machine(0, addresses, tmp_path, script, "--run-dir", together, "--resume"),
                                 start_machine(1, addresses, tmp_path, script, "--run-dir", "other", "--resume")], timeout=400)
    assert statuses == [0, 0], printed
    assert "of 2 machines" in printed[0] and "Stage" not in printed[1]
    assert not (tmp_path / "other").exists()
    train.main(["--run-dir", str(alone), "--resume"])
    assert {path.name for path in alone.iterdir()} == {path.name for path in together.iterdir()}
    for name in ("vqvae", "pixelcnn"):
        models = (modules.load_model(folder / f"{name}.keras") for folder in (alone, together))
        for one, two in zip(*(model.weights for model in models), strict=True):
            # Five steps of each epoch are shared: a gradient of one machine alone moves weights by 1e-3 and more.
            np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4, err_msg=one.path)


def test_what_one_machine_is_refused_ends_the_other(tmp_path):
    for name, slices in (("cohort", 3), ("other", 4)):
        write_cohort(tmp_path / name, people=(2, 1, 1), slices=slices)
    addresses = free_addresses(2)
    processes = [start_machine(index, addresses, tmp_path, ROOT / "train.py", "--run-dir", "run", "--data-dir", data)
                 for index, data in enumerate(("cohort", "other"))]
    printed, statuses = ends_of(processes, timeout=200)
    assert statuses == [2, 2], printed
    assert "Another machine of the cluster has stopped" in printed[0] and "The data in other are not those" in printed[1]


@pytest.fixture
def fresh_cluster():
    """Forgets the cluster before and after."""
    devices.cluster.cache_clear()
    yield
    devices.cluster.cache_clear()


@pytest.mark.parametrize("config, chief", (
    ({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}, True),
    ({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}, False),
    ({"cluster": {"chief": ["c:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}, False),
    ({"cluster": {"chief": ["c:1"], "worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}, True),
    ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}, True)))
def test_one_machine_of_a_cluster_is_the_chief(fresh_cluster, monkeypatch, config, chief):
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert devices.is_chief() == chief
    assert (devices.cluster() is None) == (len(config["cluster"]["worker"]) + ("chief" in config["cluster"]) == 1)


def test_a_cluster_that_cannot_be_understood_is_one_sentence(fresh_cluster, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", "worker: a:1")
    check_refused(train.main, [], "TF_CONFIG describes no cluster", capsys)


JOINS = """
import support.environment
from support import cli, devices
devices.START_TIMEOUT = devices.JOIN_TIMEOUT = {timeout}
cli.exit_on_user_error(devices.strategy)()
"""


def test_a_machine_that_is_not_there_ends_the_wait_with_a_sentence(tmp_path):
    workers = free_addresses(2)
    (printed,), (status,) = ends_of([start_machine(0, workers, tmp_path, "-c", JOINS.format(timeout=0))], timeout=200)
    assert status == 2 and f"No answer within 0 seconds from {workers[1]}, which" in printed and "unset TF_CONFIG" in printed


def test_a_machine_that_answers_but_does_not_join_ends_the_wait_with_a_sentence(tmp_path):
    workers = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(workers[1].split(":")[1]))):
        process = start_machine(0, workers, tmp_path, "-c", JOINS.format(timeout=3))
        (printed,), (status,) = ends_of([process], timeout=200)
    assert status == -signal.SIGKILL
    said = printed.strip().splitlines()[-1]
    assert workers[1] in said and "have joined within 3 seconds" in said and "unset TF_CONFIG" in said


def test_a_port_in_use_is_one_sentence(tmp_path):
    workers = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(workers[0].split(":")[1]))):
        process = start_machine(0, workers, tmp_path, "-c", JOINS.format(timeout=100))
        (printed,), (status,) = ends_of([process], timeout=200)
    assert status == 2 and "cannot be joined" in printed and "in use" in printed and "Traceback" not in printed


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_wait_for_machines_can_be_stopped(tmp_path, number):
    # A shell that starts the tests in the background has SIGINT ignored.
    with cli.signal_handler(signal.default_int_handler, signal.SIGINT):
        process = start_machine(0, free_addresses(2), tmp_path, "-c", JOINS.format(timeout=100))
    assert "Waiting for the other machines" in process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("Stopped.\n", None) and process.returncode == cli.EXIT_INTERRUPTED


@pytest.mark.parametrize("error, expected", (
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), "Out of memory .OOM when.*smaller batch"),
    (MemoryError(), "Out of memory .MemoryError"),
    (tf.errors.ResourceExhaustedError(None, None, "run/events; Disk quota exceeded"), "^run/events: Disk quota exceeded; go on"),
    (OSError(28, "No space left on device", "run/a"), "^run/a: No space left on device; go on")))
def test_failures_are_told_apart(error, expected):
    with pytest.raises(cli.UserError, match=expected), devices.explain_failures("a smaller batch", "go on"):
        raise error


def test_unknown_flags_of_xla_end_the_process_at_the_start(tmp_path):
    code = "import support.environment\nfrom support import devices\ndevices.try_xla()\nprint('on')"
    for flags, goes_on in (("--xla_no_such_flag=1", False), ("--xla_cpu_enable_fast_math=false", True)):
        done = subprocess.run([sys.executable, "-c", code], env=script_environment(XLA_FLAGS=flags), text=True, capture_output=True)
        assert (done.stdout == "on\n") == goes_on and ("xla_no_such_flag" in done.stderr) != goes_on
