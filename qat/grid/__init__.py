"""Grids: what one tensor's grid is, how it is cut and scaled, and the one function that makes codes of a tensor."""
