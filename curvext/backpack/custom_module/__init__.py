"""Modules that BackPACK has for what it cannot see in a forward pass; here an operator or a method does the same."""
