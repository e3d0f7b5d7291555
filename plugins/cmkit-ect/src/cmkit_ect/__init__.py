"""Easy consistency tuning (Geng et al.: Consistency Models Made Easy, 2024) for cmkit."""
