"""Widths of quantizers: what each costs, and which are taken for a budget."""
