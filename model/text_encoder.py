"""Text encoders behind one interface: tokens and mask in, `context` and mask out.

`VocabularyEncoder` learns its own embeddings on the ids of a dictionary and is trained with the U-Net.
Every encoder is a `keras.Model` with `context_shape`, so the U-Net and the trainer need not know which it is.
"""

import keras
from keras import ops

from model.common import Attention, LayerNorm


class EncoderBlock(keras.layers.Layer):
    """A pre-norm transformer block (Xiong et al. 2020): x (B, T, D), mask (B, T) -> (B, T, D)."""

    def __init__(self, width, heads, expansion=4, **kwargs):
        super().__init__(**kwargs)
        self.width, self.heads, self.expansion = width, heads, expansion
        policy = {"dtype": self.dtype_policy}
        self.norm1 = LayerNorm(1e-5, name="norm1", **policy)
        self.attn = Attention(width, heads, qkv_bias=True, name="attn", **policy)
        self.norm2 = LayerNorm(1e-5, name="norm2", **policy)
        self.fc1 = keras.layers.Dense(expansion * width, activation="gelu", name="fc1", **policy)
        self.fc2 = keras.layers.Dense(width, name="fc2", **policy)

    def build(self, x_shape, mask_shape=None):
        for layer in (self.norm1, self.attn, self.norm2, self.fc1):
            layer.build(x_shape)
        self.fc2.build((*x_shape[:-1], self.expansion * self.width))

    def call(self, x, mask=None):
        x = x + self.attn(self.norm1(x), None, mask)
        return x + self.fc2(self.fc1(self.norm2(x)))

    def compute_output_shape(self, x_shape, mask_shape=None):
        return x_shape

    def get_config(self):
        own = {"width": self.width, "heads": self.heads, "expansion": self.expansion}
        return {**super().get_config(), **own}


class VocabularyEncoder(keras.Model):
    """Learned embeddings of a dictionary's ids and a small transformer over them.

    Args:
        vocabulary_size: number of ids.
        length: tokens T a caption.
        width: width D of the context.
        layers: transformer blocks.
        heads: attention heads.

    Call: [tokens (B, T) int32, mask (B, T) bool, True on words] -> context (B, T, D). The first place is
    always attended to, so a caption of padding alone (the unconditional one) has a context too.
    """

    def __init__(self, vocabulary_size, length=20, width=128, layers=2, heads=4, name="text_encoder"):
        tokens = keras.Input((length,), dtype="int32", name="tokens")
        mask = keras.Input((length,), dtype="bool", name="mask")
        x = keras.layers.Embedding(
            vocabulary_size, width, embeddings_initializer=keras.initializers.RandomNormal(0.5), name="words"
        )(tokens)
        x = PositionEmbedding(name="positions")(x)
        for layer in range(layers):
            x = EncoderBlock(width, heads, name=f"layers.{layer}")(x, mask)
        context = LayerNorm(1e-5, name="final_norm")(x)
        super().__init__([tokens, mask], context, name=name)
        self.context_shape = (length, width)
        self._arguments = {
            "vocabulary_size": vocabulary_size,
            "length": length,
            "width": width,
            "layers": layers,
            "heads": heads,
            "name": name,
        }

    def get_config(self):
        return dict(self._arguments)


class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to each place: (B, T, D) -> (B, T, D)."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=input_shape[1:], initializer="random_normal", name="embeddings")

    def call(self, x):
        return x + ops.cast(self.table, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
