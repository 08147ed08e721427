"""Steps that are not row by row: what couples rows, changes gradients, draws noise, or counts."""

import keras
import tensorflow as tf
from keras import layers, ops

from equivalence.columns import ALWAYS, ANY_MODEL
from equivalence.data import LABELS, TARGETS, fit
from equivalence.features import Feature, parity

POSITIVE = (TARGETS > 0).astype("float64")


def trained(loss, y=TARGETS, kind=keras.Sequential, **compiled):
    """A small model and its `fit`; a class of loss is called here, where floats have 64 bits."""

    def script():
        model = kind([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(2, "sigmoid")])
        own = loss() if isinstance(loss, type) else loss
        model.compile(keras.optimizers.SGD(0.5), own, **compiled)
        return model, lambda: fit(model, y=y)

    return script


# --- losses, layers and metrics that couple rows --------------------------------------------------


def circle():
    """Fails if pairs of rows are those of a rank."""
    unit = layers.UnitNormalization()
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), unit])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.Circle())
    return model, lambda: fit(model, y=LABELS)


def masked_mean(y, p):
    """A ratio of sums over the batch; most batches have no valid row on some rank."""
    valid = ops.cast(y[:, :1] > 0.8, p.dtype)
    return ops.sum(valid * ops.square(y - p)) / (ops.sum(valid) + 1e-3)


def loss_sum(y, p):
    """A sum over the rows, of which nobody knows that it is one."""
    return ops.sum(ops.square(y - p)) / 6.0


class InBatchNegatives(keras.Sequential):
    """CLIP's loss: each row is to be told from all others of the batch."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        scores = ops.matmul(y_pred, ops.transpose(y))
        labels = ops.arange(ops.shape(scores)[0])
        losses = [
            keras.losses.sparse_categorical_crossentropy(labels, s, from_logits=True)
            for s in (scores, ops.transpose(scores))
        ]
        return ops.mean(losses[0] + losses[1])


class AddedSums(layers.Layer):
    """A sum over rows, and a product of means, as the load balance of experts."""

    def call(self, x):
        self.add_loss(0.01 * ops.sum(ops.square(x)))
        self.add_loss(ops.sum(ops.mean(x, 0) * ops.mean(ops.square(x), 0)))
        return x


class BatchDeviation(layers.Layer):
    """The minibatch standard deviation of a GAN's discriminator, as a feature of each row."""

    def call(self, x):
        deviation = ops.mean(ops.std(x, 0))
        return ops.concatenate([x, ops.broadcast_to(deviation, (ops.shape(x)[0], 1))], -1)


class Mixup(keras.Sequential):
    """Rows are mixed with those of the batch turned round."""

    def train_step(self, data):
        x, y = data
        return super().train_step((0.7 * x + 0.3 * x[::-1], 0.7 * y + 0.3 * y[::-1]))


def layers_of_rows():
    """Fails if a layer sees the rows of a rank."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "tanh"),
            AddedSums(),
            BatchDeviation(),
            layers.BatchNormalization(momentum=0.5),
            layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, lambda: fit(model)


# --- gradients between tape and update ------------------------------------------------------------


class ClippedByHand(keras.Sequential):
    """Clips by the norm of all gradients, and each by its own, before the update."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        gradients, norm = tf.clip_by_global_norm(gradients, 0.05)
        gradients = [tf.clip_by_norm(g, 0.03) for g in gradients]
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss, "norm": norm}


class SharpnessAware(keras.Sequential):
    """SAM: the gradient at the weights moved along the gradient."""

    def train_step(self, data):
        x, y = data
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, variables)
        norm = tf.linalg.global_norm(gradients)
        moves = [0.05 * g / (norm + 1e-12) for g in gradients]
        for variable, move in zip(variables, moves, strict=True):
            variable.assign_add(move)
        with tf.GradientTape() as tape:
            there = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(there, variables)
        for variable, move in zip(variables, moves, strict=True):
            variable.assign_sub(move)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}


# --- variables that a step writes -----------------------------------------------------------------


class Kept(layers.Layer):
    """A running mean, a number of rows seen, and a queue of the last rows, as MoCo's."""

    def build(self, shape):
        zeros = {"initializer": "zeros", "trainable": False}
        self.mean = self.add_weight(shape=(shape[-1],), **zeros)
        self.seen = self.add_weight(shape=(), dtype="int64", **zeros)
        self.queue = self.add_weight(shape=(8, shape[-1]), **zeros)

    def call(self, x, training=None):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, 0))
            self.seen.assign_add(ops.cast(ops.shape(x)[0], "int64"))
            self.queue.assign(ops.concatenate([ops.stop_gradient(x), self.queue], 0)[:8])
        return x - self.mean + 0.1 * ops.mean(self.queue, 0)


def kept():
    """Fails if a layer writes what it saw of a rank's rows."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), Kept(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, lambda: fit(model)


class AccumulatedByHand(keras.Sequential):
    """Gradients are added up in variables, and applied every second step."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self.sums = [
            self.add_weight(shape=v.shape, initializer="zeros", trainable=False, name=f"sum_{i}")
            for i, v in enumerate(self.trainable_variables)
        ]
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        for total, g in zip(self.sums, tape.gradient(loss, self.trainable_variables), strict=True):
            total.assign_add(g)
        self.count.assign_add(1)
        due = ops.cast(self.count % 2 == 0, "float64")
        gradients = [due * total for total in self.sums]
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        for total in self.sums:
            total.assign(total * (1 - due))
        return {"loss": loss}


# --- noise ----------------------------------------------------------------------------------------


class Noise(layers.Layer):
    """Draws by TensorFlow and by Keras, with a seed and without one."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(5)

    def call(self, x):
        shape = ops.shape(x)
        x = x + 0.1 * tf.random.normal(shape, dtype=x.dtype)
        x = x + 0.1 * tf.random.stateless_uniform(shape, (1, 2), dtype=x.dtype)
        x = x + 0.1 * keras.random.normal(shape, dtype=x.dtype)
        x = x + 0.1 * keras.random.truncated_normal(shape, dtype=x.dtype, seed=self.seeds)
        return x * ops.cast(keras.random.randint(shape, 0, 3, seed=self.seeds), x.dtype)


def noise():
    """Fails if a rank draws other numbers for its rows than one device does."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), Noise(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, lambda: fit(model)


def dropout():
    """Fails if a mask, or noise, of Keras's layers is not that of one device."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.GaussianNoise(0.1),
            layers.Dense(12, "tanh"),
            layers.Dropout(0.4),
            layers.Reshape((4, 3)),
            layers.SpatialDropout1D(0.3),
            layers.GaussianDropout(0.2),
            layers.AlphaDropout(0.2),
            layers.Flatten(),
            layers.Dropout(0.2, noise_shape=(None, 1)),
            layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, lambda: fit(model)


# --- metrics, and what a step returns -------------------------------------------------------------


class Largest(keras.metrics.Metric):
    """A running maximum, a product, and the last value."""

    def __init__(self):
        super().__init__()
        self.most = self.add_weight(shape=(), initializer="zeros")
        self.product = self.add_weight(shape=(), initializer="ones")

    def update_state(self, y, p, sample_weight=None):
        error = ops.max(ops.abs(y - p))
        self.most.assign(ops.maximum(self.most, error))
        self.product.assign(self.product * (0.5 + ops.mean(p)))

    def reset_state(self):
        self.most.assign(0.0)
        self.product.assign(1.0)

    def result(self):
        return {"most": self.most + 0, "product": self.product + 0}


def largest():
    """Fails if the states of a metric are added up that are no sums."""
    return trained("mse", metrics=[Largest()])()


class Logs(keras.Sequential):
    """Returns means, a largest value and a count by hand."""

    def train_step(self, data):
        x, y = data
        logs = super().train_step(data)
        p = self(x)
        return {
            "loss": logs["loss"],
            "mean": ops.mean(ops.abs(y - p)),
            "largest": ops.max(p),
            "rows": ops.cast(ops.shape(x)[0], "float64"),
        }


def feature(title, script, note=""):
    """A row of the table, for meshes that split rows."""
    usual = (ALWAYS,)
    return Feature(title, parity(script), ANY_MODEL, in_stages=False, note=note, every_change=usual)


FEATURES = [
    feature("`Dice`", trained(keras.losses.Dice, POSITIVE)),
    feature("`Tversky`", trained(keras.losses.Tversky, POSITIVE)),
    feature("`Circle`", circle),
    feature("a masked mean over the batch as loss", trained(masked_mean)),
    feature("a sum over the batch as loss", trained(loss_sum)),
    feature("in-batch negatives in `compute_loss`", trained(None, kind=InBatchNegatives)),
    feature("`add_loss` of sums, batch deviation, `BatchNormalization`", layers_of_rows),
    feature("mixup in `train_step`", trained("mse", kind=Mixup)),
    feature("gradients clipped by hand", trained("mse", kind=ClippedByHand)),
    feature("sharpness-aware minimisation", trained("mse", kind=SharpnessAware)),
    feature("gradients accumulated by hand", trained("mse", kind=AccumulatedByHand)),
    feature("running mean, counter and queue of a layer", kept),
    feature("`tf.random`, `keras.random` with and without a seed", noise),
    feature("masks and noise of Keras's layers", dropout),
    feature("a metric that is no sum", largest),
    feature("logs that a step returns by hand", trained("mse", kind=Logs)),
]
