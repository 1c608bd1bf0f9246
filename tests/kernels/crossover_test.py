"""Where dense attention with a mask is chosen."""

import pytest

from pallas_kernels import crossover
from pallas_kernels import devices
from pallas_kernels import dispatch


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
  facts = dict(name="v9", kinds=("TPU v9",), flops=1e15)
  known = {
    "TPU v9": devices.Device(**facts, dense_pairs=4.0),
    "TPU v9 lite": devices.Device(**facts),
  }
  monkeypatch.setattr(devices, "of", known.get)
  monkeypatch.setattr(dispatch, "device_kind", lambda: "TPU v9")


@pytest.mark.parametrize(
  "T, S, K, dense",
  [
    (8192, 8192, 2048, True),
    (15_000, 15_000, 2048, True),
    (17_000, 17_000, 2048, False),
    (131_072, 131_072, 2048, False),
    # A sixteenth of a sequence, for which all keys are expanded.
    (512, 8192, 2048, False),
    (1, 2048, 2048, False),
  ],
)
def test_short_sequences_are_done_densely(T, S, K, dense):
  assert crossover.dense_is_faster(T, S, K) == dense


@pytest.mark.parametrize(
  "T, S, K, dense",
  [
    # Of half the keys each, as without a cache: 4096 < 4 x 2048 - 410.
    (8192, 8192, 2048, True),
    (15_000, 15_000, 2048, True),
    (16_000, 16_000, 2048, False),
    # Nearly all keys are seen: S (1 + 410 / T) - T / 2 < 8192.
    (2048, 7000, 2048, True),
    (2048, 8192, 2048, False),
    (512, 4096, 2048, True),
    (512, 5000, 2048, False),
    (64, 2048, 2048, False),
    (1, 2048, 2048, False),
  ],
)
def test_cached_keys_are_seen_by_all(T, S, K, dense):
  assert crossover.dense_is_faster(T, S, K, cached=True) == dense


def test_many_queries_expand_cached_keys():
  """FLOPs of a head, with a cache so long that T is nothing beside it."""
  H, R, U, C, S = 128, 64, 128, 512, 10**9

  def expanded(T):
    return S * 2 * C * (H + U) + T * S * 2 * (H + R + U)

  def absorbed(T):
    of_queries = T * 2 * C * (H + U)
    return of_queries + T * S * 2 * (C + R + C)

  for T in (1, 2, 64, 170, 171, 256, 2048):
    faster = expanded(T) < absorbed(T)
    assert crossover.expanding_is_faster(T) == faster == (T > 170)


@pytest.mark.parametrize("kind", ["TPU v8", "TPU v9 lite"])
def test_a_device_without_a_figure_is_always_sparse(monkeypatch, kind):
  monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
  assert not crossover.dense_is_faster(2048, 2048, 2048)
  assert not crossover.dense_is_faster(2048, 2048, 2048, cached=True)


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_hopper_gathers_from_16k(monkeypatch, kind):
  monkeypatch.undo()
  monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
  assert crossover.dense_is_faster(8192, 8192, 2048)
  assert not crossover.dense_is_faster(16_384, 16_384, 2048)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_tpus_gather_from_22k(monkeypatch, kind):
  monkeypatch.undo()
  monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
  assert crossover.dense_is_faster(16_384, 16_384, 2048)
  assert not crossover.dense_is_faster(22_528, 22_528, 2048)


def test_without_kernels_nothing_is_masked(monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(dispatch, "device_kind", lambda: "TPU v5 lite")
  assert not crossover.dense_is_faster(4096, 4096, 2048)
