"""Router and experts against loops over tokens."""

import dataclasses

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import moe
from tests.model import models

CONFIG = dataclasses.replace(
  models.CONFIG,
  num_experts=12,
  experts_per_token=3,
  expert_groups=4,
  groups_per_token=2,
)


def silu(x):
  return x / (1 + np.exp(-x))


def route(x_D, w_DE, bias_E, cfg):
  """One token: its experts by biased score, weighted by the unbiased one."""
  scores = 1 / (1 + np.exp(-(x_D @ w_DE)))
  biased = scores + bias_E
  groups = np.split(np.arange(cfg.num_experts), cfg.expert_groups)
  best = sorted(
    range(len(groups)), key=lambda g: -np.sort(biased[groups[g]])[-2:].sum()
  )
  allowed = np.concatenate([groups[g] for g in best[: cfg.groups_per_token]])
  experts = sorted(allowed, key=lambda e: -biased[e])[: cfg.experts_per_token]
  weights = scores[experts] / scores[experts].sum() * cfg.routed_scale
  return scores, experts, weights


@pytest.fixture
def case():
  """A layer with a bias, its input, and which tokens of that are valid."""
  layer = moe.MoE(CONFIG, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  bias = rng.normal(size=12).astype(np.float32)
  layer.router.bias_E[...] = jnp.asarray(bias)
  x = jnp.float32(rng.normal(size=(2, 9, 32)))
  return layer, x, jnp.ones((2, 9), bool).at[0, 6:].set(False)


def test_matches_a_loop_over_tokens(case):
  layer, x_BTD, valid = case
  y, stats = jax.jit(lambda m, x, v: m(x, v))(layer, x_BTD, valid)
  arrays = nnx.to_pure_dict(nnx.state(layer))
  w = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays)
  load, balance = np.zeros(12), np.zeros(2)
  for b in range(2):
    best, share = np.zeros(12), np.zeros(12)
    for t in range(9):
      x = np.asarray(x_BTD[b, t], np.float64)
      scores, experts, weights = route(
        x, w["router"]["w_DE"], w["router"]["bias_E"], CONFIG
      )
      shared = w["shared"]
      expected = (silu(x @ shared["gate_DF"]) * (x @ shared["up_DF"])) @ shared[
        "down_FD"
      ]
      for e, weight in zip(experts, weights):
        h = silu(x @ w["gate_EDF"][e]) * (x @ w["up_EDF"][e])
        expected += weight * (h @ w["down_EFD"][e])
      np.testing.assert_allclose(y[b, t], expected, rtol=1e-4, atol=1e-4)
      if valid[b, t]:
        load[experts] += 1
        best[np.argsort(-scores)[:3]] += 1  # without bias and groups
        share += scores / scores.sum()
    tokens = valid[b].sum()
    frequency = best * 12 / (3 * tokens)
    balance[b] = (frequency * share / tokens).sum()
  np.testing.assert_array_equal(stats.load, load)
  np.testing.assert_allclose(stats.balance_loss, balance, rtol=1e-5)


def test_the_bias_chooses_but_does_not_weigh(case):
  layer, x, valid = case
  router = layer.router
  router.bias_E[...] = jnp.zeros(12).at[5].set(100.0)
  experts, weights, _ = router(x, valid)
  assert (experts == 5).any(-1).all()
  assert weights.max() < CONFIG.routed_scale
  np.testing.assert_allclose(weights.sum(-1), CONFIG.routed_scale, rtol=1e-5)


def test_no_token_is_dropped_when_all_go_to_one_expert(case):
  _, x, valid = case
  cfg = dataclasses.replace(
    CONFIG,
    experts_per_token=1,
    expert_groups=1,
    groups_per_token=1,
    num_shared_experts=0,
  )
  layer = moe.MoE(cfg, rngs=nnx.Rngs(0))
  layer.router.bias_E[...] = jnp.zeros(12).at[7].set(100.0)
  y, stats = layer(x, valid)
  assert stats.load[7] == valid.sum()
  w = [np.asarray(p[...][7]) for p in (layer.gate_EDF, layer.up_EDF)]
  h = silu(x @ w[0]) * (x @ w[1])
  expected = cfg.routed_scale * (h @ np.asarray(layer.down_EFD[...][7]))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logit", [-1e4, -120.0, -90.0, -45.0, 20.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_may_underflow(case, logit, normalize):
  _, x, valid = case
  cfg = dataclasses.replace(CONFIG, normalize_expert_weights=normalize)
  layer = moe.MoE(cfg, rngs=nnx.Rngs(0))
  # Every token's first number is 1, so that every logit is this one.
  w = layer.router.w_DE
  w[...] = jnp.zeros_like(w[...]).at[0].set(logit)

  def loss_fn(layer, x):
    y, stats = layer(x, valid)
    return (y**2).sum() + stats.balance_loss.sum(), layer.router(x, valid)

  value_and_grad = jax.value_and_grad(
    loss_fn, (0, 1), has_aux=True, allow_int=True
  )
  (loss, (_, weights, _)), grads = value_and_grad(layer, x.at[..., 0].set(1.0))
  score = np.exp(min(logit, 0)) / (1 + np.exp(-abs(logit)))
  expected = score / (3 * score + 1e-20) if normalize else score
  np.testing.assert_allclose(
    weights, expected * cfg.routed_scale, rtol=1e-5, atol=1e-15
  )
  chex.assert_tree_all_finite((loss, grads))
