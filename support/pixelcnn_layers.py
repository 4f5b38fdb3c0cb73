"""The layers of `modules.PixelCNN`: gated blocks, and the attention between them. [4], [5]: see there."""

from keras import layers
import tensorflow as tf

ATTENTION_HEADS = 4


def _gate(x):
    """Halves the channels: ``tanh(a) sigmoid(b)``, [4] equation 2."""
    a, b = tf.split(x, 2, axis=-1)
    return tf.tanh(a) * tf.sigmoid(b)


class GatedBlock(layers.Layer):
    """One layer of the gated PixelCNN: a vertical and a horizontal stack ([4] figure 2).

    At (row, column) the vertical features depend on all codes of the rows above, the horizontal ones on these
    and on the codes to the left: together on everything before, so there is no blind spot. The caller pads
    the windows: the whole grid in training, the newest row or code in sampling. So both run the same code.

    With a kernel_size k, odd, and a dilation d, the vertical stack sees k // 2 rows up per layer, the
    horizontal one every d-th of the d (k // 2) codes to the left. Dropout is on the horizontal branch."""

    def __init__(self, num_filters, kernel_size, dilation, dropout):
        super().__init__()
        self.rows_up, self.dilation = kernel_size // 2, dilation
        self.codes_left = dilation * self.rows_up
        self.vertical_conv = layers.Conv2D(2 * num_filters, (self.rows_up + 1, kernel_size))
        # A dilated convolution as one matrix product over its taps: on a CPU several times as fast.
        self.horizontal_taps = layers.Dense(2 * num_filters)
        self.vertical_to_horizontal = layers.Dense(2 * num_filters)
        self.condition = layers.Dense(4 * num_filters)
        self.vertical_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.horizontal_out = layers.Dense(num_filters, kernel_initializer="zeros")
        self.dropout = layers.Dropout(dropout)

    def vertical(self, rows, window, condition):
        """One vertical step on rows (B, R, W, F): their new features, and `from_vertical` (B, R, W, 2F).

        The window, (B, R + k // 2, W + 2 (k // 2), F), has those before too; condition: (B, 1, 1, F)."""
        gated = _gate(self.vertical_conv(window) + tf.split(self.condition(condition), 2, axis=-1)[0])
        return rows + self.vertical_out(gated), self.vertical_to_horizontal(gated)

    def horizontal(self, codes, window, from_vertical, condition, training=False):
        """One horizontal step on codes (B, R, W, F), with those before in (B, R, d (k // 2) + W, F)."""
        shape = tf.shape(codes)  # not window[...]: the gradient of a strided slice is slow on a CPU
        taps = [tf.slice(window, [0, 0, tap * self.dilation, 0], shape) for tap in range(self.rows_up)]
        features = self.horizontal_taps(tf.concat([*taps, codes], axis=-1)) + from_vertical
        gated = _gate(features + tf.split(self.condition(condition), 2, axis=-1)[1])
        return codes + self.horizontal_out(self.dropout(gated, training=training))


class AxialAttention(layers.Layer):
    """Attention of the vertical stack along its own row, then up its column: so to all rows above [5].

    Along the row nothing need be masked: its vertical features depend on the rows above alone. It spans the
    grid where convolutions do not: so the shape of the whole head is there while its texture is sampled."""

    def __init__(self, num_filters):
        super().__init__()
        self.num_filters = num_filters
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.queries = [layers.Dense(num_filters) for _ in range(2)]
        self.keys_and_values = [layers.Dense(2 * num_filters) for _ in range(2)]
        self.outputs = [layers.Dense(num_filters) for _ in range(2)]

    def call(self, rows, before, attention_mask):
        """Rows (B, R, W, F), keys and values of S rows before (B, S, W, 2F) -> (features, keys and values).

        The mask, bool (R, S + R), says which rows each row attends to, those before first."""
        features = self.norms[0](rows)
        attended = self._attend(self.queries[0](features), self.keys_and_values[0](features))
        rows = rows + self.outputs[0](attended)
        features = self.norms[1](rows)
        keys_and_values = self.keys_and_values[1](features)
        columns = tf.transpose(self.queries[1](features), (0, 2, 1, 3))
        above = tf.transpose(tf.concat([before, keys_and_values], axis=1), (0, 2, 1, 3))
        attended = tf.transpose(self._attend(columns, above, attention_mask), (0, 2, 1, 3))
        return rows + self.outputs[1](attended), keys_and_values

    def _attend(self, queries, keys_and_values, attention_mask=None):
        """Softmax attention: (B, N, Q, F), (B, N, K, 2F) and bool (Q, K) -> (B, N, Q, F)."""
        # Not Keras' MultiHeadAttention, whose einsums take twice as long at this size.
        size = self.num_filters // ATTENTION_HEADS
        def split_heads(x):  # (B, N, L, heads * d) -> (B, N, heads, L, d)
            shape = tf.shape(x)
            return tf.transpose(tf.reshape(x, (shape[0], shape[1], shape[2], -1, size)), (0, 1, 3, 2, 4))
        keys, values = tf.split(split_heads(keys_and_values), 2, axis=2)
        scores = tf.matmul(split_heads(queries * size ** -0.5), keys, transpose_b=True)
        if attention_mask is not None:
            scores = tf.where(attention_mask, scores, scores.dtype.min)
        attended = tf.transpose(tf.matmul(tf.nn.softmax(scores), values), (0, 1, 3, 2, 4))
        return tf.reshape(attended, tf.concat([tf.shape(attended)[:3], [self.num_filters]], axis=0))
