"""Inputs of the ops: ragged sizes, and every range and index there may be."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np
import pytest

# No two are equal, no tile divides T or S, and S exceeds K.
B, T, S, K = 2, 37, 53, 11
N, C, R, H, U = 4, 8, 5, 9, 7
M, I = 6, 10
SCALE = 0.3

RANGES = ("causal", "packed", "any")
CHOICES = ("plain", "packed", "invalid", "twice")


def slow(cases):
  """Cases that only the slow tests go through."""
  return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


_INT32 = np.iinfo(np.int32)


def normal(seed: int, *shape: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Standard normal numbers."""
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def grid(seed: int, *shape: int, largest: int = 2) -> jax.Array:
  """Small integers: sums of their products are exact, and ties abound."""
  rng = np.random.default_rng(seed)
  x = rng.integers(-largest, largest, size=shape, endpoint=True)
  return jnp.asarray(x, jnp.float32)


def ranges(kind: str, T: int = T, S: int = S) -> tuple[jax.Array, jax.Array]:
  """`start` and `end` [B, T].

  Args:
    kind: "causal": all keys up to the query's own, the last query sees S.
      "packed": the same inside documents, which differ from row to row; the
      last four queries are padding. "any": random, some beyond [0, S], many
      empty.
    T: Queries.
    S: Keys.
  """
  rng = np.random.default_rng(0)
  own_BT = np.broadcast_to(np.arange(T) + S - T, (B, T))
  if kind == "causal":
    start_BT, end_BT = np.zeros((B, T)), np.maximum(own_BT + 1, 0)
  elif kind == "packed":
    first = np.stack(
      [np.sort(rng.choice(S, 4, replace=False)) for _ in range(B)]
    )
    begun_BT4 = np.where(first[:, None] <= own_BT[..., None], first[:, None], 0)
    start_BT, end_BT = begun_BT4.max(-1), own_BT + 1
    start_BT[:, -4:] = end_BT[:, -4:] = 0
  else:
    start_BT = rng.integers(-5, S + 5, size=(B, T))
    end_BT = rng.integers(-5, S + 5, size=(B, T))
    start_BT[0, :4] = _INT32.min, _INT32.max, 0, S - 1
    end_BT[0, :4] = _INT32.max, _INT32.min, _INT32.max, S
    start_BT[1, :4] = _INT32.min, 7, 7, 8
    end_BT[1, :4] = 1, 7, 8, 7
  return jnp.asarray(start_BT, jnp.int32), jnp.asarray(end_BT, jnp.int32)


def choices(kind: str, T: int = T, S: int = S, K: int = K) -> jax.Array:
  """Chosen keys [B, T, K], K <= S.

  Args:
    kind: "plain": any K keys, in any order. "packed": ascending keys of the
      packed ranges, then -1. "invalid": what is no key stands anywhere, and
      some rows have no key, only a first, or only a last one. "twice": keys
      occur several times.
    T: Queries.
    S: Keys.
    K: Chosen keys of each query.
  """
  rng = np.random.default_rng(1)
  chosen_BTK = rng.permuted(np.broadcast_to(np.arange(S), (B, T, S)), axis=-1)
  chosen_BTK = chosen_BTK[..., :K]
  if kind == "packed":
    start_BT, end_BT = (
      np.asarray(x)[..., None] for x in ranges("packed", T, S)
    )
    visible_BTK = (start_BT <= chosen_BTK) & (chosen_BTK < end_BT)
    chosen_BTK = np.sort(np.where(visible_BTK, chosen_BTK, S))
    chosen_BTK = np.where(chosen_BTK < S, chosen_BTK, -1)
  elif kind == "invalid":
    no_key = [-1, -2, -S, S, S + 1, _INT32.min, _INT32.max]
    no_key_BTK = rng.choice(no_key, size=chosen_BTK.shape)
    invalid_BTK = rng.random(chosen_BTK.shape) < 0.4
    invalid_BTK[:, 3::9] = True
    invalid_BTK[:, 4::9], invalid_BTK[:, 4::9, 0] = True, False
    invalid_BTK[:, 5::9], invalid_BTK[:, 5::9, -1] = True, False
    chosen_BTK = np.where(invalid_BTK, no_key_BTK, chosen_BTK)
  elif kind == "twice":
    chosen_BTK = rng.integers(0, 6, size=chosen_BTK.shape)
  return jnp.asarray(chosen_BTK, jnp.int32)
