"""Sessions and windows: on real files, on a real catalogue, and on the real daemon with doubles."""
