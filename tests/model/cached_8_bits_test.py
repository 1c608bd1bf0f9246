"""What a cache in 8 bits stores of a token: the same bytes, however it came."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from tests.kernels import eight_bits
from tests.model import cached_test
from tests.model import models

# Whose rounding hides in which order sums are added.
CONFIG = dataclasses.replace(models.WIDE, dtype="bfloat16")
DTYPES = tuple(models.EIGHT_BITS.values())
PAGE, PAGES, LENGTHS = cached_test.PAGE, cached_test.PAGES, cached_test.LENGTHS


@functools.cache
def run(prefill=(12, 9), seed=0, dtypes=DTYPES) -> cached_test.Run:
  return cached_test.run("sparse", prefill, seed, CONFIG, dtypes)


def stored(run) -> list[np.ndarray]:
  """Each array of the pool, [L S ...], of one sequence after the other."""
  found = []
  for x in jax.tree.leaves(run.pool):
    x = np.asarray(x).reshape(run.pool.layers, PAGES, PAGE, *x.shape[2:])
    places = [np.arange(length) for length in LENGTHS]
    pages = [row[s // PAGE] for row, s in zip(run.table, places)]
    found.append(x[:, np.concatenate(pages), np.concatenate(places) % PAGE])
  return found


def bytes_of(x: np.ndarray) -> np.ndarray:
  return np.frombuffer(x.tobytes(), np.uint8)


@pytest.mark.parametrize(
  "prefill, seed", [((1, 5), 0), ((5, 0), 1), ((12, 9), 2)]
)
def test_rows_are_the_same_bytes_however_they_came(prefill, seed):
  """From any chunks of prompts, and one by one; MTP's, too."""
  first, other = run(), run(prefill, seed)
  assert (first.table != other.table).any() == (seed != 0)
  for x, y in zip(stored(first), stored(other), strict=True):
    np.testing.assert_array_equal(bytes_of(x), bytes_of(y))
  for name, x in first.decoded.items():
    np.testing.assert_array_equal(x, other.decoded[name], name)


def test_rows_of_the_first_layer_are_those_that_numpy_rounds():
  """Which no attention comes before: what is rounded is the same."""
  values, scale, rope, k, k_scale = (x[0] for x in stored(run()))
  kv, k_index = (x[0] for x in stored(run(dtypes=(None, None))))
  expected = eight_bits.latents(kv.astype(np.float32), CONFIG.kv_rank)
  expected += eight_bits.index(k_index)
  for x, y in zip((values, scale, rope, k, k_scale), expected, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(bytes_of(x), bytes_of(y))


def test_only_what_was_written_is_read():
  """The rest of the pool is what is no number."""
  for x in run().decoded.values():
    assert np.isfinite(np.asarray(x, np.float32)).all()
  for x in jax.tree.leaves(run().pool):
    spare = np.isnan(np.asarray(x, np.float32)).reshape(4, PAGES, PAGE, -1)
    written = PAGES * PAGE - spare.all(-1).sum((1, 2))
    np.testing.assert_array_equal(written, sum(LENGTHS))


def test_a_token_has_788_bytes_a_layer_at_deepseeks_widths():
  cfg = config_lib.v32_671b()
  page = 4
  for dtypes, size in (
    (DTYPES, 788),
    ((DTYPES[0], None), 1284),
    ((None, DTYPES[1]), 912),
    ((None, None), 1408),
  ):
    make = functools.partial(_leaves, cfg, page, dtypes)
    leaves = jax.eval_shape(make)
    held = sum(x.size * x.dtype.itemsize for x in leaves)
    assert held == size * 62 * page  # MTP's layer, too


def _leaves(cfg, page, dtypes):
  return jax.tree.leaves(cache_lib.make_pool(cfg, 1, page, *dtypes))
