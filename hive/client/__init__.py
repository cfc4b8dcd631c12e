"""The HTTP API from outside: what `hive …` and `hive mcp` ask the daemon with."""
