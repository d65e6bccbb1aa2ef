"""The commands, one thin module each. They connect the stages and print results."""
