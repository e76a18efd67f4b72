"""Evaluation tasks, one small file each: load, ask, score."""
