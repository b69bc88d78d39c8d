"""Derivatives of layers; curvext takes them from the graph."""
