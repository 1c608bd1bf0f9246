"""Model configuration: the shape of a DeepSeek-V3.2, validated when made."""

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np

from dsa_jax import ranges
from dsa_jax import sharding

type Remat = Literal["none", "attention", "selection"]
type DType = Literal["float32", "bfloat16"]

# Far above any model there is, and below what would fill a memory by itself.
type Width = Annotated[int, ranges.Interval(1, 2**20)]
type Length = Annotated[int, ranges.Interval(1, 2**24)]  # tokens, or ids
type Number = Annotated[int, ranges.Interval(1, 2**14)]  # of heads, of experts
type Turns = Annotated[float, ranges.Interval(0, 1e6, open="low")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
  """YaRN: stretches RoPE to longer contexts. A factor of 1 changes nothing."""

  factor: Annotated[float, ranges.Interval(1, 1e6)] = 1.0
  """How many times longer the context is than in pretraining; 1: no YaRN."""
  original_context: Length = 4096
  """The context of pretraining, tokens."""
  beta_fast: Turns = 32.0
  """Dimensions that turn more often than this over it keep their frequency."""
  beta_slow: Turns = 1.0
  """Dimensions that turn less often than this are slowed by the factor."""
  mscale: ranges.Weight = 1.0
  """Numerator of the scale of cos and sin."""
  mscale_all_dim: ranges.Weight = 1.0
  """Denominator of it; its square scales the softmax."""

  def __post_init__(self):
    ranges.check(self)
    if self.beta_fast <= self.beta_slow:
      raise ValueError(
        f"{self.beta_fast=} must be above {self.beta_slow=}: "
        "what turns faster keeps its frequency."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The shape of the model. Defaults are what the family shares."""

  vocab_size: Length
  """V."""
  embed_dim: Width
  """D, the width of the residual stream."""
  num_layers: Number
  """L, without the MTP layer."""
  num_dense_layers: ranges.Index
  """How many of them, from the first, have a dense MLP in place of experts."""

  num_heads: Number
  """N."""
  nope_head_dim: Width
  """H, width of a query's or key's part without position."""
  rope_head_dim: Width
  """R, width of the part with rotary position."""
  value_head_dim: Width
  """U."""
  q_rank: Width
  """Q, rank of the query latent."""
  kv_rank: Width
  """C, rank of the key/value latent."""

  index_heads: Number
  """M, heads of the lightning indexer."""
  index_head_dim: Width
  """I, their width, of which the first R are rotated."""
  top_k: Length
  """K, keys that sparse attention reads for a query."""
  index_rope_interleaved: bool = False
  """Rotate neighbours (GLM) in place of halves (DeepSeek) in the indexer."""
  indexer_types: tuple[Literal["full", "shared"], ...] = ()
  """Kind of each layer, without MTP's ("full"); empty: all full. "full" has an
  indexer of its own. "shared" reads the keys that the last full layer before it
  chose (GLM; IndexCache, arXiv 2603.12201): its place in the stacked parameters
  of the indexers and in their cache is there, but unused."""

  dense_ffn_dim: Width
  """F of the dense MLP."""
  expert_ffn_dim: Width
  """F of one expert."""
  num_experts: Number
  """E, routed experts."""
  experts_per_token: Number
  """Routed experts that a token goes through."""
  num_shared_experts: Annotated[int, ranges.Interval(0, 2**14)] = 1
  """Experts that every token goes through."""
  expert_groups: Number = 1
  """Groups of experts; a token's come from `groups_per_token` of them."""
  groups_per_token: Number = 1
  """See `expert_groups`."""
  routed_scale: Annotated[float, ranges.Interval(0, 1e3, open="low")] = 2.5
  """Multiplies the routed experts' weights."""
  normalize_expert_weights: bool = True
  """Let a token's expert weights sum to 1 before scaling."""

  num_mtp_layers: Literal[0, 1] = 0
  """Extra blocks that predict the token after the next."""

  rope_theta: Annotated[float, ranges.Interval(1, 1e12, open="low")] = 10000.0
  """Base of the rotary frequencies."""
  yarn: YarnConfig = YarnConfig()
  norm_eps: Annotated[float, ranges.Interval(1e-12, 1)] = 1e-6
  """Added to variances in RMSNorm; MLA's latents have their own, see there."""
  init_std: Annotated[float, ranges.Interval(0, 1e3, open="low")] = 0.02
  """Standard deviation of initial weights."""

  dtype: DType = "bfloat16"
  """Type of the activations."""
  param_dtype: DType = "float32"
  """Storage type of the parameters."""
  remat: Remat = "attention"
  """Residuals of a layer besides its input; the rest the backward pass
  computes again. "attention": the selected keys and the attention's results;
  "selection": the selected keys alone, for long sequences of a large model;
  "none": everything, nothing is computed again."""
  rules: sharding.ShardingRules = sharding.ShardingRules()
  """Which mesh axes shard which dimensions."""

  def __post_init__(self):
    ranges.check(self)
    if self.rope_head_dim % 2:
      raise ValueError(
        f"{self.rope_head_dim=} must be even: RoPE rotates pairs."
      )
    if self.index_head_dim < self.rope_head_dim:
      raise ValueError(
        f"{self.index_head_dim=} must be at least {self.rope_head_dim=}: the "
        "indexer rotates that many of its dimensions."
      )
    if self.num_dense_layers > self.num_layers:
      raise ValueError(f"{self.num_dense_layers=} exceeds {self.num_layers=}.")
    self._check_experts()
    self._check_indexers()

  def _check_indexers(self):
    types = self.indexer_types
    if types and len(types) != self.num_layers:
      raise ValueError(
        f"indexer_types={ranges.shown(types)} has {len(types)} entries for "
        f"{self.num_layers=}: give one a layer, or none where all are "
        '"full".'
      )
    if types and types[0] != "full":
      raise ValueError(
        f"indexer_types={ranges.shown(types)} begins with {types[0]!r}, which "
        'has no layer before it whose keys it could read; make it "full".'
      )

  def _check_experts(self):
    if self.num_experts % self.expert_groups:
      raise ValueError(
        f"{self.num_experts=} must be a multiple of {self.expert_groups=}."
      )
    if self.groups_per_token > self.expert_groups:
      raise ValueError(
        f"{self.groups_per_token=} exceeds {self.expert_groups=}."
      )
    per_group = self.num_experts // self.expert_groups
    if self.expert_groups > 1 and per_group < 2:
      raise ValueError(
        f"{self.expert_groups=} leaves {per_group} expert a group, but a group "
        "is scored by its two best: take fewer groups."
      )
    if self.experts_per_token > per_group * self.groups_per_token:
      raise ValueError(
        f"{self.experts_per_token=} exceeds the {per_group} experts of each of "
        f"{self.groups_per_token=} groups."
      )

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers

  def to_dict(self) -> dict[str, Any]:
    """Everything but the rules, as JSON can hold it."""
    values = dataclasses.asdict(self)
    del values["rules"]
    return values

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
    """Undoes `to_dict`.

    Raises:
      ValueError: A field is missing, unknown, or not what it can be.
    """
    try:
      yarn = YarnConfig(**values["yarn"])
      types = tuple(values["indexer_types"])
      return cls(**values | {"yarn": yarn, "indexer_types": types})
    except (KeyError, TypeError) as e:  # of Python's calls, for their keywords
      raise ValueError(f"These are not a model's fields: {e}.") from e

  @property
  def shares_index(self) -> bool:
    """Whether any layer reads the keys that another one chose."""
    return "shared" in self.indexer_types

  @property
  def has_indexer(self) -> np.ndarray:
    """For each layer, MTP's last: whether it is full."""
    types = self.indexer_types or ("full",) * self.num_layers
    types += ("full",) * self.num_mtp_layers
    return np.array([kind == "full" for kind in types])

  @property
  def layers_served(self) -> np.ndarray:
    """Likewise: how many layers, with itself, read what its indexer chose."""
    indexer = np.cumsum(self.has_indexer)  # 1 for the layers of the first one
    return np.bincount(indexer)[indexer]


def v32_671b() -> ModelConfig:
  """DeepSeek-V3.2 as released."""
  return ModelConfig(
    vocab_size=129280,
    embed_dim=7168,
    num_layers=61,
    num_dense_layers=3,
    num_heads=128,
    nope_head_dim=128,
    rope_head_dim=64,
    value_head_dim=128,
    q_rank=1536,
    kv_rank=512,
    index_heads=64,
    index_head_dim=128,
    top_k=2048,
    dense_ffn_dim=18432,
    expert_ffn_dim=2048,
    num_experts=256,
    experts_per_token=8,
    expert_groups=8,
    groups_per_token=4,
    num_mtp_layers=1,
    yarn=YarnConfig(factor=40.0),
    init_std=0.006,
  )


def tiny() -> ModelConfig:
  """Every part of the real one, small enough to learn bytes on a CPU."""
  return ModelConfig(
    vocab_size=264,
    embed_dim=128,
    num_layers=4,
    num_dense_layers=1,
    num_heads=4,
    nope_head_dim=32,
    rope_head_dim=16,
    value_head_dim=32,
    q_rank=64,
    kv_rank=32,
    index_heads=4,
    index_head_dim=32,
    top_k=64,
    dense_ffn_dim=256,
    expert_ffn_dim=64,
    num_experts=8,
    experts_per_token=2,
    expert_groups=2,
    groups_per_token=1,
    num_mtp_layers=1,
    dtype="float32",
  )
