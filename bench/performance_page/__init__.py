"""What `bench/performance.py` makes docs/performance.md and docs/performance/ of."""
