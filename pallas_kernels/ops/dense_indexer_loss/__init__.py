from pallas_kernels.ops.dense_indexer_loss.api import (
  dense_indexer_loss as dense_indexer_loss,
)
