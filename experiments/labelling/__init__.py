"""What `label` is made of: a policy's solutions, and labels of their steps."""
