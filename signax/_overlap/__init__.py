"""Exchanges beside the backward pass: the order of a step's operations."""
