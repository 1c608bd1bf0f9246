from pallas_kernels.ops.grouped_mlp.api import grouped_mlp as grouped_mlp
