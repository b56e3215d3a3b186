"""Workloads and measurements: the harness for tuning."""
