"""Weights of subjects that come with saescale: `saescale.shipped` when it is installed."""
