"""Tiles cover an array once and keep to their budget."""

from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tiles

from . import inputs


class TilesTest(chex.TestCase):
  @parameterized.product(
    length=[1, 3, 4, 37, 4096, 131072],
    bytes_per_item=[1, 1000, 1 << 20, 1 << 40],
    backend=["cpu", "gpu"],
  )
  def test_size_is_a_power_of_two_within_all_bounds(
    self, length, bytes_per_item, backend
  ):
    with mock.patch.object(jax, "default_backend", return_value=backend):
      size = tiles.tile_size(length, bytes_per_item, largest=256)
    budget = {"cpu": 4 << 20, "gpu": 128 << 20}[backend]
    bound = min(budget // bytes_per_item, length // 4, 256)
    self.assertEqual(size.bit_count(), 1)
    self.assertLessEqual(size, max(bound, 1))
    self.assertGreater(2 * size, bound)  # and no smaller than need be

  @parameterized.parameters(1, 5, 37, 64)
  def test_join_undoes_split(self, tile):
    x = inputs.normal(0, 37, 3)
    parts = tiles.split(x, tile, fill=-1)
    self.assertEqual(parts.shape, (-(-37 // tile), tile, 3))
    np.testing.assert_array_equal(tiles.join(parts, 37), x)
    np.testing.assert_array_equal(parts.reshape(-1, 3)[37:], -1)

  def test_maps_over_rows(self):
    x, y = inputs.normal(0, 3, 5), inputs.normal(1, 3, 5)
    actual = tiles.map_rows(lambda x, y: {"cross": jnp.outer(x, y)}, x, y)
    expected = np.einsum("BT,BS->BTS", x, y)
    np.testing.assert_allclose(actual["cross"], expected, rtol=1e-6)
