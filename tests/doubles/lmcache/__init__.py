"""A stand-in for `lmcache server`: its HTTP, its file tier, and its ways of losing what it holds."""
