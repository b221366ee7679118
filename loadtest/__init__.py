"""The demo, the load test and the benchmark of triton-swap: clients of a running server, and the models they serve."""
