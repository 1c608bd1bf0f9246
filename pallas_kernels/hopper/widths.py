"""Widths of DeepSeek-V3.2 that the kernels for Hopper are made for."""

from typing import Final

C: Final = 512  # rank of the latent
R: Final = 64  # of a head's part with RoPE
CR: Final = C + R  # of a row of keys in absorbed form
U: Final = 128  # of a value
HR: Final = 128 + R  # of a head in expanded form
M: Final = 64  # most index heads
I: Final = 128  # of an index head
MOST_KEYS: Final = 8192  # K
