"""Subjects, sparse autoencoders and the training of a pack (torch + Lightning)."""
