"""Tables of plans, and the articles' claims on memory by the compiler."""
