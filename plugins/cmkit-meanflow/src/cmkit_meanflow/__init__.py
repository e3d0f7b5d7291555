"""Mean flows as parts for cmkit."""
