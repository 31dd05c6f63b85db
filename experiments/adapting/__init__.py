"""What `adapters` is made of: a dataclass for each operation, with its options.

They import the library once they run, so that --help is quick.
"""
