"""From YAML to objects: where configs are, what their keys may hold, and mistakes in them as one line."""
