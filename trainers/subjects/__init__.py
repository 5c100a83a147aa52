"""The frozen models whose residual streams are decomposed."""
