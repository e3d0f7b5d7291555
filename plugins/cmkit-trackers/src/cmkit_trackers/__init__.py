"""Trackers of cmkit's runs."""
