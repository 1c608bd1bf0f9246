from pallas_kernels.ops.dense_mla.api import dense_mla as dense_mla
