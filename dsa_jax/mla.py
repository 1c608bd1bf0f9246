"""Multi-head latent attention, dense and sparse.

Letters: B batch, T queries, S keys, K chosen keys, D model width, N heads, H
head width without position, R with, U value width, Q query rank, C latent rank.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax import cache as cache_lib
from dsa_jax import cached_attention
from dsa_jax import config as config_lib
from dsa_jax import frame as frame_lib
from dsa_jax import indexer as indexer_lib
from dsa_jax import norms
from dsa_jax import parameter
from dsa_jax import recall
from dsa_jax import rope
from dsa_jax import sharding
from dsa_jax import zigzag
import pallas_kernels
from pallas_kernels import crossover


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
  """MLA's result, and what it did."""

  y: Float[Array, "B T D"]
  indexed: indexer_lib.Indexed
  """The keys that were read, and their scores; for layers that share them."""
  index_loss: Float[Array, "B T"] | None
  """KL of each query's attention from its index scores, if asked for."""
  recall: Float[Array, "B Q"] | None
  """Recall of a sample of the queries, if asked for; see recall.py."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """Both parts of every head's query."""

  nope: Float[Array, "B T N H"]
  rope: Float[Array, "B T N R"]
  """Rotated."""


def softmax_scale(cfg: config_lib.ModelConfig) -> float:
  """(H+R)^-1/2 m^2, with YaRN's m; the same in expanded and absorbed form."""
  mscale = rope.yarn_mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim)
  return (cfg.nope_head_dim + cfg.rope_head_dim) ** -0.5 * mscale**2


class MLA(nnx.Module):
  """Attention over a low-rank latent (DeepSeek-V2, eq. 9-19), with DSA.

  Dense attention runs expanded: every head has its own keys and values. Sparse
  attention runs absorbed: all heads share the latent rows, which are gathered
  once for all of them; or, where `crossover` finds that faster, expanded, too,
  with a mask. Over a cache, few queries run absorbed in dense attention, too.
  """

  def __init__(self, cfg: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    D, N, Q, C = cfg.embed_dim, cfg.num_heads, cfg.q_rank, cfg.kv_rank
    H, R, U = cfg.nope_head_dim, cfg.rope_head_dim, cfg.value_head_dim

    def weight(shape, *axes):
      return parameter.weight(rngs, cfg, shape, axes)

    self.cfg = cfg
    self.q_a_DQ = weight((D, Q), "embed", None)
    # 1e-6 whatever `norm_eps` is, as in transformers.
    self.q_norm = norms.RMSNorm(Q, cfg, eps=1e-6)
    self.q_b_QNX = weight((Q, N, H + R), "rank", "heads", None)  # X: H+R
    self.kv_a_DX = weight((D, C + R), "embed", None)  # X: C+R
    self.kv_norm = norms.RMSNorm(C, cfg, eps=1e-6)
    self.k_b_CNH = weight((C, N, H), "rank", "heads", None)
    self.v_b_CNU = weight((C, N, U), "rank", "heads", None)
    self.out_NUD = weight((N, U, D), "heads", None, "embed")
    self.indexer = indexer_lib.Indexer(cfg, rngs=rngs)

  @jax.named_scope("mla")
  def __call__(
    self,
    x: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    shared: indexer_lib.Indexed | None = None,
    full: Bool[Array, ""] | None = None,
  ) -> AttentionOutput:
    """Attends as `frame` says.

    Where layers share what an indexer found, `shared` and `full` are as of
    `Indexer.find`.
    """
    cfg, rules = self.cfg, self.cfg.rules
    q_latent, queries, kv_BTX = self._project(x, frame)
    kv_BSX = zigzag.gather_keys(kv_BTX, rules)
    indexed, recall_BQ = indexer_lib.Indexed(None, None), None
    if frame.attention == "sparse" or frame.index_loss:
      indexed = self.indexer.find(x, q_latent, frame, shared, full)
    T, S = x.shape[1] // rules.shards("seq"), kv_BSX.shape[1]
    expanded = frame.attention == "dense" or crossover.dense_is_faster(
      T, S, cfg.top_k
    )
    attend = self._expanded if expanded else self._absorbed
    out_BTNU, index_loss_BT = attend(queries, kv_BSX, indexed, frame)
    if frame.index_loss:
      recall_BQ = self._recall(queries, kv_BSX, indexed, frame)
    y_BTD = self._output(out_BTNU)
    return AttentionOutput(y_BTD, indexed, index_loss_BT, recall_BQ)

  @jax.named_scope("mla")
  def decode(
    self,
    x: Float[Array, "B T D"],
    frame: frame_lib.Frame,
    cache: cache_lib.LayerCache,
    shared: Int[Array, "B T K"] | None = None,
  ) -> tuple[
    Float[Array, "B T D"], cache_lib.LayerCache, Int[Array, "B T K"] | None
  ]:
    """Attends to what is cached, these tokens included.

    Args:
      x: As of a call.
      frame: With paging.
      cache: The layer's.
      shared: Keys that an earlier layer chose, to be read here, too; None if
        this layer's own indexer chooses, or in dense attention.

    Returns:
      The result, the cache with these tokens in it, and the keys that were
      read, None in dense attention.
    """
    cfg, rules = self.cfg, self.cfg.rules
    is_sparse = frame.attention == "sparse"
    chooses = is_sparse and shared is None
    q_latent, queries, kv_BTX = self._project(x, frame)
    k_BTI = self.indexer.cached_keys(x, frame) if chooses else None
    cache = cache.write(frame, kv_BTX, k_BTI, rules)
    selected_BTK = shared
    if chooses:
      selected_BTK = self.indexer.find_cached(x, q_latent, frame, cache)
    T, paging = x.shape[1], frame.paging
    assert paging is not None  # there is a cache
    S = paging.pages.shape[1] * cache.pool.page_size
    if is_sparse:
      expands = crossover.dense_is_faster(T, S, cfg.top_k, cached=True)
    else:
      expands = crossover.expanding_is_faster(T)
    if expands:
      kv_BSX = cached_attention.gather(cache, frame, cfg.dtype, rules)
      indexed = indexer_lib.Indexed(selected_BTK, None)
      out_BTNU, _ = self._expanded(queries, kv_BSX, indexed, frame)
    else:
      out_BTNU = self._values(
        cached_attention.attend(
          *(self._absorb(queries), cache, frame, selected_BTK),
          *(cfg.kv_rank, softmax_scale(cfg), rules),
        )
      )
    return self._output(out_BTNU), cache, selected_BTK

  def _project(self, x, frame):
    """The query latent, all heads' queries, and the rows `[c; kr]`."""
    cfg, rules = self.cfg, self.cfg.rules
    C, H = cfg.kv_rank, cfg.nope_head_dim
    per_token = rules("batch", "seq", None)
    q_latent = self.q_norm(
      parameter.einsum(
        "BTD,DQ->BTQ", x, self.q_a_DQ[...], out_sharding=per_token
      )
    )
    q_BTNX = parameter.einsum(
      "BTQ,QNX->BTNX",
      q_latent,
      self.q_b_QNX[...],
      out_sharding=rules("batch", "seq", "heads", None),
    )
    q_nope_BTNH, q_rope_BTNR = q_BTNX[..., :H], q_BTNX[..., H:]
    q_rope_BTNR = rope.rotate(
      q_rope_BTNR, frame.cos, frame.sin, interleaved=True
    )
    queries = Queries(q_nope_BTNH, q_rope_BTNR)
    kv_BTX = parameter.einsum(
      "BTD,DX->BTX", x, self.kv_a_DX[...], out_sharding=per_token
    )
    c_BTC, kr_BTR = self.kv_norm(kv_BTX[..., :C]), kv_BTX[..., C:]
    kr_BTR = rope.rotate(kr_BTR, frame.cos, frame.sin, interleaved=True)
    return q_latent, queries, jnp.concatenate([c_BTC, kr_BTR], -1)

  def _output(self, out_BTNU):
    return parameter.einsum(
      "BTNU,NUD->BTD",
      out_BTNU,
      self.out_NUD[...],
      out_sharding=self.cfg.rules("batch", "seq", None),
    )

  def _expanded(
    self,
    queries: Queries,
    kv_BSX: Float[Array, "BX S CR"],
    indexed: indexer_lib.Indexed,
    frame: frame_lib.Frame,
  ) -> tuple[Float[Array, "B T N U"], Float[Array, "B T"] | None]:
    """Keys `[c Wuk; kr]` and values `c Wuv` for each head.

    Reads all visible keys, or of these the selected ones.
    """
    cfg, rules = self.cfg, self.cfg.rules
    C, scale = cfg.kv_rank, softmax_scale(cfg)
    keys = rules("keys", None, "heads", None)
    k_BSNX = self._keys(kv_BSX)
    v_BSNU = parameter.einsum(
      "BSC,CNU->BSNU",
      kv_BSX[..., :C],
      self.v_b_CNU[...],
      out_sharding=keys,
    )
    q_BTNX = jnp.concatenate([queries.nope, queries.rope], -1)
    selected = [] if frame.attention == "dense" else [indexed.selected]
    per_query = rules("batch", "seq")
    per_part = rules("batch", "seq", "heads", None)
    attend = sharding.local(
      lambda q, k, v, start, end, *indices: pallas_kernels.dense_mla(
        *(q, k, v, start, end, scale, *indices)
      ),
      in_specs=(
        *(per_part, keys, keys, per_query, per_query),
        *(rules("batch", "seq", None) for _ in selected),
      ),
      out_specs=(per_part, rules("batch", "seq", "heads")),
    )
    with jax.named_scope("attend"):
      out_BTNU, lse_BTN = attend(
        *(q_BTNX, k_BSNX, v_BSNU, frame.start, frame.end), *selected
      )
    if not frame.index_loss:
      return out_BTNU, None
    if selected:
      attended = pallas_kernels.Attended(self._absorb(queries), kv_BSX, lse_BTN)
    else:
      attended = pallas_kernels.Attended(q_BTNX, k_BSNX, lse_BTN)
    return out_BTNU, self._index_loss(attended, indexed, frame)

  @jax.named_scope("index_loss")
  def _index_loss(
    self,
    attended: pallas_kernels.Attended,
    indexed: indexer_lib.Indexed,
    frame: frame_lib.Frame,
  ) -> Float[Array, "B T"]:
    """KL of each query's attention from its index scores.

    Over all visible keys, or of these the selected ones.
    """
    rules, scale = self.cfg.rules, softmax_scale(self.cfg)
    heads_axis = rules.mesh_axes("heads")
    per_query = rules("batch", "seq")
    if frame.attention == "dense":
      op, read = pallas_kernels.dense_indexer_loss, (frame.start, frame.end)
      read_specs, keys = (per_query, per_query), ("keys", None, "heads", None)
    else:
      op, read = pallas_kernels.sparse_indexer_loss, (indexed.selected,)
      read_specs, keys = (rules("batch", "seq", None),), ("keys", None, None)

    def compare(measure, q_index, k_index, w, q, kv, lse, *read):
      index = pallas_kernels.Index(q_index, k_index, w)
      attended = pallas_kernels.Attended(q, kv, lse)
      return op(index, attended, *read, scale, heads_axis, measure)

    in_specs = (
      *(rules(), *indexer_lib.index_specs(rules)),
      *(rules("batch", "seq", "heads", None), rules(*keys)),
      *(rules("batch", "seq", "heads"), *read_specs),
    )
    index = indexed.index
    assert index is not None  # there is one wherever its loss is asked for
    # The target is a constant: the trunk learns nothing from the indexer.
    attended = jax.lax.stop_gradient(attended)
    return sharding.local(compare, in_specs, per_query)(
      *(frame.measure, index.q, index.k, index.w),
      *(attended.q, attended.kv, attended.lse, *read),
    )

  def _keys(self, kv_BSX: Float[Array, "B S CR"]) -> Float[Array, "B S N HR"]:
    """Keys `[c Wuk; kr]` of each head: `[c; kr] [[Wuk, 0], [0, 1]]`.

    One product, since to join rotated keys to the others would take as much
    memory as the keys once more. Heads are side by side in it: by head, a TPU
    would fill up their width with padding.
    """
    cfg, rules = self.cfg, self.cfg.rules
    (B, S, CR), H, R = kv_BSX.shape, cfg.nope_head_dim, cfg.rope_head_dim
    N, X = cfg.num_heads, H + R
    whole = rules(None, "heads", None)
    k_b_CNH = sharding.put(self.k_b_CNH[...].astype(cfg.dtype), whole)
    through_R1X = jnp.eye(R, X, H, dtype=cfg.dtype)[:, None]
    weights = [
      jnp.pad(k_b_CNH, [(0, 0), (0, 0), (0, R)]),
      jnp.broadcast_to(through_R1X, (R, N, X), out_sharding=whole),
    ]
    weights = jnp.reshape(
      jnp.concatenate(weights), (CR, N * X), out_sharding=rules(None, "heads")
    )
    side_by_side = parameter.einsum(
      "BSX,XZ->BSZ", kv_BSX, weights, out_sharding=rules("keys", None, "heads")
    )
    keys = rules("keys", None, "heads", None)
    return jnp.reshape(side_by_side, (B, S, N, X), out_sharding=keys)

  def _absorbed(
    self,
    queries: Queries,
    kv_BSX: Float[Array, "BX S CR"],
    indexed: indexer_lib.Indexed,
    frame: frame_lib.Frame,
  ) -> tuple[Float[Array, "B T N U"], Float[Array, "B T"] | None]:
    """Queries go to the latent's space, results come back from it."""
    cfg, rules = self.cfg, self.cfg.rules
    C, scale = cfg.kv_rank, softmax_scale(cfg)
    per_part = rules("batch", "seq", "heads", None)
    per_head = rules("batch", "seq", "heads")
    specs = per_part, rules("keys", None, None), rules("batch", "seq", None)
    inputs = self._absorb(queries), kv_BSX, indexed.selected
    if (index := indexed.index) is not None:
      heads_axis = rules.mesh_axes("heads")
      attend = sharding.local(
        lambda measure, q, kv, selected, *index: (
          pallas_kernels.sparse_mla_with_loss(
            *(q, kv, selected, pallas_kernels.Index(*index)),
            *(C, scale, heads_axis, measure),
          )
        ),
        in_specs=(rules(), *specs, *indexer_lib.index_specs(rules)),
        out_specs=(per_part, per_head, rules("batch", "seq")),
      )
      with jax.named_scope("attend_and_index_loss"):
        out_BTNC, _, index_loss_BT = attend(
          frame.measure, *inputs, index.q, index.k, index.w
        )
    else:
      attend = sharding.local(
        lambda *inputs: pallas_kernels.sparse_mla(*inputs, C, scale),
        in_specs=specs,
        out_specs=(per_part, per_head),
      )
      with jax.named_scope("attend"):
        out_BTNC, _ = attend(*inputs)
      index_loss_BT = None
    return self._values(out_BTNC), index_loss_BT

  def _values(self, out_BTNC: Float[Array, "B T N C"]):
    """Each head's value of a mixed latent, [B, T, N, U]."""
    return parameter.einsum(
      "BTNC,CNU->BTNU",
      out_BTNC,
      self.v_b_CNU[...],
      out_sharding=self.cfg.rules("batch", "seq", "heads", None),
    )

  def _absorb(self, queries: Queries) -> Float[Array, "B T N CR"]:
    """Queries of the latent's space, `[q Wuk; qr]`, C+R wide."""
    q_BTNC = parameter.einsum(
      "BTNH,CNH->BTNC",
      queries.nope,
      self.k_b_CNH[...],
      out_sharding=self.cfg.rules("batch", "seq", "heads", None),
    )
    return jnp.concatenate([q_BTNC, queries.rope], -1)

  @jax.named_scope("recall")
  def _recall(
    self,
    queries: Queries,
    kv_BSX: Float[Array, "BX S CR"],
    indexed: indexer_lib.Indexed,
    frame: frame_lib.Frame,
  ) -> Float[Array, "B Q"]:
    """Recall of a sample of the queries; zeros where it is not measured."""
    cfg, rules = self.cfg, self.cfg.rules
    C, scale = cfg.kv_rank, softmax_scale(cfg)
    heads_axis = rules.mesh_axes("heads")
    start, end = recall.sample(frame.start), recall.sample(frame.end)
    per_query = rules("batch", "seq")
    measure = sharding.local(
      lambda *inputs: recall.recall(*inputs, C, scale, heads_axis),
      in_specs=(
        rules("batch", "seq", "heads", None),
        rules("keys", None, None),
        rules("batch", "seq", None),
        per_query,
        per_query,
      ),
      out_specs=per_query,
    )

    def measured(inputs):
      queries, kv_BSX, index, selected_BQK = inputs
      if selected_BQK is None:  # dense attention: it has not chosen
        selected_BQK = self.indexer.select(index, start, end)
      q_BQNX = self._absorb(queries)
      return measure(q_BQNX, kv_BSX, selected_BQK, start, end)

    index = indexed.index
    assert index is not None  # there is one wherever recall is asked for
    inputs = (
      jax.tree.map(recall.sample, queries),
      kv_BSX,
      pallas_kernels.Index(
        recall.sample(index.q), index.k, recall.sample(index.w)
      ),
      jax.tree.map(recall.sample, indexed.selected),
    )
    nothing = jnp.zeros(start.shape, jnp.float32, out_sharding=per_query)
    return jax.lax.cond(
      frame.measure, measured, lambda _: nothing, jax.lax.stop_gradient(inputs)
    )
