"""One optimiser step and what a run must remember, free of Ray and DeepSpeed."""
