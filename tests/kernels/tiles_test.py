"""Tiles cover an array once and keep to their budget."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tiles
from tests.kernels import inputs


@pytest.mark.parametrize("length", [1, 3, 4, 37, 4096, 131072])
@pytest.mark.parametrize("bytes_per_item", [1, 1000, 1 << 20, 1 << 40])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_size_is_a_power_of_two_within_all_bounds(
  length, bytes_per_item, backend
):
  with mock.patch.object(jax, "default_backend", return_value=backend):
    size = tiles.tile_size(length, bytes_per_item, largest=256)
  budget = {"cpu": 4 << 20, "gpu": 128 << 20}[backend]
  largest = {"cpu": 256, "gpu": 4096}[backend]
  bound = min(budget // bytes_per_item, length // 4, largest)
  assert size.bit_count() == 1
  assert size <= max(bound, 1)
  assert 2 * size > bound  # and no smaller than need be


@pytest.mark.parametrize("tile", [1, 5, 37, 64])
def test_join_undoes_split(tile):
  x = inputs.normal(0, 37, 3)
  parts = tiles.split(x, tile, fill=-1)
  chex.assert_shape(parts, (-(-37 // tile), tile, 3))
  np.testing.assert_array_equal(tiles.join(parts, 37), x)
  np.testing.assert_array_equal(parts.reshape(-1, 3)[37:], -1)


@pytest.mark.parametrize(
  "backend, B, tile_bytes, together",
  [
    ("cpu", 6, 1, 1),
    ("gpu", 6, 1 << 20, 2),
    ("gpu", 8, 40 << 20, 2),
    ("gpu", 8, 1 << 20, 8),
    ("gpu", 8, 1 << 30, 1),
  ],
)
def test_maps_over_rows(backend, B, tile_bytes, together):
  x, y = inputs.normal(0, B, 5), inputs.normal(1, B, 5)

  def row(x, y):
    # Rows that run at once walk over the keys that any of them sees.
    number = jnp.round(100 * jnp.abs(y[:1])).astype(jnp.int32)
    first, last = tiles.seen_keys(number, number + 1, 1)
    return {"cross": jnp.outer(x, y), "seen": jnp.stack([first, last])}

  with mock.patch.object(jax, "default_backend", return_value=backend):
    actual = tiles.map_rows(row, x, y, tile_bytes=tile_bytes)
  expected = np.einsum("BT,BS->BTS", x, y)
  np.testing.assert_allclose(actual["cross"], expected, rtol=1e-6)
  numbers = np.round(100 * np.abs(y[:, 0])).reshape(-1, together)
  seen = np.stack([numbers.min(1), numbers.max(1) + 1], -1)
  np.testing.assert_array_equal(actual["seen"], np.repeat(seen, together, 0))
