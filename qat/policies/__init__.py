"""Policies: from the YAML to the grid that every weight and activation should have, by rules and by engine."""
