from pallas_kernels.indexer_topk.api import indexer_topk as indexer_topk
