"""Replay requests and routing under a cost model, in virtual time. docs/simulator.md.

Everything is a function of its arguments: no clock, no global randomness; the same settings give the same result.
"""
