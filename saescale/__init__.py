"""saescale measures how sparse autoencoders scale."""
