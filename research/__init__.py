"""Systems of Heptad: models, their training, compression and use.

Rooms lean one way, from `io`, `text` and `taps` at the bottom to `interop` and
`planning` at the top; CONTRIBUTING.md has the order.
"""
