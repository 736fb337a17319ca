"""What benchmark.py measures: each row a training step, written for either library."""
