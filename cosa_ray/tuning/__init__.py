"""Tuning: a sweep file, its search space, what fits the cluster, and the driver of its trials."""
