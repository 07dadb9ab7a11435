"""Checks that a fit may fail: pure functions of arrays, each with a null law and a level."""
