"""Tasks with exact judges, and rollouts of policies that learn them."""
