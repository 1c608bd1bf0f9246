"""The model: embedding, dense layers, expert layers, head, and MTP.

Letters: B batch, T tokens, D model width, V vocabulary, L layers, E experts,
K chosen keys a query.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dsa_jax import block
from dsa_jax import cache as cache_lib
from dsa_jax import config as config_lib
from dsa_jax import embed
from dsa_jax import frame as frame_lib
from dsa_jax import losses as losses_lib
from dsa_jax import mtp as mtp_lib
from dsa_jax import norms
from dsa_jax import recall
from dsa_jax import sharding
from dsa_jax import zigzag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
  """Nothing is averaged: the caller sums over what it counts.

  Layers are in the model's order, the MTP block last; Lmoe have experts.
  """

  lm: Float[Array, "B T"] | None
  """Nats of the next token; 0 where there is none in the document. None if not
  asked for."""
  mtp: Float[Array, "B T"] | None
  """Nats of the one after it, likewise; None also without MTP."""
  index: Float[Array, "L B T"] | None
  """KL of each layer's attention from its indexer, over the number of layers
  which that serves; None if not asked for, 0 if not measured. Its sum over
  layers has the gradient of each indexer's KL from the mean attention of its
  layers (IndexCache, arXiv 2603.12201)."""
  recall: Float[Array, "L B Q"] | None
  """How much of the attention the selected keys hold, on a sample of Q queries
  (see recall.py); None and 0 likewise."""
  recall_queries: Bool[Array, "B Q"] | None
  """Those of them that see more than K keys; the others say nothing."""
  balance: Float[Array, "Lmoe B"] | None
  """Sequence-wise balance loss of each expert layer, if there are any."""
  load: Float[Array, "Lmoe E"] | None
  """Tokens that went to each expert of each expert layer, likewise."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """All of a forward pass."""

  logits: Float[Array, "B T V"]
  hidden: Float[Array, "L1 B T D"]
  """The embedding, then each layer's output, the last after the final norm."""
  selected: Int[Array, "L B T K"] | None
  """The keys each layer read, ascending, then -1; None in dense attention."""
  losses: Losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """A pass over tokens that follow those in a cache; without MTP."""

  hidden: Float[Array, "B T D"]
  """After the final norm; for the head."""
  pool: cache_lib.Pool
  """With these tokens in it."""
  selected: Int[Array, "L B T K"] | None
  """The keys each layer read, ascending, then -1; None in dense attention."""
  experts: Int[Array, "Lmoe B T J"] | None
  """The experts of each token; None without layers of experts."""


class Transformer(nnx.Module):
  """DeepSeek-V3.2. Parameters of alike layers are stacked, layer in front."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    # The folder it was loaded from; save_hf takes over what stands there.
    self.source: str | None = None
    dense, moe = config.num_dense_layers, config.num_moe_layers
    self.embed = embed.Embed(config, rngs=rngs)
    self.dense_layers = block.make_stack(
      config, dense, experts=False, rngs=rngs
    )
    self.moe_layers = block.make_stack(config, moe, experts=True, rngs=rngs)
    self.final_norm = norms.RMSNorm(config.embed_dim, config)
    self.head = embed.Head(config, rngs=rngs)
    has_mtp = config.num_mtp_layers > 0
    self.mtp = mtp_lib.MTP(config, rngs=rngs) if has_mtp else None

  def __call__(
    self,
    tokens: frame_lib.Ids,
    positions: frame_lib.Ids | None = None,
    segment_ids: frame_lib.Ids | None = None,
    *,
    attention: frame_lib.Attention = "sparse",
  ) -> Float[Array, "B T V"]:
    """Logits of the next token, fp32.

    Args:
      tokens: Ids below V.
      positions: For RoPE; by default the place in the row.
      segment_ids: The document of each token, a run of equal numbers; 0 is
        padding. By default a row is one document.
      attention: "sparse" reads K chosen keys a query, "dense" all of them.
    """
    frame = frame_lib.make_frame(
      self.config, tokens.shape, positions, segment_ids, attention=attention
    )
    logits = self.head(self._trunk(tokens, frame)[0])
    return zigzag.gather(logits, self.config.rules)

  def forward(
    self,
    tokens: frame_lib.Ids,
    positions: frame_lib.Ids | None = None,
    segment_ids: frame_lib.Ids | None = None,
    *,
    attention: frame_lib.Attention = "sparse",
  ) -> Output:
    """Logits and everything on the way to them; arguments as of a call."""
    frame = frame_lib.make_frame(
      self.config,
      tokens.shape,
      positions,
      segment_ids,
      attention=attention,
      index_loss=attention == "sparse",
    )
    x, outputs, hidden = self._trunk(tokens, frame, keep_hidden=True)
    hidden = jnp.concatenate([*hidden[:-1], hidden[-1][:-1], x[None]])
    selected = _join([o.selected for o in outputs if attention == "sparse"])
    rules = self.config.rules
    return Output(
      zigzag.gather(self.head(x), rules),
      zigzag.gather(hidden, rules, axis=2),
      selected if selected is None else zigzag.gather(selected, rules, axis=2),
      self._losses(tokens, segment_ids, frame, x, outputs, lm_loss=True),
    )

  def losses(
    self,
    tokens: frame_lib.Ids,
    positions: frame_lib.Ids | None = None,
    segment_ids: frame_lib.Ids | None = None,
    *,
    attention: frame_lib.Attention,
    lm_loss: bool,
    index_loss: bool,
    measure: Bool[Array, ""] | bool = True,
  ) -> Losses:
    """Computes the losses; logits never exist for a whole sequence.

    Args:
      tokens: As of a call, like `positions` and `segment_ids`.
      positions: See `tokens`.
      segment_ids: See `tokens`.
      attention: "sparse" or "dense".
      lm_loss: Compute the language losses.
      index_loss: Compute the indexer's loss and recall.
      measure: Whether that loss and recall are computed as numbers. The loss's
        gradient is there without it.
    """
    frame = frame_lib.make_frame(
      self.config,
      tokens.shape,
      positions,
      segment_ids,
      attention=attention,
      index_loss=index_loss,
      measure=measure,
    )
    x, outputs, _ = self._trunk(tokens, frame)
    return self._losses(tokens, segment_ids, frame, x, outputs, lm_loss=lm_loss)

  def predict(
    self,
    tokens: frame_lib.Ids,
    at: Int[Array | np.ndarray, "B P"],
    positions: frame_lib.Ids | None = None,
    segment_ids: frame_lib.Ids | None = None,
    *,
    attention: frame_lib.Attention = "sparse",
  ) -> Float[Array, "B P V"]:
    """Logits of the token that follows each place of `at`, and no others."""
    frame = frame_lib.make_frame(
      self.config, tokens.shape, positions, segment_ids, attention=attention
    )
    rules = self.config.rules
    per_place = rules("batch", None, None)
    pick = sharding.local(
      lambda x, at: jnp.take_along_axis(x, at[..., None], 1),
      in_specs=(per_place, rules("batch", None)),
      out_specs=per_place,
    )
    x = zigzag.gather(self._trunk(tokens, frame)[0], rules)
    return self.head(pick(x, jnp.asarray(at)))

  def decode(
    self, tokens: frame_lib.Ids, frame: frame_lib.Frame, pool: cache_lib.Pool
  ) -> Decoded:
    """Runs tokens that follow those cached, and caches them.

    Args:
      tokens: Ids below V.
      frame: From `make_cached_frame`.
      pool: From `make_pool`; donated where the whole is compiled, it is updated
        in place.
    """
    cfg, x, selected = self.config, self._embed(tokens), None
    chosen, experts, first = [], None, 0
    for name, stack, length in self._stacks():
      layers = slice(first, first + length)
      with jax.named_scope(name):
        x, pool, of_stack, experts = block.decode_stack(
          *(stack, x, frame, pool, first, cfg.has_indexer[layers], selected)
        )
      if of_stack is not None:
        chosen.append(of_stack)
        selected = of_stack[-1]
      first += length
    return Decoded(self.final_norm(x), pool, _join(chosen), experts)

  def draft(
    self,
    next_tokens: frame_lib.Ids,
    hidden: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    pool: cache_lib.Pool,
  ) -> tuple[Float[Array, "B T D"], cache_lib.Pool]:
    """Vectors that, at t, let the head predict token t + 2; caches MTP's keys.

    Args:
      next_tokens: The token after each of those decoded.
      hidden: As `decode` gave it.
      frame: As given to it.
      pool: From it.

    Raises:
      ValueError: The model has no MTP block.
    """
    if self.mtp is None:
      raise ValueError("draft: the model has no MTP block.")
    return self.mtp.decode(self._embed(next_tokens), hidden, frame, pool)

  def _stacks(self):
    """Name, blocks and number of layers of each stack that has any."""
    cfg = self.config
    if self.dense_layers is not None:
      yield "dense_layers", self.dense_layers, cfg.num_dense_layers
    if self.moe_layers is not None:
      yield "moe_layers", self.moe_layers, cfg.num_moe_layers

  def _trunk(self, tokens, frame, *, keep_hidden=False):
    """The normalised output; of each stack, what its layers did and gave."""
    cfg, x, shared = self.config, self._embed(tokens), None
    outputs: list[block.LayerOutput] = []
    hidden, first = [x[None]], 0
    for name, stack, length in self._stacks():
      layers = slice(first, first + length)
      with jax.named_scope(name):
        x, output, after, shared = block.run_stack(
          stack,
          x,
          frame,
          shared,
          cfg.has_indexer[layers] if cfg.shares_index else None,
          remat=cfg.remat,
          keep_hidden=keep_hidden,
        )
      outputs.append(output)
      if after is not None:
        hidden.append(after)
      first += length
    return self.final_norm(x), outputs, hidden

  def _embed(self, tokens):
    rules = self.config.rules
    natural = sharding.put(tokens, rules("batch", None))
    return self.embed(zigzag.scatter(natural, rules))

  def _losses(self, tokens, segment_ids, frame, x, outputs, *, lm_loss):
    rules = self.config.rules
    natural = rules("batch", None)
    tokens = sharding.put(tokens, natural)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    segment_ids = sharding.put(segment_ids, natural)

    def nats(x, ahead):
      targets = zigzag.scatter(losses_lib.shift(tokens, ahead), rules)
      loss = losses_lib.cross_entropy(self.head, x, targets)
      loss = zigzag.gather(loss, rules)
      return jnp.where(losses_lib.has_target(segment_ids, ahead), loss, 0.0)

    lm, mtp = nats(x, 1) if lm_loss else None, None
    if self.mtp is not None:
      # A document's last token has no next one, whatever stands there.
      next_BT = losses_lib.shift(tokens, 1)
      next_BT = jnp.where(losses_lib.has_target(segment_ids), next_BT, 0)
      x, output = self.mtp(self._embed(next_BT), x, frame)
      mtp = nats(x, 2) if lm_loss else None
      outputs = [*outputs, jax.tree.map(lambda y: y[None], output)]
    sampled = recall.sample(
      recall.chooses(frame.start, frame.end, self.config.top_k)
    )
    routers = [o.router for o in outputs if o.router is not None]
    index = _join([o.index_loss for o in outputs if frame.index_loss])
    if index is not None:
      index = zigzag.gather(index, rules, axis=2)
      if self.config.shares_index:
        index /= self.config.layers_served[:, None, None]
    return Losses(
      lm,
      mtp,
      index,
      _join([o.recall for o in outputs if frame.index_loss]),
      sampled if frame.index_loss else None,
      _join([r.balance_loss for r in routers]),
      _join([r.load for r in routers]),
    )


def _join(stacks):
  """Stacks of layers, one after the other; None for none."""
  return jnp.concatenate(stacks) if stacks else None
