"""Sparse attention's gradients on Hopper: one or two thread blocks a query.

Up to 64 heads are one block's. 128 are a cluster's: each of its two blocks
takes all heads, but half of the columns of Q, dO, K, dQ and dKV, so that every
row is gathered once and every sum over heads goes to device memory once. More
heads are done in groups of 128, one after another.

Q and dO stay in shared memory; tiles of 64 selected rows stream through it, one
after another:

- Warpgroup 2 gathers the rows with 16-byte cp.async.
- Warpgroup 0 computes S^T = K Q^T, from it the weights P^T; warpgroup 1
  dP^T = V dO^T, then dS^T = scale P^T (dP^T - delta). Keys are the rows of
  these products, so that a key's probability summed over heads is a sum over a
  row.
- In a cluster these are sums over half of the columns: each block sends the
  64 heads it does not own to the other one, adds what it gets to its own 64,
  and sends back their weights.
- P^T and dS^T go through shared memory. A warpgroup has its share of the
  columns (alone) or of the heads (in a cluster) of dQ += dS K in registers
  until the end, and its share of the columns of dKV = P^T dO + dS^T Q, 64 at a
  time: from registers to device memory as vector additions, while the next 64
  are multiplied.

The tile is freed after dQ, so that the next gather overlaps with dKV.

Registers are scarce: only dQ's live through the loop over tiles, and what
depends on the thread is computed where it is used.

  launch           the kernel's inputs and results; groups of heads
  kernel           what each warpgroup of a block does
  plan             sizes, and the barriers
  shared_memory    arrays of a block
  operands         the same as operands of products
  warpgroup        one of the two that multiply
  multiplication   its loop over tiles
  products         K Q^T and V dO^T
  lanes            a thread's place in a product
  gather           rows of K to shared memory
  permutation      order of columns in Q, dO and K
  weights          P^T, and its sums over heads
  logit_gradients  dS^T
  weight_tile      both of them in shared memory
  exchange         halves of products and weights, between a cluster's blocks
  query_gradients  dQ
  key_gradients    dKV
  key_sums         dKV in one fixed order: the deterministic variant
"""
