"""What depends on the machine: one GPU, several, several machines, and the precision of their arithmetic.

Like optimizers.py it overrides private methods of Keras: check both with each new version.
"""

import contextlib
import functools
import json
import os
from pathlib import Path
import signal

import keras
import numpy as np
import tensorflow as tf

from support.cli import UserError

PACKAGE = "brain_vqvae"  # the name under which Keras files the classes
NO_CLUSTER = "to use this machine alone: unset TF_CONFIG; else see README, GPU and many machines"
JOIN_TIMEOUT = 600  # seconds in which the other machines must start


def prepare(exact=False):
    """Sets up TensorFlow before anything touches a device; returns in words what it computes on ("2 GPUs").

    To train it joins the cluster; `exact`, to predict, turns off TensorFloat-32, which rounds to 10 bits."""
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus:
        tf.config.experimental.enable_op_determinism()  # same seed, same bits; on a GPU it would cost much
        if Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "-1":
            print_on_chief("Note: there is an NVIDIA driver here, but TensorFlow sees no GPU. To use it: "
                           'pip install "tensorflow[and-cuda]>=2.21,<2.22"')
    if exact:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    else:
        strategy()
    device = kind() if len(gpus) < 2 else f"{len(gpus)} GPUs"
    return f"{device} of each of {len(cluster()[0])} machines" if cluster() else device


def kind():
    """"GPU" or "CPU": what TensorFlow computes on."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


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
    return max(1, min(256 if kind() == "GPU" else 32, 2 ** 30 // bytes_each))


def steps_per_execution(steps_per_epoch):
    """How many steps run without Python in between: a divisor of `steps_per_epoch`, so epochs end exactly."""
    # Small steps on a GPU wait for Python more than they compute. But no callback can run between them.
    if kind() == "CPU" or strategy().num_replicas_in_sync > 1:
        return 1
    return max(steps for steps in range(1, 17) if steps_per_epoch % steps == 0)


# Several devices ------------------------------------------------------------------------------------------
@functools.cache
def strategy():
    """How the work is shared: all machines of the cluster, all GPUs of this one, or not at all."""
    if cluster():
        return _join_cluster()
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def new_scope():
    """The scope of `strategy` in which to make a model, whose layers' names are numbered from the start."""
    # TensorFlow orders some sums by those names: a resumed run, which loads a model first, would differ.
    keras.utils.clear_session(free_memory=False)
    return strategy().scope()


def global_batch(batch_size, num_images):
    """The batch size of all devices together: a multiple of their number, no more than there are images."""
    replicas = strategy().num_replicas_in_sync
    return min(-(-batch_size // replicas), num_images // replicas) * replicas


def _single_replica():
    return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()


def replica():
    """The number of this replica, int32; 0 without a strategy."""
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
@functools.cache
def cluster():
    """(The addresses of TF_CONFIG's machines, whether this one is the chief); None without several."""
    if not os.environ.get("TF_CONFIG"):
        return None
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        jobs, job, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        machines, _ = sum(jobs.values(), []), jobs[job][index]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"TF_CONFIG describes no cluster ({error!r}); {NO_CLUSTER}.") from error
    is_first = index == 0 and job == ("chief" if "chief" in jobs else "worker")
    return (machines, is_first) if len(machines) > 1 else None


def _join_cluster():
    print(f"Waiting for the machines of TF_CONFIG: {', '.join(cluster()[0])} ... (alarm clock: one did not "
          f"start train.py within {JOIN_TIMEOUT} seconds; {NO_CLUSTER})", flush=True)
    # TensorFlow waits without end and holds Python's lock: so the system has to end it, at signals too.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.alarm(JOIN_TIMEOUT)
    joined = tf.distribute.MultiWorkerMirroredStrategy()
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return joined


def is_chief():
    """Whether this process writes the run folder: the chief, else worker 0, of a cluster; or without one."""
    return cluster() is None or cluster()[1]


def print_on_chief(text):
    if is_chief():
        print(text, flush=True)


def on_chief(function, *arguments):
    """Calls a function on the chief; all machines get what it returns (JSON's types), or stop if it fails."""
    with fail_together():
        result = function(*arguments) if is_chief() else None
    if cluster() is None:
        return result
    data = np.frombuffer(json.dumps(result).encode(), np.uint8)
    return json.loads(broadcast(np.resize(data, int(broadcast(len(data))))).tobytes())


@contextlib.contextmanager
def fail_together():
    """A barrier: if one machine fails in this block, all stop. Every machine must run the block."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    is_any = cluster() and _sum_over_machines(float(failure is not None)) > 0
    if failure is not None:
        raise failure
    if is_any:
        raise UserError("Another machine of the cluster has stopped; what it printed says why.")


def broadcast(array):
    """The chief's numbers on every machine: an array of one shape on all. Integers are exact below 2^53."""
    if cluster() is None:
        return array
    array = np.asarray(array)
    return _sum_over_machines(np.float64(array if is_chief() else np.zeros_like(array))).astype(array.dtype)


def broadcast_variables(variables):
    for variable in variables if cluster() else ():
        variable.assign(broadcast(np.asarray(variable)))


def _sum_over_machines(values):
    """The sum over all machines of float64 numbers or arrays of one shape."""
    return strategy().reduce(tf.distribute.ReduceOp.SUM, tf.constant(values, tf.float64), axis=None).numpy()


# What Keras lacks -----------------------------------------------------------------------------------------
class KerasFit:
    """`trackers`, and workarounds for bugs of `fit` in Keras 3.15 (hence its pin). Precedes `keras.Model`.

    Keras builds a model on a first batch that it averages over the replicas, which fails if their parts
    differ in size; and it averages the logs of several machines over an axis that scalars do not have."""

    @property
    def metrics(self):
        return self.trackers  # what Keras resets before each epoch

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras would build it inside the first step, which is then traced twice.
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
