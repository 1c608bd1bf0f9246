from pallas_kernels.ops.sparse_mla.api import sparse_mla as sparse_mla
