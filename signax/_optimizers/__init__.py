"""Optimisers: chains of transformations, and the only place with a learning rate."""
