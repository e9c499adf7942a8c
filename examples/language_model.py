"""A small language model of the sources of Python's standard library.

What examples/many_devices.py and the notebooks 04_large_vocabulary and 06_many_devices share: the
text, the model as pure functions, its batches and its optimiser.
"""

import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

import jaxsoft

LENGTH, WIDTH, HEADS = 64, 64, 4
UNKNOWN = "<unknown>"

Params = dict[str, jax.Array]

_LEFT_OUT = {"encodings", "idle_test", "site-packages", "dist-packages", "test", "tests"}
_WORD = re.compile(r"\n *|[^\W\d]\w*|\d+|[^\w\s]")  # a line break and its indentation are a word


def library(every: int = 1) -> list[list[str]]:
    """The words of the files of the standard library, or of one in `every` of them."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    files = sorted(path for path in files if _LEFT_OUT.isdisjoint(path.parts))[::every]
    texts = ((root / path).read_text(encoding="utf-8", errors="replace") for path in files)
    return [_WORD.findall(text) for text in texts]


def frequent(texts: Iterable[Sequence[str]]) -> list[str]:
    """The vocabulary: all words that occur twice or more, the most frequent first."""
    counts = Counter(word for text in texts for word in text)
    return [UNKNOWN, *(word for word, count in counts.most_common() if count >= 2)]


def encoded(texts: Iterable[Sequence[str]], vocabulary: Sequence[str]) -> np.ndarray:
    """The places of all words in the vocabulary, one text after the other."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    return np.array([ids.get(word, 0) for text in texts for word in text], np.int32)


def batches(rng: np.random.Generator, words: np.ndarray, count: int, size: int) -> np.ndarray:
    """Places drawn at random: [count, size, LENGTH + 1], each word followed by its label."""
    starts = rng.integers(len(words) - LENGTH, size=(count, size, 1))
    return words[starts + np.arange(LENGTH + 1)]


def init(key: jax.Array, frequency: ArrayLike, width: int = WIDTH) -> Params:
    """Parameters at random; the biases are what counting alone can know.

    A word that never occurs, of frequency 0, has the bias -inf and keeps it.
    """
    keys = jax.random.split(key, 6)
    bias = jnp.log(jnp.asarray(frequency, jnp.float32))

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32) / jnp.sqrt(shape[-2])

    return {
        "words": 0.02 * jax.random.normal(keys[0], (len(bias), width), jnp.float32),
        "before": normal(keys[1], 3, width, width),
        "attention": normal(keys[2], 3, width, width),
        "mix": normal(keys[3], width, width),
        "up": normal(keys[4], width, 4 * width),
        "down": normal(keys[5], 4 * width, width),
        "bias": bias,
    }


def normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def features(params: Params, vectors: jax.Array) -> jax.Array:
    """Of each word and those before it, given its vector: [batch, LENGTH, width] throughout."""
    word = normalised(vectors)
    padded = jnp.pad(word, ((0, 0), (3, 0), (0, 0)))
    x = word + sum(padded[:, i : i + LENGTH] @ params["before"][i] for i in range(3))

    y = normalised(x)
    shape = (*x.shape[:-1], HEADS, x.shape[-1] // HEADS)
    query, key, value = ((y @ matrix).reshape(shape) for matrix in params["attention"])
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(shape[-1])
    attention = jaxsoft.softmax(scores, where=jnp.tri(LENGTH, dtype=bool))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
    x += mixed.reshape(x.shape) @ params["mix"]
    x += jax.nn.relu(normalised(x) @ params["up"]) @ params["down"]
    return normalised(x)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps, rate / 10)
    # The usual eps, 1e-8, is small: of tiny gradients Adam makes large steps, rounding included.
    return optax.adam(schedule, b2=0.95, eps=1e-6)
