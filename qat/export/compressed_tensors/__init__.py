"""Folders for vLLM and `transformers`."""
