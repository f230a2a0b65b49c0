"""Exporters: a converted model becomes a file, and a runtime proves that it computes the same. One file per format."""
