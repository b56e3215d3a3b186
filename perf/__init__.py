"""Workloads and measurements: the harness for tuning. `perf/README.md` says how to use it."""
