"""What `search` is made of: problems, models, a pool of samples, results."""
