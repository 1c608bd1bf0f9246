from pallas_kernels.ops.sparse_mla_with_loss.api import (
  sparse_mla_with_loss as sparse_mla_with_loss,
)
