"""What the commands are made of: options, consoles, tables, and what is shown of longer results."""
