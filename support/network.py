"""What both networks of modules.py share: the Keras they need, full float32, their steps and their files."""

import contextlib

try:
    import keras
except ModuleNotFoundError as error:  # of the backend that KERAS_BACKEND or keras.json names
    raise ImportError(f"Keras cannot be imported ({error}); set KERAS_BACKEND=tensorflow before.") from error
import tensorflow as tf

from support import devices, runs

USED = keras.backend.backend(), keras.config.image_data_format()
if USED != ("tensorflow", "channels_last"):
    raise ImportError("The networks need Keras with backend tensorflow and image_data_format channels_last, "
                      "not {} and {}; set both in keras.json, or before this import.".format(*USED))


class Network(devices.KerasFit, keras.Model):
    """A model that is saved by its `settings`, a dict of its constructor's arguments."""

    def get_config(self):
        return {**super().get_config(), **self.settings}

    @contextlib.contextmanager
    def full_float32(self):
        """Computes in float32 inside it: not in the bfloat16 of mixed precision, and without TensorFloat-32.

        A rounded vector may have another nearest code, a rounded logit another code to sample; but the same
        image or seed has to give the same codes everywhere. So mixed precision is for training steps alone.

        What a `tf.function` traces inside it is free of bfloat16 for good. But TensorFloat-32 is a switch of
        the process, not of a graph: it has to be off whenever the traced function runs.
        """
        policies = [(layer, layer.dtype_policy) for layer in self._flatten_layers()]
        try:
            for layer, _ in policies:
                layer.dtype_policy = "float32"
            with devices.full_float32():
                yield
        finally:
            for layer, policy in policies:
                layer.dtype_policy = policy

    def minimise(self, losses):
        """One optimiser step on the first of the scalars that `losses()` returns; returns them all."""
        with tf.GradientTape() as tape:
            values = losses()
            scaled = self.optimizer.scale_loss(values[0])
        self.optimizer.apply(tape.gradient(scaled, self.trainable_variables), self.trainable_variables)
        return values

    def track(self, **states):
        """Updates trackers, given by name as (values, weights), and returns their values."""
        for tracker in self.trackers:
            if tracker.name in states:
                tracker.update_state(*states[tracker.name])
        return self._get_metrics_result_or_logs(states)

    def _get_metrics_result_or_logs(self, logs):
        # An epoch's logs. Keras' own takes the last step's, of one machine, unless steps log every tracker.
        return {name: value for name, value in self.logs().items() if name in logs}


def random_rows(vectors, count, seed):
    """Random vectors of the whole batch, (count, D), the same on all replicas; each has (N, D)."""
    size, replicas = tf.shape(vectors)[0], tf.distribute.get_strategy().num_replicas_in_sync
    indices = tf.random.stateless_uniform((count,), seed, 0, size * replicas, tf.int32)
    if replicas == 1 or tf.distribute.in_cross_replica_context():
        return tf.gather(vectors, indices)
    is_here = indices // size == devices.replica()
    rows = tf.where(is_here[:, tf.newaxis], tf.gather(vectors, indices % size), 0.0)
    return devices.sum_over_replicas(rows)


def load_model(path, compile=True):
    """Loads a VQ-VAE or a PixelCNN, with its optimiser if `compile`; runs no code that the file may hold.

    Raises:
        ValueError: if the .keras file is damaged, not of this repository, or would run code.
    """
    def load():
        return keras.models.load_model(path, compile=compile, safe_mode=True)

    model = runs.read_model_file(path, load)
    if not isinstance(model, Network):
        raise ValueError(f"{path} cannot be loaded (it holds a {type(model).__name__})")
    return model


def load_weights(model, path):
    """Loads the weights of a .keras file, and the optimiser if `model` is compiled; see `load_model`."""
    runs.read_model_file(path, lambda: model.load_weights(path))


def check_match(vqvae, prior):
    """Raises ValueError if a prior was trained on the codes of another codebook than the VQ-VAE's."""
    if prior.settings["codebook_digest"] != vqvae.quantizer.digest():
        raise ValueError("it was trained on the codes of another codebook")
