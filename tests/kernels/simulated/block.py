"""The threads that are simulated now."""

import numpy as np


class Block:
  """The threads that run, and how many barriers they have passed."""

  def __init__(self, n: int):
    self.n = n
    self.active = np.ones(n, bool)
    self.barriers = 0


now = Block(0)
