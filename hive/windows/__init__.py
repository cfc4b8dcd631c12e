"""Sessions and context windows: freeze, thaw, and proof; over workers and storage."""
