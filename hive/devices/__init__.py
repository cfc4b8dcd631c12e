"""What hive knows of the host's GPUs, through NVML and with a deadline on every call."""
