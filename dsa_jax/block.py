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

from dsa_jax import cache as cache_lib
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

  selected: Int[Array, "*L B T K"] | None
  """The keys that sparse attention read."""
  index_loss: Float[Array, "*L B T"] | None
  """The indexer's loss, if asked for."""
  recall: Float[Array, "*L B Q"] | None
  """How much attention the selected keys hold, likewise."""
  router: moe.RouterStats | None
  """Statistics for balancing; None for a dense MLP."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """Results of a layer over a cache."""

  x: Float[Array, "B T D"]
  """The stream after it."""
  cache: cache_lib.LayerCache
  """The cache that was given, with these tokens in it."""
  selected: Int[Array, "B T K"] | None
  """The keys that sparse attention read."""
  experts: Int[Array, "B T J"] | None
  """The experts that each token went to; None for a dense MLP."""


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
    shared: indexer.Indexed | None = None,
    full: Bool[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], LayerOutput, indexer.Indexed]:
    """The stream, what the layer did, and what those that share it need."""
    attended = self.attention(self.attention_norm(x), frame, shared, full)
    x = x + attended.y
    stats = None
    if isinstance(self.ffn, moe.MoE):
      y, stats = self.ffn(self.ffn_norm(x), frame.valid)
    else:
      with jax.named_scope("mlp"):
        y = self.ffn(self.ffn_norm(x))
    output = LayerOutput(
      attended.indexed.selected,
      attended.index_loss,
      attended.recall,
      stats,
    )
    return x + y, output, attended.indexed

  def decode(
    self,
    x: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    cache: cache_lib.LayerCache,
    shared: Int[Array, "B T K"] | None = None,
    layer: Int[Array, ""] | None = None,
  ) -> Decoded:
    """The same over a cache.

    Args:
      x: As of a call.
      frame: With paging.
      cache: The layer's.
      shared: See `MLA.decode`.
      layer: Which of a stack this is, if its routed experts' matrices are those
        of the whole stack, see `decode_stack`.
    """
    y, cache, selected = self.attention.decode(
      self.attention_norm(x), frame, cache, shared
    )
    x, experts = x + y, None
    if isinstance(self.ffn, moe.MoE):
      y, experts = self.ffn.decode(self.ffn_norm(x), frame.valid, layer)
    else:
      with jax.named_scope("mlp"):
        y = self.ffn(self.ffn_norm(x))
    return Decoded(x + y, cache, selected, experts)


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
    shared: What the last full layer of the stack before found; None if this is
      the first stack.
    full: Which layers have an indexer of their own; None without sharing. With
      it, what they find is kept for the backward pass at every layer: K values
      a token, and if the index loss is asked for, M I more.
    remat: What the backward pass keeps of a layer.
    keep_hidden: Return the stream after every layer, too.
  """

  def layer(carry, of_layer):
    (x, shared), (block, full) = carry, of_layer
    x, output, indexed = block(x, frame, shared, full)
    shared = None if full is None else indexed
    return (x, shared), (output, x if keep_hidden else None)

  if remat != "none":
    save = ad_checkpoint.checkpoint_policies.save_only_these_names
    policy = save(*_KEPT[remat])
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
  if full is not None and shared is None:
    shared = _unread(stack, x, frame)
  (x, shared), (outputs, hidden) = jax.lax.scan(
    layer, (x, shared), (stack, full)
  )
  return x, outputs, hidden, shared


def decode_stack(
  stack: Block,
  x: Float[Array, "B T D"],
  frame: frame_lib.Frame,
  pool: cache_lib.Pool,
  first: int,
  full: Bool[np.ndarray, " L"],
  selected: Int[Array, "B T K"] | None = None,
) -> tuple[
  Float[Array, "B T D"],
  cache_lib.Pool,
  Int[Array, "L B T K"] | None,
  Int[Array, "L B T J"] | None,
]:
  """Runs the layers over a cache; in the program, too, one after another.

  A scan would cut each layer's parameters out of the stack, and write them once
  more, in every step. Nothing is copied here where a parameter is a tuple of
  the layers' arrays. The routed experts' matrices are one array of all layers,
  and read where they lie, and the pool goes from layer to layer.

  Args:
    stack: From `make_stack`; what are no routed experts' matrices may be tuples
      of the layers' arrays, as of `layer_of`.
    x: The residual stream.
    frame: With paging.
    pool: The cache of all layers.
    first: Which of them is the first of this stack.
    full: Which layers have an indexer of their own.
    selected: What the last full layer of the stack before chose; None if this
      is the first stack, or in dense attention.

  Returns:
    The stream, the pool with these tokens in it, and each layer's selected keys
    (None in dense attention) and experts (None for dense MLPs).
  """
  graphdef, routed, rest = nnx.split(stack, moe.is_routed, ...)

  @jax.jit  # traced once for all layers that are alike
  def layer(routed, rest, x, pool, shared, i):
    block = nnx.merge(graphdef, routed, rest)
    cache = cache_lib.LayerCache(pool, first + i)
    return block.decode(x, frame, cache, shared, i)

  given = []
  for i, is_full in enumerate(full):
    shared = None if is_full else selected
    done = layer(routed, layer_of(rest, i), x, pool, shared, jnp.int32(i))
    x, pool, selected = done.x, done.cache.pool, done.selected
    given.append((selected, done.experts))
  chosen, experts = jax.tree.map(lambda *xs: jnp.stack(xs), *given)
  return x, pool, chosen, experts


def layer_of(params: nnx.State, i: int) -> nnx.State:
  """One layer of a stack's parameters.

  Args:
    params: Arrays with the layer in front, or tuples of the layers' arrays.
    i: The layer.
  """
  is_tuple = lambda x: isinstance(x, tuple)
  return jax.tree.map(lambda x: x[i], params, is_leaf=is_tuple)


def _unread(stack, x, frame) -> indexer.Indexed:
  """Zeros in place of what a layer before the first would have found."""
  treedef: jax.tree_util.PyTreeDef | None = None

  def first(stack, x):
    nonlocal treedef
    block = jax.tree.map(lambda y: y[0], stack)
    found = block.attention(x, frame).indexed
    leaves, treedef = jax.tree.flatten(found)
    return leaves

  shapes = jax.eval_shape(first, stack, x)
  zeros = [jnp.zeros(y.shape, y.dtype, out_sharding=y.sharding) for y in shapes]
  assert treedef is not None  # `first` was traced
  return jax.tree.unflatten(treedef, zeros)
