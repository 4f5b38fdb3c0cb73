"""What depends on the machine: one GPU, several, several machines, and the precision of their arithmetic.

The rest of the code is written as for one device. This is a file of its own because the networks and the commands both need
it, and because it overrides private methods of Keras, as optimizers.py does: both have to be checked with each new version.

References:
    TensorFlow: Distributed training. https://www.tensorflow.org/guide/distributed_training
"""

import contextlib
import faulthandler
import functools
import os
from pathlib import Path
import shutil
import signal
import socket
import time

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from support.cli import message_on_signals, signal_handler, UserError

PACKAGE = "brain_vqvae"  # the name under which Keras files the classes
NO_CLUSTER = "to use this machine alone: unset TF_CONFIG; else see README, Many devices"
CUDA_COMMAND = 'pip install "tensorflow[and-cuda]>=2.21,<2.22"'
START_TIMEOUT = 600  # seconds to wait for the other machines of a cluster
STEPS_AT_ONCE = 16  # at most, on a GPU: no callback can run between them
SAMPLES_AT_ONCE = {"CPU": 32, "GPU": 256}


# What is there --------------------------------------------------------------------------------------------------------


def prepare(exact=False):
    """Sets up TensorFlow for this machine. Call it before anything else touches a device.

    Args:
        exact: turn TensorFloat-32 off, which on recent GPUs rounds the inputs of convolutions to 10 bits, and so changes a
            code here and there.

    Returns:
        What it computes on, in words: "CPU", "GPU", "2 GPUs", "GPU of each of 2 machines", ...

    Raises:
        UserError: if TF_CONFIG describes no cluster.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if exact:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    if not gpus:
        tf.config.experimental.enable_op_determinism()  # the same seed gives the same bits; on a GPU it would cost much
        if is_chief() and _is_gpu_idle():
            print("Note: there is an NVIDIA driver here, but TensorFlow sees no GPU and computes on the CPU. "
                  f"To use the GPU: {CUDA_COMMAND}", flush=True)
    device = "CPU" if not gpus else "GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
    return f"{device} of each of {len(_machines())} machines" if cluster() else device


@contextlib.contextmanager
def full_float32():
    """Turns TensorFloat-32 off inside it, where codes are computed.

    A rounded vector may have another nearest code, and codes have to be the same in training, which allows rounding, and after.
    """
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _is_gpu_idle():
    """Whether there is an NVIDIA driver whose GPUs were not hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None)


def kind():
    """"GPU" or "CPU": what TensorFlow computes on."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


def precision(mixed):
    """The Keras dtype policy of a run, with mixed precision or without."""
    return "mixed_bfloat16" if mixed else "float32"


def check_precision(mixed):
    """Says what mixed precision is worth on this machine, if a run asks for it.

    Raises:
        UserError: if a GPU cannot compute in bfloat16.
    """
    if not mixed:
        return
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = details.get("compute_capability", (0, 0))
        if capability < (8, 0):
            raise UserError(f"--mixed-precision needs GPUs of compute capability 8.0 or more, for bfloat16, but "
                             f"{details.get('device_name', gpu.name)} has {'.'.join(map(str, capability))}; leave it out.")
    if kind() == "CPU":
        print("Note: on most CPUs --mixed-precision is slower, not faster.", flush=True)


@contextlib.contextmanager
def layers_of(policy):
    """Gives the layers made inside it a dtype policy: a saved model is loaded in the precision that it was trained in."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def samples_at_once(bytes_each):
    """How many samples to draw side by side: a GPU has room for more, and waits less for each; 1 GB of noise at most."""
    return max(1, min(SAMPLES_AT_ONCE[kind()], 2 ** 30 // bytes_each))


def steps_per_execution(steps_per_epoch):
    """How many steps TensorFlow runs without Python in between: a divisor of the epoch's, or its end would be overshot.

    On a GPU small steps wait for Python more than they compute; on a CPU, and among several devices, it is 1.
    """
    if kind() == "CPU" or strategy().num_replicas_in_sync > 1:
        return 1
    return max(steps for steps in range(1, STEPS_AT_ONCE + 1) if steps_per_epoch % steps == 0)


# Several devices ------------------------------------------------------------------------------------------------------


@functools.cache
def cluster():
    """The resolver of the cluster that TF_CONFIG describes, or None without one, or if it has one machine only.

    Raises:
        UserError: if TF_CONFIG cannot be understood.
    """
    if not os.environ.get("TF_CONFIG"):
        return None
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        num_machines = sum(map(len, resolver.cluster_spec().as_dict().values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"TF_CONFIG describes no cluster ({_first_line(error)}); {NO_CLUSTER}.") from error
    return resolver if num_machines > 1 else None


def _machines():
    """The addresses of the cluster's machines."""
    return sum(cluster().cluster_spec().as_dict().values(), [])


def is_chief():
    """Whether this process writes the run folder: the chief, else worker 0, of a cluster; any process without one."""
    resolver = cluster()
    if resolver is None or resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0


def print_on_chief(text):
    """Prints a line at once; on several machines the chief alone does."""
    if is_chief():
        print(text, flush=True)


@functools.cache
def strategy():
    """How the work is shared: all machines of the cluster, all GPUs of this one, or (with one or none) not at all.

    In a cluster it has to be made before any other TensorFlow operation.
    """
    if cluster():
        return _join_cluster()
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def new_scope():
    """The scope of `strategy` in which to make a model, whose layers' names are numbered from the start.

    TensorFlow orders some sums by those names: a resumed run, which has loaded a model before it makes one, would else differ
    from an uninterrupted one in the last bits (4e-9 in the prior's embeddings). With the names Keras' global seed and dtype
    policy go back to their defaults, which nothing here relies on.
    """
    keras.utils.clear_session(free_memory=False)
    return strategy().scope()


def _join_cluster():
    """The strategy of all machines of the cluster, once they are there."""
    resolver = cluster()
    try:
        own_address = resolver.cluster_spec().task_address(resolver.task_type, resolver.task_id)
        others = [address for address in _machines() if address != own_address]
        _wait_for_machines(others, int(own_address.rpartition(":")[2]))
        faulthandler.dump_traceback_later(START_TIMEOUT, exit=True)  # it needs no lock of Python's, which TensorFlow holds
        with signal_handler(signal.SIG_DFL, signal.SIGINT):
            return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, OSError) as error:
        raise UserError(f"The cluster of TF_CONFIG cannot be joined ({_first_line(error)}); {NO_CLUSTER}.") from error
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait_for_machines(addresses, own_port):
    """Waits until the other machines of a cluster accept connections, as this one does meanwhile.

    TensorFlow would wait too, but without end, and it holds Python's lock meanwhile: no signal handler could run.

    Args:
        addresses: list of "host:port".
        own_port: the one at which the others look for this machine.

    Raises:
        UserError: if a machine does not answer within `START_TIMEOUT` seconds.
    """
    print(f"Waiting for the other machines of TF_CONFIG: {', '.join(addresses)} ...", flush=True)
    deadline = time.monotonic() + START_TIMEOUT
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with message_on_signals("Stopped."), socket.create_server(("", own_port), family=family, dualstack_ipv6=ipv6):
        while addresses := [address for address in addresses if not _accepts_connections(address)]:
            if time.monotonic() > deadline:
                raise UserError(f"No answer within {START_TIMEOUT} seconds from {', '.join(addresses)}, which TF_CONFIG "
                                 f"names; {NO_CLUSTER}.")
            time.sleep(0.5)


def _accepts_connections(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def global_batch(batch_size, num_images):
    """The batch size of all devices together: rounded up to a multiple of their number, at most the number of images.

    Raises:
        UserError: if there are fewer images than devices.
    """
    replicas = strategy().num_replicas_in_sync
    if num_images < replicas:
        raise UserError(f"{num_images} training images cannot be shared out among {replicas} devices; use fewer of them.")
    return min(-(-batch_size // replicas), num_images // replicas) * replicas


def _alone():
    return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()


def replica():
    """The number of this replica, an int32 tensor, or 0 without a strategy."""
    return 0 if _alone() else tf.distribute.get_replica_context().replica_id_in_sync_group


def fill_if_empty(batch):
    """A replica's part of a batch, or one item of zeros where it got none: oneDNN's convolutions refuse empty batches."""
    if _alone():
        return batch
    missing = tf.maximum(1 - tf.shape(batch)[0], 0)
    return tf.concat([batch, tf.zeros(tf.concat([[missing], tf.shape(batch)[1:]], axis=0), batch.dtype)], axis=0)


def sum_over_replicas(values):
    """The sum of a tensor, or of each of a list, over the replicas of a `tf.distribute` strategy; without one, itself."""
    return values if _alone() else tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


# Several machines -----------------------------------------------------------------------------------------------------


def broadcast(array):
    """The chief's numbers on every machine of a cluster; without one, what was given.

    Args:
        array: NumPy array, or number; of one shape on all machines. Integers are exact below 2^53.
    """
    if cluster() is None:
        return array
    array = np.asarray(array)
    return _over_machines(True)(array.astype(np.float64).ravel()).reshape(array.shape).astype(array.dtype)


@functools.cache
def _over_machines(of_chief):
    """A function that adds float64 (N,) over all replicas; or, of the chief alone, gives the chief's to all."""

    def one(values):
        # Replica 0 belongs to the chief. (tf.identity: all_reduce needs a tensor with a device.)
        own = tf.where(tf.equal(replica(), 0), values, tf.zeros_like(values)) if of_chief else tf.identity(values)
        return sum_over_replicas(own)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float64)])
    def add(values):
        return strategy().run(one, args=(values,))

    return lambda values: strategy().experimental_local_results(add(values))[0].numpy()


def broadcast_variables(variables):
    """Gives all machines of a cluster the chief's values of some variables."""
    if cluster():
        values = [np.asarray(variable) for variable in variables]
        # All at once: each exchange costs a round over the network.
        flat = broadcast(np.concatenate([value.astype(np.float64).ravel() for value in values]))
        for variable, value, part in zip(variables, values, np.split(flat, np.cumsum([value.size for value in values])[:-1])):
            variable.assign(part.reshape(value.shape).astype(value.dtype))


def broadcast_text(text):
    """The chief's text on every machine of a cluster; without one, what was given."""
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    padded = np.zeros(int(broadcast(len(data))), np.int64)
    padded[:len(data)] = data[:len(padded)]
    return broadcast(padded).astype(np.uint8).tobytes().decode()


@contextlib.contextmanager
def fail_together():
    """Ends all machines of a cluster if one of them raises an `UserError` inside it. All have to enter it.

    Raises:
        UserError: on the others.
    """
    try:
        yield
    except UserError:
        if cluster():
            _over_machines(False)(np.ones(1))
        raise
    if cluster() and _over_machines(False)(np.zeros(1))[0]:
        raise UserError("Another machine of the cluster has stopped; what it printed says why.")


@contextlib.contextmanager
def report_failures(advice, resume=""):
    """Says in one sentence that memory ran out, or that another machine is gone; other errors stay what they are.

    Args:
        advice: what to do about the memory.
        resume: how a cluster goes on.
    """
    try:
        yield
    except (tf.errors.ResourceExhaustedError, MemoryError) as error:
        raise UserError(f"Out of memory ({_first_line(error)}); {advice}.") from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
            tf.errors.InternalError) as error:
        if not resume or cluster() is None:
            raise
        raise UserError(f"Another machine of the cluster does not answer ({_first_line(error)}); {resume}.") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# What Keras lacks -----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(PACKAGE)
class Dropout(layers.Dropout):
    """Dropout by a mask of its own on every replica; Keras' own draws the same one on all."""

    def call(self, inputs, training=False):
        """Drops a share of the inputs and scales the rest."""
        if not training or not self.rate:
            return inputs
        seed = tf.cast(tf.math.floormod(self.seed_generator.next(), tf.int32.max - 1), tf.int32)
        seed += tf.stack([0, tf.constant(1_000_003) * replica()])
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed)


class KerasFit:
    """Works around two bugs of `fit` in Keras 3.15 (hence its pin). Goes before `keras.Model` in the bases.

    Keras builds a model on a first batch that it averages over the replicas, which fails if their parts differ in size; and it
    averages the logs of several machines over an axis that scalars do not have. It also builds the optimiser inside the first
    step, which is then traced twice: here it is built before.
    """

    @property
    def metrics(self):
        """What Keras resets before each epoch: the model's `trackers`."""
        return self.trackers

    def logs(self):
        """The values of the `trackers` by name."""
        return {tracker.name: tracker.result() for tracker in self.trackers}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def _make_function(self, step):
        share = self.distribute_strategy
        if not isinstance(share, tf.distribute.MultiWorkerMirroredStrategy):
            return super()._make_function(step)
        run = tf.function(lambda data: share.run(step, args=(data,)), reduce_retracing=True)

        def one_step(iterator):
            # The logs of a step are one replica's; those of an epoch come from the metrics, which are synchronised.
            return {name: share.experimental_local_results(value)[0] for name, value in run(next(iterator)).items()}

        return one_step
