"""Pure decisions: how many replicas each expert gets, where they go, and what it costs. docs/planning.md."""
