"""Listeners only: what hive announces, as logs and metrics."""
