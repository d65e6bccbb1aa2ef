"""The commands, one module each: thin, they connect the stages and talk to the user."""
