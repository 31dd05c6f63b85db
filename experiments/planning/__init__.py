"""What `plan` is made of: shapes and memory before anything is allocated."""
