from pallas_kernels.ops.indexer_topk.api import indexer_topk as indexer_topk
