"""Latents and prompts for cmkit. Importing it imports no torch."""
