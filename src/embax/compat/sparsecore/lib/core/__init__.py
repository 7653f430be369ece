"""What the functions of `lib.nn` are made of."""
