"""Planners of other systems, to compare with."""
