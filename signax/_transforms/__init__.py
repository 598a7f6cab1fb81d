"""Gradient transformations of one worker."""
