from pallas_kernels.dense_mla.api import dense_mla as dense_mla
