"""The ops of DeepSeek Sparse Attention, usable without the rest.

Letters, here and in every file below:
  B batch, T queries, S keys, K selected keys per query,
  N attention heads, H width of a head without position, R with (RoPE),
  U width of a value, C rank of the latent, M index heads, I their width.
`CR` and `HR` stand for C+R and H+R.

Every query sees one contiguous range of keys [start, end). This covers causal
attention, packed documents, padding (an empty range) and decoding.
"""

from pallas_kernels.operands import Attended
from pallas_kernels.operands import Index
from pallas_kernels.operands import QuantizedLatents
from pallas_kernels.ops.dense_indexer_loss import dense_indexer_loss
from pallas_kernels.ops.dense_mla import dense_mla
from pallas_kernels.ops.grouped_matmul import grouped_matmul
from pallas_kernels.ops.grouped_mlp import grouped_mlp
from pallas_kernels.ops.indexer_topk import indexer_topk
from pallas_kernels.ops.sparse_indexer_loss import sparse_indexer_loss
from pallas_kernels.ops.sparse_mla import sparse_mla
from pallas_kernels.ops.sparse_mla_with_loss import sparse_mla_with_loss

__all__ = [
  "Attended",
  "Index",
  "QuantizedLatents",
  "dense_indexer_loss",
  "dense_mla",
  "grouped_matmul",
  "grouped_mlp",
  "indexer_topk",
  "sparse_indexer_loss",
  "sparse_mla",
  "sparse_mla_with_loss",
]
