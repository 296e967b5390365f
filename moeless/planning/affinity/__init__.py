"""Placement by affinity: experts that fire together, or one after the other, on the same worker. docs/placement.md."""
