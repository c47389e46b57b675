"""Graph passes, one a file. A module exports one constant: its Pass."""
