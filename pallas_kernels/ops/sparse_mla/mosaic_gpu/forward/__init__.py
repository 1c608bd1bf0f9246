"""Sparse attention forward on Hopper: one block for 64 heads of a query.

Where there are fewer of these than the device has multiprocessors, a cluster of
2 to 8 blocks takes turns at the query's keys, and combines what each has.

A producer warpgroup gathers selected rows into two tiles of 64. Two consumer
warpgroups hold the same 64 heads: each computes the logits of one tile, and
each keeps half of the output's columns, for which it needs the weights of both
tiles. So a step of 128 keys is, where `@` runs on the tensor cores:

  warpgroup 0                          warpgroup 1
  logits 0 = q @ tile 0
  weights 0; share them                logits 1 = q @ tile 1
  left += weights 0 @ tile 0 left      right += weights 0 @ tile 0 right
    (tile 0 is free: next rows)          meanwhile weights 1; share them
  left += weights 1 @ tile 1 left      right += weights 1 @ tile 1 right

Rows come by cp.async, 16 bytes a thread, in four parts (tile x columns left or
right), each free again as soon as its last product is done.

The maximum that weights refer to is raised only where a logit exceeds it by
`_SLACK`, not with every new maximum: the output then seldom needs rescaling.

  kernel     what each warpgroup of a block does, and its inputs and results
  plan       shared memory, the barriers that guard it, and blocks of a cluster
  steps      how many the query and this block have
  gather     the producer
  quantized  the producer of rows in 8 bits, which it converts
  combine    what the blocks of a cluster have of a query
"""
