"""What a GPU box switches on, as far as a CPU can show it: XLA, several devices, several machines, bfloat16, failures."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import check_refused, ROOT, TINY, write_cohort
import dataset
import modules
import predict
from support import cli, devices
import train


def small_models(**kwargs):
    """Both networks, seeded, small, compiled."""
    keras.utils.set_random_seed(0)
    models = (modules.VQVAE(64, 16, 4, width=8, num_residual_blocks=1),
              modules.PixelCNN(8, 16, 8, num_filters=8, num_layers=3, dropout=0.0))
    for model in models:
        model.compile(devices.Adam(1e-3, global_clipnorm=1.0), **kwargs)
    return models


def small_batches(count=24):
    """Endless training batches for both, and the same in order."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    split = dataset.Split("train", images, np.arange(count, dtype=np.int32) // 8, np.arange(count, dtype=np.int32) % 8)
    codes = rng.integers(0, 16, (count, 8, 8), np.int32)
    told = split.positions, dataset.slices_below(split, (1, 2, 4, 8)), np.zeros((1, count, 24)), 16
    return dataset.training_batches(split, 8, 0), dataset.code_batches(codes[np.newaxis], *told, 8, 0)


def weights_after(steps, **kwargs):
    """All weights of both networks after a fit."""
    weights = []
    for model, batches in zip(small_models(**kwargs), small_batches()):
        model.fit(batches, steps_per_epoch=steps, epochs=1, verbose=0, shuffle=False)
        weights += [variable.numpy() for variable in model.trainable_variables]
        if isinstance(model, modules.VQVAE):
            weights += [model.quantizer.embeddings.numpy(), model.quantizer.counts.numpy()]
    return weights


# One GPU: XLA, several steps at once, bfloat16


def test_both_stages_train_under_xla_as_without_it():
    for compiled, plain in zip(weights_after(3, jit_compile=True), weights_after(3, jit_compile=False), strict=True):
        np.testing.assert_allclose(compiled, plain, atol=2e-4)


def test_several_steps_at_once_are_the_same_steps():
    for at_once, one_by_one in zip(weights_after(6, steps_per_execution=3), weights_after(6), strict=True):
        np.testing.assert_allclose(at_once, one_by_one, atol=1e-5)


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
    with pytest.raises(cli.InputError, match="8.0 or more, for bfloat16, but A card has 7.5"):
        devices.check_precision(True)


def test_a_driver_without_a_gpu_in_tensorflow_is_told(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert devices.prepare() == "CPU" and not capsys.readouterr().out  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.prepare()
    assert devices.CUDA_COMMAND in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(devices, "Path", lambda name: types.SimpleNamespace(exists=lambda: False))
    devices.prepare()
    assert not capsys.readouterr().out


# Failures are reported as what they are


def test_out_of_memory_is_no_damaged_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    model, _ = small_models()
    model.save(tmp_path / "model.keras")
    monkeypatch.setattr(keras.models, "load_model", fail)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        modules.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("error, expected", (
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[8,64]"),
     "Out of memory (OOM when allocating tensor with shape[8,64]); give a smaller --batch-size"),
    (MemoryError(), "Out of memory (MemoryError)")))
def test_out_of_memory_is_one_sentence(trained, tmp_path, monkeypatch, capsys, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.chdir(trained)
    monkeypatch.setattr(keras.Model, "fit", fail)
    check_refused(train.main, ["--data-dir", "cohort", "--run-dir", str(tmp_path / "run"), *TINY], expected, capsys)


def test_a_disk_that_tensorflow_finds_full_is_one():
    with pytest.raises(cli.InputError, match="run cannot be written .*No space left on device"), train.writing("run"):
        raise tf.errors.ResourceExhaustedError(None, None, "logs/1.tfevents; No space left on device")


def test_any_other_tensorflow_error_stays_itself(trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.InvalidArgumentError(None, None, "must be a compile-time constant")

    monkeypatch.chdir(trained)
    monkeypatch.setattr(keras.Model, "fit", fail)
    with pytest.raises(tf.errors.InvalidArgumentError, match="compile-time constant"):
        train.main(["--data-dir", "cohort", "--run-dir", str(tmp_path / "run"), *TINY])
    monkeypatch.setattr(modules.VQVAE, "encode_to_codes", fail)
    with pytest.raises(tf.errors.InvalidArgumentError, match="compile-time constant"):
        predict.main(["--output-dir", str(tmp_path / "out")])


# Where a stage goes on


def test_the_finished_epochs_stand_in_the_backup_whatever_the_optimizer_counted(tmp_path):
    """Under a loss scale, or with other batches, the optimiser's steps do not tell the epoch."""
    model, _ = small_models()
    (tmp_path / "backup").mkdir()
    checkpoints = train.Checkpoints(train.VQVAE, tmp_path)
    checkpoints.set_model(model)
    assert train.finished_epochs(tmp_path / "backup" / "vqvae.keras") == 0
    best = []
    for epoch, ssim in enumerate((0.5, 0.7, 0.6)):
        model.quantizer.counts.assign(np.full(16, epoch))
        checkpoints.on_epoch_end(epoch, {"val_ssim": ssim})
        best.append(float(modules.load_model(tmp_path / "vqvae.keras").quantizer.counts[0]))
    assert best == [0, 1, 1]
    assert int(model.optimizer.iterations) == 0
    assert train.finished_epochs(tmp_path / "backup" / "vqvae.keras") == 3
    assert float(modules.load_model(tmp_path / "backup" / "vqvae.keras").quantizer.counts[0]) == 2
    assert {path.name for path in (tmp_path / "backup").iterdir()} == {"vqvae.keras"}
    model.save(tmp_path / "backup" / "vqvae.keras")
    with pytest.raises(cli.InputError, match="remove it to begin this stage again"):
        train.finished_epochs(tmp_path / "backup" / "vqvae.keras")


def test_a_prior_of_another_codebook_is_not_resumed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    run = tmp_path / "run"
    shutil.copytree("runs/tiny", run, ignore=shutil.ignore_patterns("metrics.json", "predictions"))
    (run / "backup").mkdir()
    for name in ("vqvae", "pixelcnn"):
        shutil.copy(run / f"{name}.keras", run / "backup")
    assert train.finished_epochs(run / "backup" / "vqvae.keras") in (1, 2)
    with zipfile.ZipFile(run / "backup" / "vqvae.keras", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(train.EPOCHS_FILE, "2")
    with zipfile.ZipFile(run / "backup" / "pixelcnn.keras", "a") as archive:
        archive.writestr(train.EPOCHS_FILE, "1")
    vqvae = modules.load_model(run / "vqvae.keras")
    vqvae.quantizer.embeddings.assign(vqvae.quantizer.embeddings + 0.001)
    vqvae.save(run / "vqvae.keras")
    monkeypatch.setattr(train.figures, "write_gif", lambda *_: None)
    check_refused(train.main, ["--run-dir", str(run), "--resume"], "was trained on the codes of another codebook", capsys)


def test_a_run_of_other_constants_is_not_resumed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    config = json.loads((trained / "runs" / "tiny" / "config.json").read_text())
    assert config["constants"] == train.CONSTANTS
    assert config["vqvae"]["width"] == 64 and config["pixelcnn"]["num_layers"] == 8  # those that no option sets
    (tmp_path / "config.json").write_text(json.dumps({**config, "constants": {**train.CONSTANTS, "prior_batch_size": 3}}))
    check_refused(train.main, ["--run-dir", str(tmp_path), "--resume"], "began with prior_batch_size 3, but", capsys)


def test_people_that_the_model_never_saw_cannot_tell_copies(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    other = write_cohort(tmp_path / "other", people=(3, 2, 2))
    for option in ("--evaluate", "--with-neighbours"):
        check_refused(predict.main, [option, "--data-dir", str(other)], "are not those that runs/tiny was trained on", capsys)
    moved = tmp_path / "moved"
    shutil.copytree("runs/tiny", moved, ignore=shutil.ignore_patterns("predictions"))
    config = json.loads((moved / "config.json").read_text())
    config["data"]["folder"] = "/gone"
    (moved / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(dataset, "find_data", lambda _: (trained / "cohort", True))
    check_refused(predict.main, ["--run-dir", str(moved)], "The data of", capsys)


# Several devices


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
    with pytest.raises(cli.InputError, match="3 training images cannot be shared out among 4 devices"):
        devices.global_batch(8, 3)


# A small prior is traced several times as fast, once for every device.
SMALL_PRIOR = """
import modules, train
with_defaults = train.with_defaults
small = {"num_filters": 16, "num_layers": 3}
train.with_defaults = lambda kind, given: with_defaults(kind, given) | (small if kind is modules.PixelCNN else {})
"""
VIRTUAL_DEVICES = """
import sys
import keras, tensorflow as tf
count, stop_in = int(sys.argv[1]), sys.argv[2]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
import train
from support import devices
devices.strategy = lambda strategy=tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)]): strategy
""" + SMALL_PRIOR + """
save = train.Checkpoints.on_epoch_end
def save_and_stop(self, epoch, logs):
    save(self, epoch, logs)
    if self.stage.name == stop_in and epoch == 0:
        sys.exit(7)
train.Checkpoints.on_epoch_end = save_and_stop
train.main(sys.argv[3:])
"""


def run_on(count, stop_in, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OASIS_DIR": ""}
    return subprocess.run([sys.executable, "-c", VIRTUAL_DEVICES, str(count), stop_in, *arguments], cwd=folder,
                          capture_output=True, text=True, env=environment)


def test_two_devices_stop_and_three_go_on(tmp_path):
    write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=5)
    new = ["--data-dir", "cohort", "--run-dir", "run", *TINY]
    stopped = run_on(2, "vqvae", tmp_path, *new)
    assert stopped.returncode == 7, stopped.stderr
    stopped = run_on(2, "pixelcnn", tmp_path, "--run-dir", "run", "--resume")
    assert stopped.returncode == 7 and "Epoch 2/2" in stopped.stdout, stopped.stderr
    done = run_on(3, "", tmp_path, "--run-dir", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_images"] == 10
    for name in ("vqvae", "pixelcnn"):
        rows = (tmp_path / "run" / f"{name}_history.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1"]


# Several machines


def start_worker(index, workers, folder, script, *arguments):
    config = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OASIS_DIR": "", "TF_CONFIG": config}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def free_addresses(count):
    """Addresses on this machine alone."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


# Each machine has a dropout mask of its own, so that without dropout alone they can end as one does.
WITHOUT_DROPOUT = """
import sys
import train
from support import devices
""" + SMALL_PRIOR + """
devices.Dropout.call = lambda self, inputs, training=False: inputs
train.main(sys.argv[1:])
"""


def test_two_machines_end_with_the_weights_of_one(tmp_path):
    write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=8)
    arguments = ["--data-dir", "cohort", *TINY, "--prior-epochs", "1"]
    workers = free_addresses(2)
    both = [start_worker(index, workers, tmp_path, WITHOUT_DROPOUT, *arguments, "--run-dir", f"two-{index}") for index in range(2)]
    try:
        said = [process.communicate(timeout=200)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert "of 2 machines" in said[0] and "Stage" not in said[1]
    assert not (tmp_path / "two-1").exists()
    done = subprocess.run([sys.executable, "-c", WITHOUT_DROPOUT, *arguments, "--run-dir", "one"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OASIS_DIR": ""})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "two-0").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for name in ("vqvae", "pixelcnn"):
        alone, together = (modules.load_model(tmp_path / run / f"{name}.keras") for run in ("one", "two-0"))
        for one, two in zip(alone.variables, together.variables, strict=True):
            if "seed" not in one.path:
                # Five steps of each epoch are shared: a gradient of one machine alone moves weights by 1e-4 and more.
                np.testing.assert_allclose(two, one, rtol=1e-4, atol=2e-5, err_msg=one.path)


def test_what_one_machine_is_refused_ends_the_other(tmp_path):
    write_cohort(tmp_path / "cohort", people=(2, 1, 1), slices=3)
    write_cohort(tmp_path / "other", people=(2, 1, 1), slices=4)
    script, workers = "import sys, train; train.main(sys.argv[1:])", free_addresses(2)
    both = [start_worker(index, workers, tmp_path, script, "--run-dir", "run", "--data-dir", data)
            for index, data in enumerate(("cohort", "other"))]
    try:
        said = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [2, 2], said
    assert "Another machine of the cluster has stopped" in said[0] and "The data in other are not those" in said[1]


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


@pytest.fixture
def absent_machine(fresh_cluster, monkeypatch):
    """The address of another machine of TF_CONFIG, which is not there."""
    workers = free_addresses(2)
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": 0}}))
    return workers[1]


def test_a_cluster_left_over_from_another_job_is_one_sentence(absent_machine, monkeypatch):
    monkeypatch.setattr(devices, "START_TIMEOUT", 0)
    with pytest.raises(cli.InputError, match=f"No answer within 0 seconds from {absent_machine}.* unset TF_CONFIG"):
        devices.strategy.__wrapped__()  # which is cached


def test_a_port_in_use_is_one_sentence(absent_machine):
    own_address = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][0]
    with socket.create_server(("127.0.0.1", int(own_address.split(":")[1]))):
        with pytest.raises(cli.InputError, match="cannot be joined .*in use.* unset TF_CONFIG"):
            devices.strategy.__wrapped__()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_wait_for_machines_can_be_stopped(absent_machine, monkeypatch, capsys, number):
    monkeypatch.setattr(devices.time, "sleep", lambda _: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        devices.strategy.__wrapped__()
    assert stop.value.code == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_machine_that_accepts_but_does_not_join_ends_the_wait(tmp_path):
    workers = free_addresses(2)
    script = "from support import devices; devices.START_TIMEOUT = 1; devices.strategy()"
    with socket.create_server(("127.0.0.1", int(workers[1].split(":")[1]))):
        waiting = start_worker(0, workers, tmp_path, script)
        try:
            output = waiting.communicate(timeout=60)[0]
        finally:
            waiting.kill()
    assert waiting.returncode == 1 and "Timeout (0:00:01)!" in output
