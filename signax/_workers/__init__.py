"""Collectives and gradient transformations over workers."""
