"""Answering as a service does: many questions at once, each as if it were alone. No Ray."""
