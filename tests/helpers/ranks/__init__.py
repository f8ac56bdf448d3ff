"""Several processes that form a process group, and what they run."""
