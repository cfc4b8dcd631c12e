"""Pure decisions: no await, no clock, no I/O; time and chance are arguments."""
