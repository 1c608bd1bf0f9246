from pallas_kernels.ops.sparse_indexer_loss.api import (
  sparse_indexer_loss as sparse_indexer_loss,
)
