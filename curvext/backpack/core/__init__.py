"""What BackPACK computes derivatives with; curvext takes them from the graph."""
