"""Generative programs: what is assumed about the world. Pure functions of arrays; imports no other folder."""
