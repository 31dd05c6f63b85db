"""What `generate` is made of: masks that are filled, adapters a row, pages."""
