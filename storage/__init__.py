"""Activation stores, the deterministic stream, run directories and checkpoints (pyarrow + fsspec)."""
