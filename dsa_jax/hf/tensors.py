"""Which tensors a released checkpoint has, and which parameters they fill.

The tables are literal: for each parameter here, the tensor there. Their linear
weights are [out, in], ours [in, out] with heads apart; layers that are alike
are stacked here; one tensor there may hold two parameters side by side.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Final, Literal

from flax import nnx
import jax
import numpy as np

from dsa_jax import config as config_lib
from dsa_jax import transformer

type Kind = Literal["linear", "plain", "float32"]


@dataclasses.dataclass(frozen=True)
class Place:
  """The part of a parameter that a tensor fills."""

  leaf: str
  """The parameter, as in `leaf_names`."""
  index: tuple[int, ...]
  """The layer of its stack, and the expert, if it has them."""
  shape: tuple[int, ...]
  """Shape of the part, without these."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of the checkpoint."""

  name: str
  kind: Kind
  """"linear": FP8 where weights are; "float32": what keeps that dtype."""
  places: tuple[Place, ...]
  inputs: int | None
  """How many of our leading dimensions are `in`; None: the same array."""
  copy: bool = False
  """Copy of another tensor: written, but not read."""

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.places[0].shape
    if self.inputs is None:
      return first
    rows, heads, _ = self._matrix()
    return heads * sum(p.shape[-1] for p in self.places), rows

  def split(self, array: np.ndarray) -> list[np.ndarray]:
    """The tensor -> what fills each of its places."""
    if self.inputs is None:
      return [array]
    rows, heads, widths = self._matrix()
    apart = array.T.reshape(rows, heads, -1)
    parts = np.split(apart, np.cumsum(widths)[:-1], -1)
    return [x.reshape(p.shape) for x, p in zip(parts, self.places)]

  def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Undoes `split`."""
    if self.inputs is None:
      return parts[0]
    rows, heads, widths = self._matrix()
    apart = [x.reshape(rows, heads, w) for x, w in zip(parts, widths)]
    whole = apart[0] if len(apart) == 1 else np.concatenate(apart, -1)
    return whole.reshape(rows, -1).T

  def _matrix(self) -> tuple[int, int, list[int]]:
    """Sizes of our parts [in, heads, width]: in, heads, and each width."""
    shape, inputs = self.places[0].shape, self.inputs
    rows, heads = math.prod(shape[:inputs]), math.prod(shape[inputs:-1])
    return rows, heads, [p.shape[-1] for p in self.places]


@dataclasses.dataclass(frozen=True)
class _Row:
  """A line of the tables: `ours` may name two parameters, joined by +."""

  theirs: str
  ours: str
  kind: Kind
  inputs: int | None


def _linear(theirs: str, ours: str, inputs: int = 1) -> _Row:
  return _Row(f"{theirs}.weight", ours, "linear", inputs)


def _norm(theirs: str, ours: str) -> _Row:
  return _Row(f"{theirs}.weight", f"{ours}.scale_D", "plain", None)


def _mlp(theirs: str, ours: str, letters: str = "") -> tuple[_Row, ...]:
  E = letters
  return (
    _linear(f"{theirs}.gate_proj", f"{ours}.gate_{E}DF"),
    _linear(f"{theirs}.up_proj", f"{ours}.up_{E}DF"),
    _linear(f"{theirs}.down_proj", f"{ours}.down_{E}FD"),
  )


_ATTENTION: Final = (
  _linear("self_attn.q_a_proj", "attention.q_a_DQ"),
  _norm("self_attn.q_a_layernorm", "attention.q_norm"),
  _linear("self_attn.q_b_proj", "attention.q_b_QNX"),
  _linear("self_attn.kv_a_proj_with_mqa", "attention.kv_a_DX"),
  _norm("self_attn.kv_a_layernorm", "attention.kv_norm"),
  _linear("self_attn.kv_b_proj", "attention.k_b_CNH+attention.v_b_CNU"),
  _linear("self_attn.o_proj", "attention.out_NUD", inputs=2),
)
_INDEXER: Final = (
  _linear("self_attn.indexer.wq_b", "attention.indexer.q_QMI"),
  _linear("self_attn.indexer.wk", "attention.indexer.k_DI"),
  _norm("self_attn.indexer.k_norm", "attention.indexer.k_norm"),
  _Row(
    "self_attn.indexer.k_norm.bias",
    "attention.indexer.k_norm.bias_D",
    "plain",
    None,
  ),
  _Row(
    "self_attn.indexer.weights_proj.weight",
    "attention.indexer.w_DM",
    "float32",
    1,
  ),
)
_NORMS: Final = (
  _norm("input_layernorm", "attention_norm"),
  _norm("post_attention_layernorm", "ffn_norm"),
)
_ROUTER: Final = (
  _Row("mlp.gate.weight", "ffn.router.w_DE", "plain", 1),
  _Row(
    "mlp.gate.e_score_correction_bias", "ffn.router.bias_E", "float32", None
  ),
)
_EXPERT: Final = _mlp("mlp.experts.{}", "ffn", "E")  # E in front
_SHARED: Final = _mlp("mlp.shared_experts", "ffn.shared")
_DENSE: Final = _mlp("mlp", "ffn")
_EMBED: Final = _Row("embed_tokens.weight", "embed.table_VD", "plain", None)
_MTP: Final = (
  _norm("enorm", "mtp.embed_norm"),
  _norm("hnorm", "mtp.hidden_norm"),
  _Row("eh_proj.weight", "mtp.join_XDD", "plain", 2),
  _norm("shared_head.norm", "mtp.final_norm"),
)


def tensors(cfg: config_lib.ModelConfig) -> list[Tensor]:
  """All tensors of a model, layer after layer; MTP is the layer after them."""
  shapes = {name: x.shape for name, x in leaf_shapes(cfg).items()}

  def make(row, prefix="", ours="", index=(), theirs=None, copy=False):
    leaves = [ours + name for name in row.ours.split("+")]
    places = tuple(
      Place(leaf, index, shapes[leaf][len(index) :]) for leaf in leaves
    )
    name = prefix + (theirs or row.theirs)
    return Tensor(name, row.kind, places, row.inputs, copy)

  def layer(number, ours, stacked, moe):
    prefix = f"model.layers.{number}."
    rows = [*_NORMS, *_ATTENTION]
    if cfg.has_indexer[number]:
      rows += _INDEXER
    rows += [*_ROUTER, *_SHARED] if moe else _DENSE
    if moe and not cfg.num_shared_experts:
      rows = [row for row in rows if row not in _SHARED]
    yield from (make(row, prefix, ours, stacked) for row in rows)
    for expert in range(cfg.num_experts if moe else 0):
      for row in _EXPERT:
        theirs = row.theirs.format(expert)
        yield make(row, prefix, ours, (*stacked, expert), theirs)

  dense = cfg.num_dense_layers
  found = [make(_EMBED, "model.")]
  for i in range(cfg.num_layers):
    if i < dense:
      found += layer(i, "dense_layers.", (i,), moe=False)
    else:
      found += layer(i, "moe_layers.", (i - dense,), moe=True)
  found += [
    make(_norm("norm", "final_norm"), "model."),
    make(_Row("lm_head.weight", "head.w_DV", "plain", 1)),
  ]
  if cfg.num_mtp_layers:
    prefix = f"model.layers.{cfg.num_layers}."
    found += layer(cfg.num_layers, "mtp.block.", (), moe=True)
    found += [make(row, prefix) for row in _MTP]
    # The release carries the trunk's embedding and head there once more.
    head = _Row("shared_head.head.weight", "head.w_DV", "plain", 1)
    found += [make(row, prefix, copy=True) for row in (_EMBED, head)]
  return found


def leaf_shapes(
  cfg: config_lib.ModelConfig,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, dtype and sharding (of the mesh in context) of each parameter."""
  model = nnx.eval_shape(lambda: transformer.Transformer(cfg, rngs=nnx.Rngs(0)))
  leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
  return {leaf_name(path): leaf for path, leaf in leaves}


def places(leaf: str, shape: tuple[int, ...]) -> Iterator[Place]:
  """All parts of a parameter: each layer's, each expert's."""
  dims = stacked(leaf)
  for index in np.ndindex(*shape[:dims]):
    yield Place(leaf, index, tuple(shape[dims:]))


def stacked(leaf: str) -> int:
  """How many of a parameter's leading dimensions are layers and experts."""
  layers = leaf.startswith(("dense_layers.", "moe_layers."))
  experts = leaf.rpartition(".")[2].rpartition("_")[2].startswith("E")
  return layers + (experts and not leaf.endswith("router.bias_E"))


def leaf_name(path: tuple[Any, ...]) -> str:
  """moe_layers.ffn.gate_EDF: a parameter's name in the tree of the model."""
  return ".".join(str(key.key) for key in path if hasattr(key, "key"))
