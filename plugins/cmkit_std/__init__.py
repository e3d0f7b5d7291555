"""Every part that comes with cmkit, reached only through its entry point."""
