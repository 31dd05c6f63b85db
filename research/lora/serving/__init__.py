"""Many adapters over one base in one batch."""
