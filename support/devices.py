"""What depends on the machine: one GPU, several, several machines, and the precision of their arithmetic.

Like optimizers.py it overrides private methods of Keras: check both with each new version. See TensorFlow's
guide, https://www.tensorflow.org/guide/distributed_training
"""

import contextlib
import functools
import json
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

from support.cli import file_error, signal_handler, UserError

PACKAGE = "brain_vqvae"  # the name under which Keras files the classes
NO_CLUSTER = "to use this machine alone: unset TF_CONFIG; else see README, Many devices"
CUDA_COMMAND = 'pip install "tensorflow[and-cuda]>=2.21,<2.22"'
START_TIMEOUT, JOIN_TIMEOUT = 600, 120  # seconds in which the other machines must answer, and then join
STEPS_AT_ONCE = 16  # at most, on a GPU: no callback can run between them
SAMPLES_AT_ONCE = {"CPU": 32, "GPU": 256}


# What is there --------------------------------------------------------------------------------------------

def prepare(exact=False):
    """Sets up TensorFlow before anything touches a device; returns in words what it computes on ("2 GPUs").

    `exact` turns TensorFloat-32 off, which on recent GPUs rounds the inputs of convolutions to 10 bits.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if exact:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    if not gpus:
        tf.config.experimental.enable_op_determinism()  # same seed, same bits; on a GPU it would cost much
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        has_driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
        if is_chief() and has_driver and not is_hidden:
            print("Note: there is an NVIDIA driver here, but TensorFlow sees no GPU and computes on the CPU. "
                  f"To use the GPU: {CUDA_COMMAND}", flush=True)
    device = "CPU" if not gpus else "GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
    return f"{device} of each of {len(_machines())} machines" if cluster() else device


def try_xla():
    """Compiles a trifle: XLA ends the process at a flag that it does not know: now, and not after hours."""
    if os.environ.get("XLA_FLAGS") or os.environ.get("TF_XLA_FLAGS"):
        tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))


def kind():
    """"GPU" or "CPU": what TensorFlow computes on."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


def check_precision(mixed):
    """Says what mixed precision is worth here, if a run asks for it; UserError if a GPU has no bfloat16."""
    if not mixed:
        return
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        major, minor = details.get("compute_capability", (0, 0))
        if major < 8:
            raise UserError("--mixed-precision needs GPUs of compute capability 8.0 or more (bfloat16), but "
                            f"{details.get('device_name', gpu.name)} has {major}.{minor}.")
    if kind() == "CPU":
        print("Note: on most CPUs --mixed-precision is slower, not faster.", flush=True)


@contextlib.contextmanager
def layers_of(policy):
    """Gives the layers made inside it a dtype policy: a model is loaded in the precision of its training."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def samples_at_once(bytes_each):
    """How many samples to draw side by side: a GPU waits less for each of many; 1 GB of noise at most."""
    return max(1, min(SAMPLES_AT_ONCE[kind()], 2 ** 30 // bytes_each))


def steps_per_execution(steps_per_epoch):
    """How many steps run without Python in between: a divisor of `steps_per_epoch`, so epochs end exactly.

    Small steps on a GPU wait for Python more than they compute. On a CPU or many devices it is 1.
    """
    if kind() == "CPU" or strategy().num_replicas_in_sync > 1:
        return 1
    return max(steps for steps in range(1, STEPS_AT_ONCE + 1) if steps_per_epoch % steps == 0)


# Several devices ------------------------------------------------------------------------------------------

@functools.cache
def cluster():
    """The resolver of the cluster that TF_CONFIG describes; None without one, or if it has one machine."""
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


@functools.cache
def strategy():
    """How the work is shared: all machines of the cluster, all GPUs of this one, or not at all.

    In a cluster it has to be made before any other operation of TensorFlow.
    """
    if cluster():
        return _join_cluster()
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def new_scope():
    """The scope of `strategy` in which to make a model, whose layers' names are numbered from the start.

    TensorFlow orders some sums by those names: a resumed run, which has loaded a model before it makes one,
    would else differ from an uninterrupted one in the last bits (4e-9 in the prior's embeddings).
    """
    keras.utils.clear_session(free_memory=False)
    return strategy().scope()


def global_batch(batch_size, num_images):
    """The batch size of all devices together: a multiple of their number; UserError if images are too few."""
    replicas = strategy().num_replicas_in_sync
    if num_images < replicas:
        raise UserError(f"{num_images} training images cannot be shared among {replicas} devices; use fewer.")
    return min(-(-batch_size // replicas), num_images // replicas) * replicas


def _single_replica():
    return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()


def replica():
    """The number of this replica, an int32 tensor, or 0 without a strategy."""
    return 0 if _single_replica() else tf.distribute.get_replica_context().replica_id_in_sync_group


def fill_if_empty(batch):
    """A replica's part of a batch, or an item of zeros where it got none: oneDNN refuses empty batches."""
    if _single_replica():
        return batch
    missing = tf.maximum(1 - tf.shape(batch)[0], 0)
    zeros = tf.zeros(tf.concat([[missing], tf.shape(batch)[1:]], axis=0), batch.dtype)
    return tf.concat([batch, zeros], axis=0)


def sum_over_replicas(values):
    """The sum of a tensor, or of each of a list, over the replicas of a strategy; without one, itself."""
    if _single_replica():
        return values
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


# Several machines -----------------------------------------------------------------------------------------

def is_chief():
    """Whether this process writes the run folder: the chief, else worker 0, of a cluster; or without one."""
    resolver = cluster()
    if resolver is None or resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0


def print_on_chief(text):
    """Prints a line at once; on several machines the chief alone does."""
    if is_chief():
        print(text, flush=True)


def on_chief(function, *arguments):
    """Calls a function on the chief; all machines get what it returns (JSON's types), or stop if it fails."""
    with fail_together():
        result = function(*arguments) if is_chief() else None
    if cluster() is None:
        return result
    data = np.frombuffer(json.dumps(result).encode(), np.uint8)
    padded = np.zeros(int(broadcast(len(data))), np.uint8)
    padded[:len(data)] = data[:len(padded)]
    return json.loads(broadcast(padded).tobytes())


@contextlib.contextmanager
def fail_together():
    """A barrier: if one machine fails in this block, all stop. Every machine must run the block."""
    try:
        yield
    except Exception:
        if cluster():
            _sum_over_machines()(np.ones(1))
        raise
    if cluster() and _sum_over_machines()(np.zeros(1))[0]:
        raise UserError("Another machine of the cluster has stopped; what it printed says why.")


def broadcast(array):
    """The chief's numbers on every machine: an array of one shape on all. Integers are exact below 2^53."""
    if cluster() is None:
        return array
    array = np.asarray(array)
    values = array.astype(np.float64).ravel() if is_chief() else np.zeros(array.size)
    return _sum_over_machines()(values).reshape(array.shape).astype(array.dtype)


def broadcast_variables(variables):
    """Gives all machines of a cluster the chief's values of some variables."""
    if cluster():
        values = [np.asarray(variable) for variable in variables]
        # All at once: each exchange costs a round over the network.
        flat = broadcast(np.concatenate([value.ravel() for value in values], dtype=np.float64))
        for variable, value in zip(variables, values):
            variable.assign(flat[:value.size].reshape(value.shape).astype(value.dtype))
            flat = flat[value.size:]


@functools.cache
def _sum_over_machines():
    """A function that adds up the float64 (N,) of all machines."""
    devices_each = len(strategy().extended.worker_devices)

    def add_on_replica(values):
        is_first = tf.equal(replica() % devices_each, 0)  # one device speaks for its machine
        return sum_over_replicas(tf.where(is_first, values, tf.zeros_like(values)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float64)])
    def add(values):
        return strategy().run(add_on_replica, args=(values,))

    return lambda values: strategy().experimental_local_results(add(values))[0].numpy()


def _join_cluster():
    """The strategy of all machines of the cluster, once they are there."""
    resolver = cluster()
    try:
        address = resolver.cluster_spec().task_address(resolver.task_type, resolver.task_id)
        others = [other for other in _machines() if other != address]
        _wait_for_machines(others, int(address.rpartition(":")[2]))
        print(f"All answer, and have {JOIN_TIMEOUT} seconds to join. If this then ends (alarm clock), it is "
              f"not train.py that listens at one of {', '.join(others)}; {NO_CLUSTER}.", flush=True)
        # TensorFlow waits without end, catches SIGTERM and holds Python's lock: the system has to end it.
        signal.alarm(JOIN_TIMEOUT)
        with signal_handler(signal.SIG_DFL, signal.SIGINT):
            joined = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        signal.alarm(0)
        return joined
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, OSError, tf.errors.OpError) as error:
        raise UserError(f"The cluster of TF_CONFIG cannot be joined ({_first_line(error)}); "
                        f"{NO_CLUSTER}.") from error


def _wait_for_machines(addresses, port):
    """Waits until the other machines, "host:port" each, accept connections, as this one does at its port."""
    print(f"Waiting for the other machines of TF_CONFIG: {', '.join(addresses)} ...", flush=True)
    deadline, ipv6 = time.monotonic() + START_TIMEOUT, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=ipv6):
        while addresses := [address for address in addresses if not _accepts_connections(address)]:
            if time.monotonic() > deadline:
                raise UserError(f"No answer within {START_TIMEOUT} seconds from {', '.join(addresses)}, "
                                f"which TF_CONFIG names; {NO_CLUSTER}.")
            time.sleep(0.5)


def _accepts_connections(address):
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return True
    return False


# Errors ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def explain_failures(memory_advice, resume=""):
    """Says in one sentence that memory ran out, a file failed, or another machine is gone, and what to do."""
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
            tf.errors.DeadlineExceededError, tf.errors.InternalError)
    try:
        yield
    except Exception as error:
        path, reason = file_error(error)
        if path and resume:
            raise UserError(f"{path}: {reason}; {resume}.") from error
        if reason is None and isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
            raise UserError(f"Out of memory ({_first_line(error)}); {memory_advice}.") from error
        if isinstance(error, lost) and resume and cluster():
            raise UserError(f"Another machine does not answer ({_first_line(error)}); {resume}.") from error
        raise


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# What Keras lacks -----------------------------------------------------------------------------------------

class Dropout(layers.Dropout):
    """Dropout by a mask of its own on every replica; Keras' own draws the same one on all."""

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        seed = tf.cast(tf.math.floormod(self.seed_generator.next(), tf.int32.max - 1), tf.int32)
        seed += tf.stack([0, tf.constant(1_000_003) * replica()])
        return tf.nn.experimental.stateless_dropout(inputs, self.rate, seed)


class KerasFit:
    """`trackers`, and workarounds for bugs of `fit` in Keras 3.15 (hence its pin). Precedes `keras.Model`.

    Keras builds a model on a first batch that it averages over the replicas, which fails if their parts
    differ in size; it averages the logs of several machines over an axis that scalars do not have; and it
    builds the optimiser inside the first step, which is then traced twice: here it is built before.
    """

    @property
    def metrics(self):
        """What Keras resets before each epoch: the model's `trackers`."""
        return self.trackers

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
            # A step's logs are one replica's; an epoch's come from the metrics, which are synchronised.
            logs = run(next(iterator))
            return {name: share.experimental_local_results(value)[0] for name, value in logs.items()}

        return one_step
