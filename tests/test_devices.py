"""What a GPU box switches on, as far as a CPU can show it: XLA, bfloat16, several devices and machines."""

import contextlib
import functools
import json
import signal
import socket
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import common
from benchmarks.tiny import write_cohort
import dataset
import modules
from support import devices, optimizers, stages
from support.runs import Run
from tests.conftest import check_refused, script_environment
from tests.small import new_run, small_vqvae
import train


def make_data():
    """28 random images of 8x8 blocks, and random codes with their conditions."""
    rng, order = np.random.default_rng(0), np.arange(28, dtype=np.int32)
    images = rng.integers(0, 256, (28, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    split = dataset.Split("train", images, order // 8, order % 8)
    prior = types.SimpleNamespace(grid_size=8, num_embeddings=16, person_size=24, steps_below=(1, 2, 4, 8))
    return split, common.random_codes(split, prior)


def train_both(validate=False, **compile_options):
    """Trains small networks of both kinds: (dict of histories, list of weights, the codebook's counts)."""
    split, coded = make_data()
    batch_size = 9  # of which three devices get 3 images each, but two of them none of the last ones
    keras.utils.set_random_seed(0)
    vqvae = small_vqvae()
    # Without dropout, of which each device has its own
    prior = modules.PixelCNN(8, 16, 8, num_filters=8, num_layers=1, dropout=0.0)
    for model in (vqvae, prior):
        model.compile(optimizers.Muon(1e-3, weight_decay=0.5, global_clipnorm=0.1), **compile_options)
        model.optimizer.build(model.trainable_variables)
    train.start_codebook(vqvae, dataset.image_batches(split, batch_size, 1), 2, fit_batches=2)
    vqvae.quantizer.restart_below = 0.9  # so that many codes restart
    history = {}
    for model, batches, data in (vqvae, dataset.image_batches, split), (prior, dataset.code_batches, coded):
        history |= model.fit(batches(data, batch_size, 0), steps_per_epoch=3, verbose=0, shuffle=False,
                             validation_data=batches(data, batch_size) if validate else None).history
    weights = [variable.numpy() for variable in vqvae.trainable_variables + prior.trainable_variables]
    return history, [*weights, vqvae.quantizer.embeddings.numpy()], vqvae.quantizer.counts.numpy()


@pytest.fixture(scope="module")
def trained_plainly():
    return train_both(validate=True, jit_compile=False)


def test_xla_and_several_steps_at_once_train_as_plain_steps(trained_plainly):
    _, compiled, _ = train_both(jit_compile=True, steps_per_execution=3)
    for one, two in zip(trained_plainly[1], compiled, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-4)


def test_steps_at_once_divide_the_epoch_and_batches_are_shared_out_evenly(monkeypatch):
    assert devices.steps_per_execution(520) == 1  # a CPU
    monkeypatch.setattr(devices, "kind", lambda: "GPU")
    assert [devices.steps_per_execution(steps) for steps in (1, 7, 16, 520, 521)] == [1, 7, 16, 13, 1]
    monkeypatch.setattr(devices, "strategy", lambda: types.SimpleNamespace(num_replicas_in_sync=3))
    for wanted, available, expected in ((8, 100, 9), (8, 8, 6), (1, 8, 3)):
        assert devices.global_batch(wanted, available) == expected


@functools.cache
def three_devices():
    """A strategy of three devices; one for all tests: TensorFlow wants one size of groups."""
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(3)])


def test_three_devices_train_as_one_with_the_same_batches(trained_plainly):
    alone, weights, counts = trained_plainly
    with three_devices().scope():
        together, weights_of_three, counts_of_three = train_both(validate=True)
    # What restarted in the last step has one count.
    assert len(np.unique(counts)) == len(np.unique(counts_of_three)) < 16 and len(alone) == 12
    # It counts the black image in place of an empty part; train.py has its own.
    for name in alone.keys() - {"val_perplexity"}:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-3, err_msg=name)
    for one, three in zip(weights, weights_of_three, strict=True):
        np.testing.assert_allclose(three, one, atol=1e-3)


@pytest.mark.parametrize("before, after, batch_size, steps", ((1, 3, 9, 62), (3, 1, 8, 63)))
def test_a_run_goes_on_with_another_number_of_devices(
        before, after, batch_size, steps, tmp_path, monkeypatch):
    run = Run.load(new_run(tmp_path / "run", write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=5)))
    splits, strategies = train.matching_splits(run, train.parse_arguments([])), []
    monkeypatch.setattr(devices, "strategy", lambda: strategies[-1])
    strategies += [{1: tf.distribute.get_strategy(), 3: three_devices()}[before]]
    stage = train.VQVAEStage(run, splits)
    model, checkpoints = stage.build(), stages.Checkpoints(stage)
    for number, variable in enumerate(model.optimizer.variables[1:]):  # the first counts the steps
        variable.assign(np.full(variable.shape, number))
    checkpoints.set_model(model)
    checkpoints.on_epoch_end(0, {"val_ssim": 0.5})
    strategies += [{1: tf.distribute.get_strategy(), 3: three_devices()}[after]]
    stage = train.VQVAEStage(run, splits)
    resumed = stage.resume(1)
    assert stage.batch_size == batch_size and np.asarray(resumed.optimizer.iterations) == steps
    assert resumed.distribute_strategy is strategies[-1]
    for variable, twin in zip(model.weights + model.optimizer.variables[1:],
                              resumed.weights + resumed.optimizer.variables[1:], strict=True):
        np.testing.assert_array_equal(variable, twin, err_msg=variable.path)


def start_machine(index, addresses, folder, *command):
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen([sys.executable, *command], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=script_environment(TF_CONFIG=json.dumps(config)))


def free_addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


TRAINS_TWICE = """
import sys
import support.environment
import train
train.main(["--resume", "--run-dir", sys.argv[1]])
train.main(["--run-dir", "refused", "--data-dir", sys.argv[2]])
"""


def test_two_machines_end_with_the_weights_of_one_and_what_one_is_refused_ends_both(tmp_path):
    cohort, addresses = write_cohort(tmp_path / "cohort", people=(5, 2, 2), slices=8), free_addresses(2)
    write_cohort(tmp_path / "others", people=(2, 1, 1), slices=4)
    # The machines have dropout for other images, so that without it alone they can end as one does.
    options = cohort, "--epochs", "1", "--prior-epochs", "1"
    changed = {"settings": {"decoder_epochs": 1, "calibration_rounds": 0}, "dropout": 0.0, "num_layers": 1}
    alone, together = (new_run(tmp_path / name, *options, **changed) for name in ("a", "b"))
    machines = [start_machine(index, addresses, tmp_path, "-c", TRAINS_TWICE, *arguments)
                for index, arguments in enumerate(((together, "cohort"), ("other", "others")))]
    try:
        train.main(["--resume", "--run-dir", str(alone)])
        printed = [machine.communicate(timeout=400)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [2, 2], printed
    assert "of 2 machines" in printed[0] and "Done." in printed[0] and not (tmp_path / "other").exists()
    assert "Another machine of the cluster has stopped" in printed[0]
    assert "The data in others are not those" in printed[1] and "Stage" not in printed[1]
    for name in ("vqvae.keras", "pixelcnn.keras"):
        one, two = (modules.load_model(folder / name).weights for folder in (alone, together))
        for variable, twin in zip(one, two, strict=True):
            # Five steps of an epoch are shared: a gradient of one machine alone moves weights by 1e-3.
            np.testing.assert_allclose(twin, variable, rtol=1e-4, atol=1e-4, err_msg=variable.path)


@pytest.mark.parametrize("cluster, kind, index, chief", (
    ({"worker": ["a:1", "b:1"]}, "worker", 0, True), ({"worker": ["a:1", "b:1"]}, "worker", 1, False),
    ({"chief": ["c:1"], "worker": ["a:1"]}, "worker", 0, False), ({"worker": ["a:1"]}, "worker", 0, True),
    ({"worker": ["a:1", "b:1"]}, "worker", 2, None), ("a:1", "worker", 0, None)))
def test_one_machine_of_a_cluster_is_the_chief(cluster, kind, index, chief, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}}))
    monkeypatch.setattr(devices, "cluster", devices.cluster.__wrapped__)
    if chief is None:
        check_refused(train.main, [], "TF_CONFIG describes no cluster", capsys)
    else:
        assert devices.is_chief() == chief


def test_a_wait_for_machines_has_an_end(monkeypatch, capsys):
    """TensorFlow's has none, and holds Python's lock: so the system has to end it, which no handler stops."""
    found, numbers = [], (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)
    def wait():
        found.extend([signal.alarm(0), *map(signal.getsignal, numbers)])
    monkeypatch.setattr(devices, "cluster", lambda: (["a:1", "b:1"], True))
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", wait)
    before = signal.getsignal(signal.SIGINT)
    devices.strategy.__wrapped__()
    assert 0 < found[0] <= devices.JOIN_TIMEOUT and found[1:] == 3 * [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) == before and "Waiting for the machines" in capsys.readouterr().out
