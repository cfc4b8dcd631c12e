"""hive for agents: a Model Context Protocol server that is a client of the HTTP API, no more.

It runs as a program of its own (`hive mcp`); the daemon never imports it.
"""
