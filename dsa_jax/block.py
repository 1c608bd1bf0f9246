"""One layer: attention and an MLP or experts, each added to the stream.

Letters: B batch, T tokens, D model width, L layers of a stack.
"""

import dataclasses

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import indexer
from dsa_jax import mla
from dsa_jax import moe
from dsa_jax import norms
from pallas_kernels import checkpoint_names

# What each kind of remat keeps of a layer. The selection always stays: chosen
# again, it could be another one.
_KEPT: dict[config_lib.Remat, tuple[str, ...]] = {
  "attention": (
    checkpoint_names.INDEXER_TOPK,
    checkpoint_names.SPARSE_MLA,
    checkpoint_names.DENSE_MLA,
  ),
  "selection": (checkpoint_names.INDEXER_TOPK,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
  """Results of a layer; of a stack of layers, each array has L in front."""

  cache: mla.LayerCache | None
  """The cache that was given, with these tokens in it."""
  selected: Int[Array, "*L B T K"] | None
  """The keys that sparse attention read."""
  index_loss: Float[Array, "*L B T"] | None
  """The indexer's loss, if asked for."""
  recall: Float[Array, "*L B Q"] | None
  """How much attention the selected keys hold, likewise."""
  router: moe.RouterStats | None
  """Statistics for balancing; None for a dense MLP."""


class Block(nnx.Module):
  """Pre-norm attention and feed-forward."""

  def __init__(
    self, cfg: config_lib.ModelConfig, *, experts: bool, rngs: nnx.Rngs
  ):
    self.attention_norm = norms.RMSNorm(cfg.embed_dim, cfg)
    self.attention = mla.MLA(cfg, rngs=rngs)
    self.ffn_norm = norms.RMSNorm(cfg.embed_dim, cfg)
    if experts:
      self.ffn = moe.MoE(cfg, rngs=rngs)
    else:
      self.ffn = moe.MLP(cfg.dense_ffn_dim, cfg, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    cache: mla.LayerCache | None = None,
    shared: indexer.Indexed | None = None,
    full: Bool[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], LayerOutput, indexer.Indexed]:
    """The stream, what the layer did, and what those that share it need."""
    attended = self.attention(
      self.attention_norm(x), frame, cache, shared, full
    )
    x = x + attended.y
    stats = None
    if isinstance(self.ffn, moe.MoE):
      y, stats = self.ffn(self.ffn_norm(x), frame.valid)
    else:
      with jax.named_scope("mlp"):
        y = self.ffn(self.ffn_norm(x))
    output = LayerOutput(
      attended.cache,
      attended.indexed.selected,
      attended.index_loss,
      attended.recall,
      stats,
    )
    return x + y, output, attended.indexed


def make_stack(
  cfg: config_lib.ModelConfig, length: int, *, experts: bool, rngs: nnx.Rngs
) -> Block | None:
  """Blocks whose parameters have the layer in front; None for no layers."""
  if not length:
    return None

  def make(key):
    return Block(cfg, experts=experts, rngs=nnx.Rngs(key))

  return jax.vmap(make)(jax.random.split(rngs.params(), length))


def run_stack(
  stack: Block,
  x: Float[Array, "B T D"],
  frame: frame_lib.Frame,
  cache: mla.LayerCache | None = None,
  shared: indexer.Indexed | None = None,
  full: Bool[np.ndarray, " L"] | None = None,
  *,
  remat: config_lib.Remat,
  keep_hidden: bool,
) -> tuple[
  Float[Array, "B T D"],
  LayerOutput,
  Float[Array, "L B T D"] | None,
  indexer.Indexed | None,
]:
  """Runs the layers one after another; compiled once for all of them.

  Args:
    stack: From `make_stack`.
    x: The residual stream.
    frame: Positions and visible keys.
    cache: The layers' caches, with L in front.
    shared: What the last full layer of the stack before found; None if this is
      the first stack.
    full: Which layers have an indexer of their own; None without sharing. With
      it, what they find is kept for the backward pass at every layer: K values
      a token, and if the index loss is asked for, M I more.
    remat: What the backward pass keeps of a layer.
    keep_hidden: Return the stream after every layer, too.
  """

  def layer(carry, of_layer):
    (x, shared), (block, cache, full) = carry, of_layer
    x, output, indexed = block(x, frame, cache, shared, full)
    shared = None if full is None else indexed
    return (x, shared), (output, x if keep_hidden else None)

  if remat != "none":
    save = ad_checkpoint.checkpoint_policies.save_only_these_names
    policy = save(*_KEPT[remat])
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
  if full is not None and shared is None:
    shared = _unread(stack, x, frame, cache)
  (x, shared), (outputs, hidden) = jax.lax.scan(
    layer, (x, shared), (stack, cache, full)
  )
  return x, outputs, hidden, shared


def _unread(stack, x, frame, cache) -> indexer.Indexed:
  """Zeros in place of what a layer before the first would have found."""
  treedef: jax.tree_util.PyTreeDef | None = None

  def first(stack, cache, x):
    nonlocal treedef
    block, cache = jax.tree.map(lambda y: y[0], (stack, cache))
    found = block.attention(x, frame, cache).indexed
    leaves, treedef = jax.tree.flatten(found)
    return leaves

  shapes = jax.eval_shape(first, stack, cache, x)
  zeros = [jnp.zeros(y.shape, y.dtype, out_sharding=y.sharding) for y in shapes]
  assert treedef is not None  # `first` was traced
  return jax.tree.unflatten(treedef, zeros)
