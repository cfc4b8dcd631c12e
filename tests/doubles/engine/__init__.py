"""A stand-in for vLLM: its HTTP on a unix socket, and every way of misbehaving as a process."""
