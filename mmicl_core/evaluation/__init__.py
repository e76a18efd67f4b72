"""Does the model learn from its demonstrations? Tasks, prompts and scores, free of Ray."""
