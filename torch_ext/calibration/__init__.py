"""Running data through a prepared model, on one process or many; solving again without data."""
