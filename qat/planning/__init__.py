"""From a float model and a policy to a plan: what one forward pass shows, which tensor gets which grid, and why not."""
