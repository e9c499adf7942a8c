"""What accelerators would run, without one: `python -m benchmarks.deviceless`."""
