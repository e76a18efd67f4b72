"""Ray Serve: an OpenAI-compatible ingress, compressor replicas and generator replicas."""
