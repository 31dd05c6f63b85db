"""What `convert` is made of: a dataclass for each format, with its options.

They import the library once they run, so that --help is quick.
"""
