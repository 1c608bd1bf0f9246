"""MLP, and the mixture of experts with its router.

Letters: B batch, T tokens, D model width, F ffn width, E experts, G groups of
them, J experts a token, R = B T J rows.
"""

import dataclasses
import functools
from typing import Any, Final

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import config as config_lib
from dsa_jax import parameter
from dsa_jax import sharding
from dsa_jax.experts import few_tokens
from dsa_jax.experts import routed_experts

_SCALE: Final = 2.0**33  # of scores, as they are added up


class RouterBias(nnx.Variable):
  """Added to the router's scores for choosing; set by loads, not gradients."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
  """Statistics for balancing, of a layer or of a stack of L."""

  load: Float[Array, "*L E"]
  """Tokens that went to each expert, padding left out."""
  balance_loss: Float[Array, "*L B"]
  """Each row's sequence-wise balance loss, 1 if even (DeepSeek-V3, eq. 17). It
  counts the experts of highest score, whichever the bias and groups chose."""


class MLP(nnx.Module):
  """`(silu(x Wgate) * (x Wup)) Wdown`."""

  def __init__(self, dim: int, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, F = cfg.embed_dim, dim
    self.cfg = cfg
    self.gate_DF = parameter.weight(rngs, cfg, (D, F), ("embed", "ffn"))
    self.up_DF = parameter.weight(rngs, cfg, (D, F), ("embed", "ffn"))
    self.down_FD = parameter.weight(rngs, cfg, (F, D), ("ffn", "embed"))

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    rules = self.cfg.rules
    wide = rules("batch", "seq", "ffn")

    def project(w):
      return parameter.einsum("BTD,DF->BTF", x, w[...], out_sharding=wide)

    return parameter.einsum(
      "BTF,FD->BTD",
      jax.nn.silu(project(self.gate_DF)) * project(self.up_DF),
      self.down_FD[...],
      out_sharding=rules("batch", "seq", None),
    )


class Router(nnx.Module):
  """Chooses the experts of each token (DeepSeek-V3, eq. 12-16), in fp32."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.w_DE = parameter.weight(
      rngs, cfg, (cfg.embed_dim, cfg.num_experts), ("embed", None)
    )
    self.bias_E = RouterBias(jnp.zeros((cfg.num_experts,), jnp.float32))

  @jax.named_scope("router")
  def __call__(
    self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
  ) -> tuple[Int[Array, "B T J"], Float[Array, "B T J"], RouterStats]:
    """Experts, their weights, and what balancing needs."""
    cfg = self.cfg
    logits_BTE = parameter.einsum(
      "BTD,DE->BTE",
      x.astype(jnp.float32),
      self.w_DE[...],
      out_sharding=cfg.rules("batch", "seq", None),
    )
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    experts_BTJ = self._choose(jax.lax.stop_gradient(scores_BTE))
    weights_BTJ = jnp.take_along_axis(scores_BTE, experts_BTJ, -1)
    if cfg.normalize_expert_weights:
      weights_BTJ = _shares(weights_BTJ)
    stats = RouterStats(
      self._counts(experts_BTJ, valid).sum(0),
      self._balance_loss(scores_BTE, valid),
    )
    return experts_BTJ, weights_BTJ * cfg.routed_scale, stats

  def _balance_loss(self, scores_BTE, valid_BT):
    """DeepSeek-V3, eq. 17-20, which leave out biases and groups."""
    E, J = self.cfg.num_experts, self.cfg.experts_per_token
    best_BTJ = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), J)[1]
    tokens_B1 = jnp.maximum(jnp.sum(valid_BT, 1, keepdims=True), 1)
    share_BTE = _shares(scores_BTE) * valid_BT[..., None]
    share_BE = jnp.sum(share_BTE, 1) / tokens_B1
    frequency_BE = self._counts(best_BTJ, valid_BT) * (E / J) / tokens_B1
    return jnp.sum(frequency_BE * share_BE, -1)

  def _counts(self, experts_BTJ, valid_BT):
    """[B, E]: how many of a row's tokens have each expert."""
    chosen_BTJE = jax.nn.one_hot(experts_BTJ, self.cfg.num_experts)
    return jnp.sum(chosen_BTJE * valid_BT[..., None, None], (1, 2))

  def _choose(self, scores_BTE):
    """The J best experts, by biased score, of the best groups; ties go low."""
    cfg, J = self.cfg, self.cfg.experts_per_token
    biased_BTE = scores_BTE + self.bias_E[...][None, None]
    if cfg.expert_groups > 1:
      B, T, E = biased_BTE.shape
      groups = (B, T, cfg.expert_groups, E // cfg.expert_groups)
      best_two_BTG2 = jax.lax.top_k(biased_BTE.reshape(groups), 2)[0]
      kept_BTg = jax.lax.top_k(best_two_BTG2.sum(-1), cfg.groups_per_token)[1]
      kept_BTG = jax.nn.one_hot(kept_BTg, cfg.expert_groups).any(-2)
      biased_BTE = jnp.where(
        jnp.repeat(kept_BTG, groups[-1], -1), biased_BTE, -jnp.inf
      )
    return jax.lax.top_k(biased_BTE, J)[1]


def _shares(scores: Float[Array, "B T X"]) -> Float[Array, "B T X"]:
  """Each score's share of their sum; all 0 if they are.

  DeepSeek adds 1e-20 to the sum, for scores that underflow. Here both sides of
  the fraction are scaled, exactly, by a power of two: the gradient divides by
  the sum's square, which would underflow, too.
  """
  scores = scores * _SCALE
  return scores / (scores.sum(-1, keepdims=True) + 1e-20 * _SCALE)


class MoE(nnx.Module):
  """Routed experts, and shared ones that every token goes through. Dropless."""

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, E, F = cfg.embed_dim, cfg.num_experts, cfg.expert_ffn_dim
    self.cfg = cfg
    self.router = Router(cfg, rngs=rngs)
    into, out = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
    self.gate_EDF = parameter.weight(rngs, cfg, (E, D, F), into)
    self.up_EDF = parameter.weight(rngs, cfg, (E, D, F), into)
    self.down_EFD = parameter.weight(rngs, cfg, (E, F, D), out)
    shared = F * cfg.num_shared_experts
    self.shared = MLP(shared, cfg, rngs=rngs) if shared else None

  def __call__(
    self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
  ) -> tuple[Float[Array, "B T D"], RouterStats]:
    rules, dtype = self.cfg.rules, self.cfg.dtype
    experts_BTJ, weights_BTJ, stats = self.router(x, valid)
    per_token = rules("batch", "seq", None)
    into, out = rules("experts", None, "ffn"), rules("experts", "ffn", None)
    routed = sharding.local(
      functools.partial(
        routed_experts,
        experts_axis=rules.mesh_axes("experts"),
        ffn_axis=rules.mesh_axes("ffn"),
      ),
      in_specs=(per_token, per_token, per_token, into, into, out),
      out_specs=per_token,
    )
    matrices = (self.gate_EDF, self.up_EDF, self.down_EFD)
    with jax.named_scope("experts"):
      y_BTD = routed(
        *(x, experts_BTJ, weights_BTJ),
        *(parameter.rounded(w[...], dtype) for w in matrices),
      )
    return self._with_shared(y_BTD, x), stats

  def decode(
    self,
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    layer: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], Int[Array, "B T J"]]:
    """The same for few tokens, without statistics: reads matrices in place.

    Args:
      x: The tokens.
      valid: Those that count; no expert's matrices are read for the others.
      layer: Where the matrices are those of a stack of layers: which one this
        is; None if they are this layer's alone. They are rounded here unless
        they have the activations' dtype already.

    Returns:
      The result, and each token's experts.
    """
    cfg, rules = self.cfg, self.cfg.rules
    experts_BTJ, weights_BTJ, _ = self.router(x, valid)
    gone_BTJ = jnp.where(valid[..., None], experts_BTJ, cfg.num_experts)
    matrices = [w[...] for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]
    if layer is None:
      matrices, layer = [w[None] for w in matrices], jnp.int32(0)
    per_token = rules("batch", None, None)
    into = rules(None, "experts", None, "ffn")
    out = rules(None, "experts", "ffn", None)
    routed = sharding.local(
      functools.partial(
        few_tokens,
        experts_axis=rules.mesh_axes("experts"),
        ffn_axis=rules.mesh_axes("ffn"),
      ),
      in_specs=(*(per_token,) * 3, into, into, out, rules()),
      out_specs=per_token,
      differentiable=False,
    )
    with jax.named_scope("experts"):
      matrices = (w.astype(cfg.dtype) for w in matrices)
      y_BTD = routed(x, gone_BTJ, weights_BTJ, *matrices, layer)
    return self._with_shared(y_BTD, x), experts_BTJ

  def _with_shared(self, y_BTD, x):
    if self.shared is not None:
      with jax.named_scope("shared_expert"):
        y_BTD = y_BTD + self.shared(x)
    return y_BTD.astype(self.cfg.dtype)


def is_routed(path: tuple[Any, ...], _: object) -> bool:
  """Whether a parameter is a matrix of routed experts; a filter for nnx."""
  return path[-1] in ("gate_EDF", "up_EDF", "down_EFD")
