"""Ray programs: they arrange the library on a cluster and hold no mathematics."""
