"""Alembic's: how the catalogue's tables came to be what they are."""
