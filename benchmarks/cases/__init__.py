"""The CPU's cases, with their peers and goals; ../run.py runs them."""
