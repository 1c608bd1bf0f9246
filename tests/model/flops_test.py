"""Counts of parameters and FLOPs."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

import dsa_jax
from dsa_jax import config as config_lib
from dsa_jax import flops
from tests.model import models


def test_parameters_are_those_of_the_module():
  for cfg in (models.CONFIG, config_lib.tiny()):
    model = nnx.eval_shape(
      lambda cfg=cfg: dsa_jax.Transformer(cfg, rngs=nnx.Rngs(0))
    )
    params = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    counted = sum(
      leaf.size
      for path, leaf in params
      if "scale_D" not in str(path) and "bias_D" not in str(path)
    )
    assert flops.total_parameters(cfg) == counted


def test_the_released_model():
  # "671B total parameters with 37B activated", and 14B (here without another
  # embedding and head, 1.9B) in the MTP layer; the indexers are new: 0.9B.
  cfg = dataclasses.replace(config_lib.v32_671b(), num_mtp_layers=0)
  layer = flops.layer_parameters(cfg)
  indexers = 61 * layer.indexer
  assert (flops.total_parameters(cfg) - indexers) / 1e9 == pytest.approx(
    671, abs=0.5
  )
  assert (flops.active_parameters(cfg) - indexers) / 1e9 == pytest.approx(
    36.6, abs=0.5
  )
  mtp = flops.total_parameters(config_lib.v32_671b())
  assert (mtp - flops.total_parameters(cfg)) / 1e9 == pytest.approx(
    11.6, abs=0.2
  )


def test_a_shared_layer_has_no_indexer():
  cfg = dataclasses.replace(models.CONFIG, num_mtp_layers=1)
  shared = dataclasses.replace(cfg, indexer_types=("full", "shared", "shared"))
  layer, T = flops.layer_parameters(cfg), 32
  for count in (flops.total_parameters, flops.active_parameters):
    assert count(cfg) - count(shared) == 2 * layer.indexer

  def saved(attention):
    costs = [
      flops.training_flops_per_token(
        c, T, attention, trains_model=True, trains_indexer=True
      )
      for c in (cfg, shared)
    ]
    return costs[0] - costs[1]

  # The loss is every layer's; its gradient to the weights is the indexer's.
  scores = 2 * 3 * 16 * (T + 1) / 2
  np.testing.assert_allclose(
    saved("sparse"), 2 * (scores + 6 * layer.indexer), rtol=1e-9
  )
  np.testing.assert_allclose(saved("dense"), 2 * 6 * layer.indexer, rtol=1e-9)


def test_dense_attention_grows_with_t_and_sparse_with_k():
  cfg = config_lib.v32_671b()

  def cost(seq_len, attention):
    return flops.training_flops_per_token(
      cfg, seq_len, attention, trains_model=True, trains_indexer=False
    )

  # Twice the keys, on average, cost 6 N (2 H + R) more for each.
  width = 62 * 6 * 128 * (128 + 64 + 128)
  grown = cost(131072, "dense") - cost(65536, "dense")
  np.testing.assert_allclose(grown, 32768 * width, rtol=1e-6)
  # Sparse attention itself is flat: what grows is the indexer's scores.
  grown = cost(131072, "sparse") - cost(65536, "sparse")
  scores = 62 * 32768 * 2 * 64 * 128
  np.testing.assert_allclose(grown, scores, rtol=0.12)
  assert cost(131072, "sparse") < cost(131072, "dense") / 3


def test_warm_up_is_the_forward_pass_and_the_indexer():
  cfg = dataclasses.replace(config_lib.v32_671b(), num_mtp_layers=0)

  def cost(*, trains_model, trains_indexer):
    return flops.training_flops_per_token(
      cfg,
      32768,
      "dense",
      trains_model=trains_model,
      trains_indexer=trains_indexer,
    )

  head = cfg.vocab_size * cfg.embed_dim
  forward = cost(trains_model=False, trains_indexer=False)
  both = cost(trains_model=True, trains_indexer=False)
  np.testing.assert_allclose(both, 3 * (forward + 2 * head), rtol=1e-9)
  # 16384.5 keys: q.k of 128 heads, thrice that of 64 index heads; weights.
  pairs = 16384.5 * (2 * 128 * 192 + 3 * 2 * 64 * 128)
  weights = 6 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64)
  warmup = cost(trains_model=False, trains_indexer=True)
  np.testing.assert_allclose(
    warmup - forward, 61 * (pairs + weights), rtol=1e-9
  )
