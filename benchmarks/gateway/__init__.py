"""hive's relay beside other gateways: CPU time, latency, memory, and clients that leave."""
