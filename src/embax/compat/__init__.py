"""Other libraries' module trees, for code that was written for them."""
