"""What Pallas has no word for on Hopper: one dialect for all kernels.

  threads       numbers of single threads, written as arithmetic; control flow
  memory        places in shared and device memory, and words there
  copies        asynchronous copies of 16 bytes, each by one thread
  barriers      threads that wait for each other: named, or in shared memory
  signals       the same, as single threads use them
  instructions  arithmetic that stays where it is written
  cluster       what passes between the blocks of a cluster
  wgmma         products on tensor cores, on the registers of single threads
  fragments     registers of arrays that a warpgroup holds together
  rows          a warpgroup gathers rows of device memory, or adds to them
  tiles         layouts of tiles for tensor cores, and arrays in registers
  widths        DeepSeek's, which the kernels are made for

A kernel calls functions of `tiles`, `rows` and `barriers` as it calls Pallas's.
The others are for code of single threads, inside `threads.code`. Tests run such
code on a CPU: `threads`, `memory`, `copies`, `signals` and `instructions` have
a double in numpy.
"""
