"""What `plan` is made of: steps and calls, compiled from shapes alone."""
