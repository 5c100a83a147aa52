"""The types of number that a cell's encoder product may take. Apart, because a sweep file is read without torch."""

from typing import Literal

Precision = Literal["fp32", "bf16"]  # of the operands of the encoder product
