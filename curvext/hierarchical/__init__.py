"""Hierarchical approximations of symmetric operators: blocks off the diagonal of low rank, level by level."""
