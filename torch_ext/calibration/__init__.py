"""Running data through a prepared model, on one process or several, and solving again without it."""
