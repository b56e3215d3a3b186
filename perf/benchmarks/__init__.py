"""What is measured: a module with a function `run(context)` for each entry of `perf.table`."""
