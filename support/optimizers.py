"""The optimisers: Adam for vectors and embeddings, Muon for kernels, on one device or several."""

import keras
import tensorflow as tf

from support.devices import PACKAGE, sum_over_replicas

MOMENTUM, NEWTON_SCHULZ_STEPS = 0.95, 5  # of Muon


@keras.saving.register_keras_serializable(PACKAGE)
class Adam(keras.optimizers.Adam):
    """Adam that clips the norm of the whole batch's gradient; Keras' own clips each replica's part."""

    def _clip_gradients(self, grads):
        # The loss is a mean over a replica's part of the batch, so the gradient of the whole is their mean.
        # Keras adds up what is returned here.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        grads = sum_over_replicas([tf.convert_to_tensor(grad) for grad in grads])
        return [grad / replicas for grad in super()._clip_gradients([grad / replicas for grad in grads])]

    def update_step(self, gradient, variable, learning_rate):
        """Keras' update in one operation: its own dozen for each variable cost a sixth of a small step."""
        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        first, second = (slots[index].value.handle for slots in (self._momentums, self._velocities))
        power1, power2 = (tf.pow(tf.cast(beta, variable.dtype), step) for beta in (self.beta_1, self.beta_2))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=first, v=second, beta1_power=power1, beta2_power=power2, beta1=self.beta_1,
            beta2=self.beta_2, epsilon=self.epsilon, lr=tf.cast(learning_rate, variable.dtype), grad=gradient)


@keras.saving.register_keras_serializable(PACKAGE)
class Muon(Adam):
    """Muon for the kernels of dense layers and convolutions, Adam for the rest.

    Muon moves a kernel along its orthogonalised momentum: equally far in all directions, even in those of
    little gradient (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). The step is as long as
    Adam's usually is (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so one learning rate serves both.
    Tables of embeddings and the logits stay with Adam, as there. Keras' own Muon takes no kernels of
    convolutions. `weight_decay` is on the kernels that Muon moves alone: ``rate * weight_decay`` a step."""

    def _is_kernel(self, variable):
        path = self._trainable_variables[self._get_variable_index(variable)].path
        return len(variable.shape) in (2, 4) and "embedding" not in path and "logits" not in path

    def _apply_weight_decay(self, variables):
        """Nothing: `_update_kernels` does it."""

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        # Kernels of one shape together: many small products one by one would cost more than they gain.
        groups, others = {}, []
        for gradient, variable in grads_and_vars:
            group = groups.setdefault(tuple(variable.shape), []) if self._is_kernel(variable) else others
            group.append((gradient, variable))
        super()._distributed_tf_update_step(distribution, others, learning_rate)
        for group in groups.values():
            gradients, variables = zip(*group)
            momenta = [self._momentums[self._get_variable_index(variable)].value for variable in variables]
            distribution.extended.update(variables[0], self._update_kernels, group=False,
                                         args=(gradients, variables, momenta, learning_rate))

    def _update_kernels(self, _, gradients, variables, momenta, learning_rate):
        gradients = tf.stack(gradients)
        averages = MOMENTUM * tf.stack(momenta) + gradients
        for momentum, average in zip(momenta, tf.unstack(averages)):
            momentum.assign(average)
        ahead = gradients + MOMENTUM * averages
        directions = orthogonalise(tf.reshape(ahead, (len(variables), -1, ahead.shape[-1])))
        rate = tf.cast(learning_rate, ahead.dtype)
        length = rate * 0.2 * max(directions.shape[1:]) ** 0.5
        for variable, step in zip(variables, tf.unstack(tf.reshape(length * directions, ahead.shape))):
            if self.weight_decay:
                step += rate * self.weight_decay * variable
            variable.assign_sub(step)


def orthogonalise(matrices):
    """Matrices (N, rows, columns) with the singular vectors of those given, and singular values near 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else tf.linalg.matrix_transpose(matrices)
    x /= tf.norm(x, axis=(1, 2), keepdims=True) + 1e-7
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = tf.matmul(x, x, transpose_b=True)
        x = 3.4445 * x + tf.matmul(-4.7750 * square + 2.0315 * tf.matmul(square, square), x)
    return x if wide else tf.linalg.matrix_transpose(x)
