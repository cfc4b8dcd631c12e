"""Everything that touches an engine's processes."""
