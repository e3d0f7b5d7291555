<<<<<<< HEAD
"""A suite: one recipe varied in rows, axes and seeds, of which each cell is an ordinary run."""
=======
"""Benchmark suites: many recipes that differ in few keys, run once each, and compared by statistics
that hold."""
>>>>>>> stats
