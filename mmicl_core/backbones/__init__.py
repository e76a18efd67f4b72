"""Frozen multimodal models, seen through the few operations that in-context methods need."""
