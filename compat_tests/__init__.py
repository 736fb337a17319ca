"""Parity with PyTorch: each test is written once, and run on both backends."""
