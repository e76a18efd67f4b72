"""Every setting of a run, as frozen typed models that import without torch."""
