"""Names given by `checkpoint_name` to results that a remat policy may keep.

For `jax.checkpoint_policies.save_only_these_names`.
"""

from typing import Final

INDEXER_TOPK: Final = "indexer_topk"  # its indices, named by the caller
SPARSE_MLA: Final = "sparse_mla"  # output and logsumexp, with or without a loss
DENSE_MLA: Final = "dense_mla"  # likewise
