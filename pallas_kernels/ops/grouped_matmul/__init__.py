from pallas_kernels.ops.grouped_matmul.api import (
  grouped_matmul as grouped_matmul,
)
