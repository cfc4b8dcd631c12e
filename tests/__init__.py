"""Tests: they mirror `hive/` file for file; `doubles/` holds what stands in for the outside."""
