"""How fast is it?  Prompts and generations on four clocks."""
