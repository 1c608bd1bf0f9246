from pallas_kernels.sparse_mla.api import sparse_mla as sparse_mla
