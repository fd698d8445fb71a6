"""The host suite: benchmarks that need no GPU, each in the file of its name. Minutes on two cores."""
