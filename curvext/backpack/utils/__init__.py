"""Helpers that optimizers written for BackPACK import."""
