"""What depends on the machine: one GPU, several, several machines, and the precision of their arithmetic.

The rest of the code is written as for one device. It is a file of its own because the networks (modules.py, prior.py) and the
commands (train.py, predict.py) both need it, and because it leans on two private methods of Keras, which one wants to find in one place.

References:
    TensorFlow: Distributed training. https://www.tensorflow.org/guide/distributed_training
"""

import contextlib
import functools
import os
from pathlib import Path
import shutil
import subprocess
import sys
import threading

import keras
from keras import layers
import numpy as np
import tensorflow as tf

from support.cli import InputError

PACKAGE = "brain_vqvae"  # the name under which Keras files the classes
CUDA_COMMAND = 'pip install "tensorflow[and-cuda]>=2.21,<2.22"'
PATIENCE = 600  # seconds to wait for the other machines to start
STEPS_AT_ONCE = 16  # at most, on a GPU: between them Python does not get a word in
SAMPLES_AT_ONCE = {"CPU": 32, "GPU": 256}


# What is there --------------------------------------------------------------------------------------------------------


def prepare(exact=False):
    """Sets up TensorFlow for this machine. Call it before anything else touches a device.

    Args:
        exact: turn TensorFloat-32 off, which on recent GPUs rounds the inputs of convolutions to 10 bits, and so changes a
            code here and there.

    Returns:
        What it computes on, for people: "CPU", "GPU", "2 GPUs", ...
    """
    cluster()  # under Slurm it chooses this task's GPUs, before TensorFlow looks for them
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
    return "CPU" if not gpus else "GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"


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
        InputError: if a GPU cannot compute in bfloat16.
    """
    if not mixed:
        return
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = details.get("compute_capability", (0, 0))
        if capability < (8, 0):
            raise InputError(f"--mixed-precision needs GPUs of compute capability 8.0 or more, for bfloat16, but "
                             f"{details.get('device_name', gpu.name)} has {'.'.join(map(str, capability))}; leave it out.")
    if kind() == "CPU":
        print("Note: on most CPUs --mixed-precision is slower, not faster.", flush=True)


@contextlib.contextmanager
def layers_of(policy):
    """Gives the layers made inside it a model's dtype policy: a saved model then comes back in the precision it was trained in."""
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


def _has_nvidia_gpus():
    return shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


@functools.cache
def cluster():
    """The resolver of the cluster that TF_CONFIG or a Slurm step of several tasks describes, or None.

    Raises:
        InputError: if what describes it cannot be understood.
    """
    try:
        if os.environ.get("TF_CONFIG"):
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        elif (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
            # Without GPUs the resolver has none to share out, and fails; so it is told of one for each task.
            no_gpus = {} if _has_nvidia_gpus() else {"gpus_per_node": tasks, "gpus_per_task": 1, "auto_set_gpu": False}
            resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(**no_gpus)
        else:
            return None
        machines = sum(map(len, resolver.cluster_spec().as_dict().values()))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{'TF_CONFIG' if os.environ.get('TF_CONFIG') else 'The Slurm step'} describes no cluster "
                         f"({_first_line(error)}); see README, Many devices.") from error
    return resolver if machines > 1 else None


def is_chief():
    """Whether this process writes the run folder: the chief, else worker 0, of a cluster; any process without one."""
    resolver = cluster()
    if resolver is None or resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().jobs and resolver.task_id == 0


@functools.cache
def strategy():
    """How the work is shared: all machines of the cluster, all GPUs of this one, or (with one or none) not at all.

    In a cluster it has to be made before any other TensorFlow operation.
    """
    if cluster():
        return _wait_for_cluster()
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


def _wait_for_cluster():
    machines = sum(cluster().cluster_spec().as_dict().values(), [])

    def give_up():
        print(f"Not all machines of {', '.join(machines)} have started within {PATIENCE // 60} minutes; look at the others.",
              file=sys.stderr, flush=True)
        os._exit(2)  # TensorFlow waits without end, and lets no signal through

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    print(f"Waiting for all machines of {', '.join(machines)} ...", flush=True)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=cluster())
    except ValueError as error:
        raise InputError(f"The cluster cannot be joined ({_first_line(error)}); see README, Many devices.") from error
    finally:
        timer.cancel()


def global_batch(wanted, available):
    """The batch of all devices together: `wanted` rounded up to a multiple of their number, at most `available` items.

    Raises:
        InputError: if there are fewer items than devices.
    """
    replicas = strategy().num_replicas_in_sync
    if available < replicas:
        raise InputError(f"{available} training images cannot be shared out among {replicas} devices; use fewer of them.")
    return min(-(-wanted // replicas), available // replicas) * replicas


def _alone():
    return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()


def replica():
    """The number of this replica, an int32 tensor, or 0 where there is one or none is meant."""
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
        # The first replica of all is the chief's. (A bare argument has no device, without which TensorFlow cannot add it up.)
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
    """Ends all machines of a cluster where one of them is refused its input; every one has to pass here.

    Raises:
        InputError: on the others.
    """
    try:
        yield
    except InputError:
        if cluster():
            _over_machines(False)(np.ones(1))
        raise
    if cluster() and _over_machines(False)(np.zeros(1))[0]:
        raise InputError("Another machine of the cluster has stopped; what it printed says why.")


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
        raise InputError(f"Out of memory ({_first_line(error)}); {advice}.") from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError,
            tf.errors.InternalError) as error:
        if not resume or cluster() is None:
            raise
        raise InputError(f"Another machine of the cluster does not answer ({_first_line(error)}); {resume}.") from error


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def cluster_size():
    """" of 2 machines", say, or nothing without a cluster."""
    return f" of {sum(map(len, cluster().cluster_spec().as_dict().values()))} machines each" if cluster() else ""


# What Keras lacks -----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(PACKAGE)
class Adam(keras.optimizers.Adam):
    """Adam that clips the norm of the whole batch's gradient, as one device would; Keras' own clips each replica's part.

    The losses here are means over a replica's part of the batch, so the gradient of the whole is their mean. Keras adds up
    what is returned here.
    """

    def _clip_gradients(self, grads):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        mean = [grad / replicas for grad in sum_over_replicas([tf.convert_to_tensor(grad) for grad in grads])]
        return [grad / replicas for grad in super()._clip_gradients(mean)]

    def update_step(self, gradient, variable, learning_rate):
        """Keras' update in one operation: its own dozen for each variable cost a sixth of a small step."""
        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        first, second = (slots[index].value for slots in (self._momentums, self._velocities))
        powers = [tf.pow(tf.cast(beta, variable.dtype), step) for beta in (self.beta_1, self.beta_2)]
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=first.handle, v=second.handle, beta1_power=powers[0], beta2_power=powers[1],
            lr=tf.cast(learning_rate, variable.dtype), beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon, grad=gradient)


@keras.saving.register_keras_serializable(PACKAGE)
class Muon(Adam):
    """Muon for the kernels of dense layers and convolutions, Adam for the rest.

    Muon moves a kernel along its orthogonalised momentum: equally far in all directions, even in those of little gradient
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). The step is as long as Adam's usually is (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982), so one learning rate serves both. Embeddings and logits stay with Adam, as there.

    Args:
        momentum: of Muon.
        newton_schulz_steps: iterations of the orthogonalisation.
    """

    def __init__(self, learning_rate=0.001, momentum=0.95, newton_schulz_steps=5, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "newton_schulz_steps": self.newton_schulz_steps}

    def _is_kernel(self, variable):
        path = self._trainable_variables[self._get_variable_index(variable)].path
        return len(variable.shape) in (2, 4) and "embedding" not in path and "logits" not in path

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        # Kernels of one shape together: many small products one by one would cost more than the step itself is worth.
        groups, others = {}, []
        for gradient, variable in grads_and_vars:
            if self._is_kernel(variable):
                groups.setdefault(tuple(variable.shape), []).append((gradient, variable))
            else:
                others.append((gradient, variable))
        super()._distributed_tf_update_step(distribution, others, learning_rate)
        for group in groups.values():
            gradients, variables = zip(*group)
            momenta = [self._momentums[self._get_variable_index(variable)].value for variable in variables]
            distribution.extended.update(variables[0], self._update_kernels, group=False,
                                         args=(gradients, variables, momenta, learning_rate))

    def _update_kernels(self, _, gradients, variables, momenta, learning_rate):
        shape = variables[0].shape
        for gradient, momentum in zip(gradients, momenta):
            momentum.assign(self.momentum * momentum + gradient)
        ahead = tf.stack([gradient + self.momentum * momentum for gradient, momentum in zip(gradients, momenta)])
        directions = orthogonalised(tf.reshape(ahead, (len(variables), -1, shape[-1])), self.newton_schulz_steps)
        length = tf.cast(learning_rate, ahead.dtype) * 0.2 * max(directions.shape[1:]) ** 0.5
        for variable, direction in zip(variables, tf.unstack(tf.reshape(length * directions, (len(variables), *shape)))):
            variable.assign_sub(direction)


def orthogonalised(matrices, iterations):
    """Matrices (N, rows, columns) with the singular vectors of those given, and singular values of about 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else tf.linalg.matrix_transpose(matrices)
    x /= tf.norm(x, axis=(1, 2), keepdims=True) + 1e-7
    for _ in range(iterations):
        square = tf.matmul(x, x, transpose_b=True)
        x = 3.4445 * x + tf.matmul(-4.7750 * square + 2.0315 * tf.matmul(square, square), x)
    return x if wide else tf.linalg.matrix_transpose(x)


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


class Distributed:
    """Mends `fit` for Keras 3.15 (hence its pin). Goes before `keras.Model` in the bases.

    Keras builds the optimiser inside the first step, which is then traced twice; it is built before, with or without a strategy.
    Keras builds models by averaging a first batch over the replicas, which fails where their parts differ in size; and it
    averages the logs of several machines over an axis that scalars do not have.
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
            # The logs of one replica show how it goes; those of an epoch come from the metrics, which are synchronised.
            return {name: share.experimental_local_results(value)[0] for name, value in run(next(iterator)).items()}

        return one_step
