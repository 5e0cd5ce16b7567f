"""Ablations: rows that differ by one term, with seeds that share what comes before the difference."""
