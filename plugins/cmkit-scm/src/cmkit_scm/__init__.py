"""sCM, continuous-time consistency models, as a part for cmkit."""
