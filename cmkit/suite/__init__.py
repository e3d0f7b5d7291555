"""Benchmark suites: many recipes that differ in few keys, run once each, and compared by statistics
that hold."""
